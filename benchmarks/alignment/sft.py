"""The experiment's small Qwen3 and its supervised training, which a killed run takes up again at the last epoch."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

import raddpo_ext as rx
from benchmarks.alignment.data import Data, windows
from benchmarks.alignment.records import save
from demo import sft
from demo.sft import START, Training

BATCH = 256
EPOCHS = 15


def make_model(data: Data, seed: int = 0) -> Qwen3ForCausalLM:
    return sft.make_model(data.vocab_size, data.levels, 176, seed, None)


def train(data: Data, seed: int, path: Path, epochs: int = EPOCHS) -> dict[str, Any]:
    """Trains a language model of purchases, every token of every purchase predicted from those before it.

    ``path`` holds the run's state after each whole epoch, and is taken up where it is there.

    Returns:
        That state: ``model``, ``losses`` (nats per token) and ``seconds`` by epoch, and what training goes on from.
    """
    model = make_model(data, seed)
    rows = [np.array(row) for row in rx.history_prompts(data.index, windows(data), bos_token_id=START)]
    training = Training(model, epochs * math.ceil(len(rows) / BATCH), _cross_entropy)
    state: dict[str, Any] = {"losses": [], "seconds": []}
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.schedule.load_state_dict(state["schedule"])
    for epoch in range(len(state["losses"]), epochs):
        begin = time.perf_counter()
        losses = torch.zeros(2, dtype=torch.float64)
        for loss, count in training.epoch(rows, BATCH, np.random.default_rng([seed, epoch])):
            losses += torch.stack([loss * count, torch.tensor(count)])
        state = {
            "losses": [*state["losses"], float(losses[0] / losses[1])],
            "seconds": [*state["seconds"], round(time.perf_counter() - begin, 2)],
            "model": model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "schedule": training.schedule.state_dict(),
        }
        save(path, state)
        print(f"sft seed {seed} epoch {epoch + 1}/{epochs} loss {state['losses'][-1]:.4f}", flush=True)
    return state


def _cross_entropy(model: Qwen3ForCausalLM, ids: Tensor, targets: Tensor) -> Tensor:
    hidden = model.model(ids, use_cache=False).last_hidden_state
    logps = rx.linear_token_logps(hidden, model.lm_head.weight, targets, ignore_index=-1)
    return -logps.sum() / (targets >= 0).sum()
