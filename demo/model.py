"""A small Qwen3 that reads purchases as semantic IDs and is trained by plain cross-entropy."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: the model is made here
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

import raddpo_ext as rx
from raddpo_ext.data.catalogue import Catalogue

START = 0  # opens every sequence, and pads it
HISTORY = 10  # purchases that the model looks back on
BATCH = 32
LEARNING_RATE = 2e-3
WARM_UP = 0.05  # share of the steps


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
        return np.concatenate([np.array([START]), *(self.of_item[item] for item in items)])

    def pad(self, histories: list[list[int]]) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``attention_mask`` ``[B, T]`` of the last ``HISTORY`` items, padded on the left."""
        prompts = [self.prompt(items[-HISTORY:]) for items in histories]
        width = max(map(len, prompts))
        rows = np.stack([np.pad(prompt, (width - len(prompt), 0), constant_values=-1) for prompt in prompts])
        ids = torch.from_numpy(rows)
        return ids.clamp(min=START), (ids >= 0).long()


def train(catalogue: Catalogue, tokens: Tokens, epochs: int, seed: int) -> tuple[Qwen3ForCausalLM, float]:
    """The trained model, in evaluation mode, and its mean loss (nats a token) over the last epoch.

    Every token of every purchase is predicted from those before it: a bare language model of shopping.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    longest = max(map(len, tokens.of_item))
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=tokens.size,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=1 + (HISTORY + 1) * longest,
            tie_word_embeddings=True,
            bos_token_id=START,
            pad_token_id=START,
            eos_token_id=tokens.vocab.eos,
        )
    )
    pieces = [items[at : at + HISTORY + 1] for items in catalogue.train for at in range(0, len(items), HISTORY)]
    rows = [tokens.prompt(piece) for piece in pieces]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = epochs * math.ceil(len(rows) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    with tqdm(total=steps, desc="SFT", unit="step", disable=None) as bar:
        for epoch in range(epochs):
            losses = []
            for batch in _batches(rows, rng):
                ids = _pad_right([rows[row] for row in batch])
                logits = model(ids[:, :-1].clamp(min=START), use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                bar.set_postfix_str(f"epoch {epoch + 1}/{epochs}, loss {losses[-1]:.2f}", refresh=False)
                bar.update()
    return model.eval(), float(np.mean(losses))


def generate(model: Qwen3ForCausalLM, tokens: Tokens, ids: Tensor, mask: Tensor, **options: object) -> Tensor:
    """New tokens of a beam search by transformers' own ``generate``, which knows nothing of the catalogue."""
    longest = max(map(len, tokens.of_item))
    rows = model.generate(
        ids, attention_mask=mask, do_sample=False, length_penalty=0.0, max_new_tokens=longest, **options
    )
    return rows[:, ids.shape[1] :]


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    return min(1.0, (step + 1) / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(rows: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of like length together, the batches in random order."""
    order = rng.permutation(len(rows))
    order = order[np.argsort([len(rows[row]) for row in order], kind="stable")]
    batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    return [batches[place] for place in rng.permutation(len(batches))]


def _pad_right(rows: list[np.ndarray]) -> Tensor:
    """Padding is -1. Under a causal mask nothing looks at it."""
    width = max(map(len, rows))
    return torch.from_numpy(np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows]))
