"""Steps of RADDPOTrainer and of the ten lines of docs/training.md, a block of each in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback

import raddpo_ext as rx
from benchmarks.harness.timing import timed
from benchmarks.peers.packing_cases import Case, Problem
from raddpo_ext.integrations.transformers import RADDPOConfig, RADDPOTrainer, SessionCollator, session_states

LEARNING_RATE, MAX_GRAD_NORM = 1e-6, 1.0
BLOCK, UNCOUNTED = 5, 2  # steps of a turn, of which the first ones touch memory that the other has used
OTHERS = {"ten lines": False, "ten lines that clip": True}  # whether they clip gradients as the trainer does


def beside(other: str) -> str:
    """The name of the trainer that took turns with this loop."""
    return f"trainer beside {other}"


class Turns(TrainerCallback):
    """After each block of the trainer's steps, a block of the other's. What the trainer does between two steps is its
    time."""

    def __init__(self, other: Callable[[], Any]) -> None:
        self.other, self.begin = other, 0.0
        self.own: list[float] = []  # of this block's steps
        self.seconds: list[tuple[float, float]] = []  # of a step of the trainer and of the other, block by block

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.own.append(time.perf_counter() - self.begin)
        if len(self.own) == BLOCK:
            others = [timed(self.other).wall for _ in range(BLOCK)]
            self.seconds.append((median(self.own[UNCOUNTED:]), median(others[UNCOUNTED:])))
            self.own = []
        self.begin = time.perf_counter()


def seconds(case: Case, blocks: int) -> dict[str, list[float]]:
    """Of a step, block by block: of the trainer beside each of the other loops, and of this loop."""
    problem = Problem(case)
    rows = _rows(problem)
    found: dict[str, list[float]] = {}
    for name, clips in OTHERS.items():
        turns = Turns(_ten_lines(problem, rows, clips))
        with TemporaryDirectory() as folder:
            args = RADDPOConfig(
                output_dir=folder,
                max_steps=BLOCK * (1 + blocks),
                learning_rate=LEARNING_RATE,
                max_grad_norm=MAX_GRAD_NORM,
                per_device_train_batch_size=case.sessions,
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            )
            model = Problem(case).model
            trainer = RADDPOTrainer(
                model,
                args,
                train_dataset=rows,
                callbacks=[turns],
                optimizers=(_adamw(model), None),
                vocab=problem.vocab,
            )
            trainer.train()
        found[beside(name)], found[name] = map(list, zip(*turns.seconds[1:], strict=True))
    return found


def _rows(problem: Problem) -> list[dict[str, Any]]:
    """The sessions as a data set has them."""
    sessions, found = problem.sessions, []
    for i, prompt in enumerate(problem.prompts.tolist()):
        tokens = sessions.tokens[sessions.offsets[i] : sessions.offsets[i + 1]].tolist()
        count = int(sessions.num_positives[i])
        found.append({"prompt_ids": prompt, "positives": tokens[:count], "negatives": tokens[count:]})
    return found


def _adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def _ten_lines(problem: Problem, rows: list[dict[str, Any]], clips: bool) -> Callable[[], None]:
    """One step of the loop, on the problem's model."""
    model = problem.model.train()
    loss_fn = rx.RADDPOLoss(rx.SimilarityWeighting(), **rx.PRESETS["rad_dpo"])
    optimizer = _adamw(model)
    collate = SessionCollator(vocab=problem.vocab)
    loader = cycle(torch.utils.data.DataLoader(rows, batch_size=len(rows), collate_fn=collate))

    def step() -> None:
        packed = next(loader)["packed"].to(model.device)
        result = loss_fn(sessions=packed.sessions, **session_states(model, packed)._asdict())
        result.loss.backward()
        if clips:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        loss_fn.similarity_weighting.commit()

    return step
