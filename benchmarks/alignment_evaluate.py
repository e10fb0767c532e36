"""Measures a model: constrained retrieval, unconstrained beams, and the log-probs of candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import raddpo_ext as rx
from benchmarks.alignment_data import Data

BEAMS = 50
BATCH = 256  # prompts of one length


class SharedPromptDecoder:
    """``step_fn`` of :func:`rx.beam_search` that keeps a prompt's keys and values once, whatever the beams.

    All beams of a query are one row: their tokens are appended to its cache, step after step, and a mask shows each
    beam its own ancestors. Nothing in the cache ever moves.

    Args:
        model: a decoder-only model of ``transformers``.
        prompts: int64 ``[B, T]``, all of one length.
    """

    def __init__(self, model: Any, prompts: Tensor) -> None:
        self.model, self.prompts = model, prompts
        self.cache = DynamicCache(config=model.config)
        self.sees = torch.zeros(0)

    def __call__(self, tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        batch, length = self.prompts.shape
        if level == 0:
            output = self.model(self.prompts, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.sees = torch.ones(batch, 1, length, dtype=torch.bool)
            return output.logits
        width = tokens.shape[1]
        ancestors = self.sees.gather(1, parents[..., None].expand(-1, -1, self.sees.shape[2]))
        self.sees = torch.cat([ancestors, torch.eye(width, dtype=torch.bool).expand(batch, -1, -1)], 2)
        positions = torch.full((batch, width), length + level - 1)
        return self.model(
            tokens.clamp(min=0),  # an empty slot feeds token 0, and what that gives is ignored
            attention_mask=self.sees[:, None],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits


@torch.no_grad()
def retrieve(model: Any, data: Data, histories: Sequence[list[int]], beams: int = BEAMS) -> Tensor:
    """The best items of each history by constrained beam search: int64 ``[B, beams]``, padded with -1."""

    def search(prompts: Tensor) -> Tensor:
        decoder = SharedPromptDecoder(model, prompts)
        found = rx.beam_search(decoder, data.index, batch_size=len(prompts), beam_width=beams, top_k=beams)
        return found.items

    return _by_length(data, histories, search)


@torch.no_grad()
def retrieve_freely(model: Any, data: Data, histories: Sequence[list[int]], beams: int = BEAMS) -> Tensor:
    """The best codes of each history by beam search over the whole vocabulary: int64 ``[B, beams, L]``.

    A token that is no code of its level is -1.
    """
    firsts = data.tokens.new_tensor([1 + 256 * level for level in range(data.levels)])

    def search(prompts: Tensor) -> Tensor:
        decoder = SharedPromptDecoder(model, prompts)
        tokens = parents = torch.zeros(len(prompts), 1, dtype=torch.int64)
        scores = torch.zeros(len(prompts), 1)
        rows = torch.zeros(len(prompts), 1, 0, dtype=torch.int64)
        for level in range(data.levels):
            totals = scores[..., None] + decoder(tokens, parents, level).log_softmax(-1)
            scores, best = totals.flatten(1).topk(beams)
            parents, tokens = best // totals.shape[2], best % totals.shape[2]
            rows = torch.cat([rows.gather(1, parents[..., None].expand(-1, -1, level)), tokens[..., None]], 2)
        return rows

    found = _by_length(data, histories, search)
    codes = found - firsts
    return codes.masked_fill((codes < 0) | (codes >= 256), -1)


def _by_length(data: Data, histories: Sequence[list[int]], search: Callable[[Tensor], Tensor]) -> Tensor:
    """``search`` of every prompt, in batches of prompts of one length."""
    found: dict[int, Tensor] = {}
    for rows in _batches(histories):
        prompts = torch.stack([torch.from_numpy(data.prompt(histories[row])) for row in rows])
        found.update(zip(rows, search(prompts), strict=True))
    return torch.stack([found[row] for row in range(len(histories))])


def _batches(histories: Sequence[list[int]]) -> Iterator[list[int]]:
    from benchmarks.alignment_data import HISTORY

    by_length: dict[int, list[int]] = {}
    for row, items in enumerate(histories):
        by_length.setdefault(min(len(items), HISTORY), []).append(row)
    for rows in by_length.values():
        for at in range(0, len(rows), BATCH):
            yield rows[at : at + BATCH]
