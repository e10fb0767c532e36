"""A small Qwen3 that reads purchases as semantic IDs and is trained by plain cross-entropy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3ForCausalLM

import raddpo_ext as rx
from demo.sft import HISTORY, START, Training, make_model
from raddpo_ext.data.catalogue import Catalogue

BATCH = 32


class Tokens(NamedTuple):
    """Token 1 + code for level 0, the other levels after it; behind them the end token, where SIDs differ in length."""

    vocab: rx.SIDVocab
    of_item: list[np.ndarray]
    size: int  # token ids there are

    @classmethod
    def of(cls, catalogue: Catalogue) -> Tokens:
        end = 1 + sum(catalogue.sizes)
        vocab = rx.SIDVocab(catalogue.sizes, offset=1, eos=None if catalogue.lengths is None else end)
        rows = vocab.encode(catalogue.sids, catalogue.lengths).numpy()
        return cls(vocab, [row[row >= 0] for row in rows], end + 1)

    def prompt(self, items: list[int]) -> np.ndarray:
        """As ``rx.history_prompts`` makes it, but with the end tokens, which the model learns from these rows, too."""
        return np.concatenate([np.array([START]), *(self.of_item[item] for item in items)])

    def pad(self, histories: list[list[int]]) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``attention_mask`` ``[B, T]`` of the last ``HISTORY`` items, padded on the left."""
        prompts = [self.prompt(items[-HISTORY:]) for items in histories]
        width = max(map(len, prompts))
        rows = np.stack([np.pad(prompt, (width - len(prompt), 0), constant_values=-1) for prompt in prompts])
        ids = torch.from_numpy(rows)
        return ids.clamp(min=START), (ids >= 0).long()


def train(catalogue: Catalogue, tokens: Tokens, epochs: int, seed: int) -> tuple[Qwen3ForCausalLM, float]:
    """The trained model, a language model of shopping, and its mean loss (nats per token) over the last epoch."""
    rng = np.random.default_rng(seed)
    model = make_model(tokens.size, max(map(len, tokens.of_item)), 256, seed, tokens.vocab.eos)
    pieces = [items[at : at + HISTORY + 1] for items in catalogue.train for at in range(0, len(items), HISTORY)]
    rows = [tokens.prompt(piece) for piece in pieces]
    steps = epochs * math.ceil(len(rows) / BATCH)
    training = Training(model, steps, _cross_entropy)
    with tqdm(total=steps, desc="SFT", unit="step", disable=None) as bar:
        for epoch in range(epochs):
            losses = []
            for loss, _ in training.epoch(rows, BATCH, rng):
                losses.append(loss.item())
                bar.set_postfix_str(f"epoch {epoch + 1}/{epochs}, loss {losses[-1]:.2f}", refresh=False)
                bar.update()
    return model.eval(), float(np.mean(losses))


def _cross_entropy(model: Qwen3ForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    logits = model(ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def generate(model: Qwen3ForCausalLM, tokens: Tokens, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
    """New tokens of a beam search by transformers' own ``generate``, which knows nothing of the catalogue."""
    longest = max(map(len, tokens.of_item))
    rows = model.generate(
        ids, attention_mask=mask, do_sample=False, length_penalty=0.0, max_new_tokens=longest, **options
    )
    return rows[:, ids.shape[1] :]
