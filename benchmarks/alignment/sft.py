"""The experiment's small Qwen3 and its supervised training, which a killed run takes up again at the last epoch."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: the model is made here
from transformers import Qwen3Config, Qwen3ForCausalLM

import raddpo_ext as rx
from benchmarks.alignment.data import HISTORY, START, Data, windows
from raddpo_ext._files import replacing

BATCH = 256
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.01
WARM_UP = 0.05  # share of the steps
EPOCHS = 15


def make_model(data: Data, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=data.vocab_size,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=1 + (HISTORY + 1) * data.levels,
            tie_word_embeddings=True,
            bos_token_id=START,
            pad_token_id=START,
            eos_token_id=None,
        )
    )


def train(data: Data, seed: int, path: Path, epochs: int = EPOCHS) -> dict[str, Any]:
    """Trains a language model of purchases, every token of every purchase predicted from those before it.

    ``path`` holds the run's state after each whole epoch, and is taken up where it is there.

    Returns:
        That state: ``model``, ``losses`` (nats a token) and ``seconds`` by epoch, and what training goes on from.
    """
    model = make_model(data, seed)
    rows = [data.sequence(items) for items in windows(data)]
    steps = math.ceil(len(rows) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, epochs * steps, WARM_UP))
    state: dict[str, Any] = {"losses": [], "seconds": []}
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    for epoch in range(len(state["losses"]), epochs):
        begin = time.perf_counter()
        losses = torch.zeros(2, dtype=torch.float64)
        for batch in _batches(rows, np.random.default_rng([seed, epoch])):
            ids = _pad_right([rows[row] for row in batch])
            targets = ids[:, 1:]
            count = (targets >= 0).sum()
            hidden = model.model(ids[:, :-1].clamp(min=START), use_cache=False).last_hidden_state
            loss = -rx.linear_token_logps(hidden, model.lm_head.weight, targets, ignore_index=-1).sum() / count
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses += torch.stack([loss.detach() * count, count])
        state = {
            "losses": [*state["losses"], float(losses[0] / losses[1])],
            "seconds": [*state["seconds"], round(time.perf_counter() - begin, 2)],
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        save(path, state)
        print(f"sft seed {seed} epoch {epoch + 1}/{epochs} loss {state['losses'][-1]:.4f}", flush=True)
    return state


def rate(step: int, steps: int, warm_up: float) -> float:
    """Linear warm-up, then half a cosine."""
    return min(1.0, (step + 1) / max(1.0, warm_up * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def save(path: Path, state: Any) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(state, file)


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
