"""A small Qwen3 that reads purchases as tokens, and its supervised training, for the demo and for the experiment of
:mod:`benchmarks.alignment`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: the model is made here
from transformers import Qwen3Config, Qwen3ForCausalLM

START = 0  # opens every sequence, and pads it
HISTORY = 10  # purchases that the model looks back on
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.01
WARM_UP = 0.05  # share of the steps

# Of the model, its inputs and the tokens that follow, both [B, T]; -1 is no token.
Loss = Callable[[Qwen3ForCausalLM, Tensor, Tensor], Tensor]


def make_model(
    vocab_size: int,
    longest: int,
    intermediate_size: int,
    seed: int,
    eos: int | None,
    hidden_size: int = 64,
    layers: int = 3,
) -> Qwen3ForCausalLM:
    """With random weights; ``longest`` is the most tokens of an item."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=hidden_size // 4,
            max_position_embeddings=1 + (HISTORY + 1) * longest,
            tie_word_embeddings=True,
            bos_token_id=START,
            pad_token_id=START,
            eos_token_id=eos,
        )
    )


class Training:
    """AdamW with a warm-up and a cosine over ``steps``."""

    def __init__(self, model: Qwen3ForCausalLM, steps: int, loss: Loss) -> None:
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate(step, steps, WARM_UP))

    def epoch(self, rows: list[np.ndarray], batch_size: int, rng: np.random.Generator) -> Iterator[tuple[Tensor, int]]:
        """Every token of every row is predicted from those before it: each batch's loss and number of tokens."""
        for batch in _batches(rows, batch_size, rng):
            ids = _pad_right([rows[row] for row in batch])
            targets = ids[:, 1:]
            loss = self.loss(self.model, ids[:, :-1].clamp(min=START), targets)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            yield loss.detach(), int((targets >= 0).sum())


def rate(step: int, steps: int, warm_up: float) -> float:
    """Linear warm-up, then half a cosine."""
    return min(1.0, (step + 1) / max(1.0, warm_up * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batches(rows: list[np.ndarray], batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of like length together, the batches in random order."""
    order = rng.permutation(len(rows))
    order = order[np.argsort([len(rows[row]) for row in order], kind="stable")]
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    return [batches[place] for place in rng.permutation(len(batches))]


def _pad_right(rows: list[np.ndarray]) -> Tensor:
    """Padding is -1. Under a causal mask nothing looks at it."""
    width = max(map(len, rows))
    return torch.from_numpy(np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows]))


def by_length(prompts: Sequence[list[int]], search: Callable[[Tensor], Tensor], batch_size: int) -> Tensor:
    """``search`` of every prompt, ``[B, T]`` at a time, in batches of prompts of one length; in their order."""
    rows: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(len(prompt), []).append(row)
    found: dict[int, Tensor] = {}
    for group in rows.values():
        for at in range(0, len(group), batch_size):
            batch = group[at : at + batch_size]
            found.update(zip(batch, search(torch.tensor([prompts[row] for row in batch])), strict=True))
    return torch.stack([found[row] for row in range(len(prompts))])
