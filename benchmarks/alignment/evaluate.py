"""Measures a model: constrained retrieval, and what an unconstrained search makes up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.alignment.data import Data
from demo.sft import HISTORY, START
from raddpo_ext.data.metrics import invalid_share, retrieval_metrics
from raddpo_ext.integrations.decoders import SharedPrefixDecoder

BATCH = 32  # prompts of one length; more leave the cache
KS = (5, 10, 50)


def retrieve(model: Any, data: Data, histories: Sequence[list[int]], beams: int) -> Tensor:
    """The best items of each history by constrained beam search: int64 ``[B, beams]``, padded with -1."""

    retriever = rx.SIDRetriever(model, data.index, beam_width=beams)
    return _by_length(data, histories, lambda prompts: retriever.retrieve(prompts, top_k=beams).items)


@torch.no_grad()
def retrieve_freely(model: Any, data: Data, histories: Sequence[list[int]], beams: int) -> Tensor:
    """The best token ids of each history by beam search over the whole vocabulary: int64 ``[B, beams, L]``."""

    def search(prompts: Tensor) -> Tensor:
        decoder = SharedPrefixDecoder(model, None, prompts, torch.ones_like(prompts, dtype=torch.bool))
        tokens = parents = torch.zeros(len(prompts), 1, dtype=torch.int64)
        scores = torch.zeros(len(prompts), 1)
        rows = torch.zeros(len(prompts), 1, 0, dtype=torch.int64)
        for level in range(data.levels):
            totals = scores[..., None] + decoder(tokens, parents, level).log_softmax(-1)
            scores, best = totals.flatten(1).topk(beams)
            parents, tokens = best // totals.shape[2], best % totals.shape[2]
            rows = torch.cat([rows.gather(1, parents[..., None].expand(-1, -1, level)), tokens[..., None]], 2)
        return rows

    return _by_length(data, histories, search)


def ranks(found: Tensor, wanted: Sequence[int]) -> np.ndarray:
    """The place of each query's wanted item, from 1; 0 where it is not found: uint8 ``[B]``."""
    reciprocal = retrieval_metrics(found, torch.tensor(wanted)[:, None], ks=())["mrr"]
    return torch.where(reciprocal > 0, 1 / reciprocal, 0).round().to(torch.uint8).numpy()


def invalid_shares(data: Data, rows: Tensor) -> dict[str, float]:
    """The mean share of token id rows ``[B, R, L]``, best first, that are no item's SID, by cut-off."""
    sizes = torch.tensor(data.sizes)
    codes = rows - (1 + START + sizes.cumsum(0) - sizes)
    codes = codes.masked_fill((codes < 0) | (codes >= sizes), int(sizes.max()))  # no code of any level
    whole = torch.full(codes.shape[:2], data.levels)
    return {f"invalid@{k}": float(invalid_share(data.index, codes[:, :k], whole[:, :k]).mean()) for k in KS[1:]}


def next_three(model: Any, data: Data, users: Sequence[int], beams: int) -> np.ndarray:
    """How many of each user's last three purchases are among the ten best items for the history before them: ``[B]``.

    The first of the three is in the training sequence, the others are the validation's and the test's.
    """
    purchases = [[*data.test[user].history, data.test[user].item] for user in users]
    found = retrieve(model, data, [items[:-3] for items in purchases], beams)
    recall = retrieval_metrics(found, torch.tensor([items[-3:] for items in purchases]), ks=(10,))["recall@10"]
    return (3 * recall).round().to(torch.uint8).numpy()


def _by_length(data: Data, histories: Sequence[list[int]], search: Callable[[Tensor], Tensor]) -> Tensor:
    """``search`` of every prompt, in batches of prompts of one length."""
    by_length: dict[int, list[int]] = {}
    for row, items in enumerate(histories):
        by_length.setdefault(min(len(items), HISTORY), []).append(row)
    found: dict[int, Tensor] = {}
    for rows in by_length.values():
        for at in range(0, len(rows), BATCH):
            batch = rows[at : at + BATCH]
            prompts = torch.tensor(data.prompts(histories[row] for row in batch))
            found.update(zip(batch, search(prompts), strict=True))
    return torch.stack([found[row] for row in range(len(histories))])
