"""Whole training steps: ours, plain torch over the same packed rows, and a row per candidate, on one CPU thread::

    python -m benchmarks.peers.compare_whole_steps
    python -m benchmarks.peers.compare_whole_steps --quick --cases V=8k

The model is a stock Qwen3 of transformers (hidden size 512, 4 layers, 8 heads of 64, 2 of them for keys and values,
intermediate size 1536), a batch has two sessions. A step is the forward and the backward pass with fresh gradients; the
optimizer is left out. The ways differ in one thing from one to the next (:mod:`benchmarks.peers.whole_steps`):

- ``replicated, all logits``: a row per candidate, with its own copy of the prompt; the head on every position.
- ``replicated``: the head on the positions that predict a code.
- ``packed, a row per token``: a row per session, as ``pack_sessions(layout="trie")`` makes it.
- ``packed``: the head on the distinct states. The plain torch loop to beat.
- ``ours, fresh``: log-probs and loss by our operators, in the loop of the README.
- ``ours``: the same with ``accumulate_grad=True`` in ``session_states`` and ``RADDPOLoss``, as the trainer has it.
- ``ours, use_onednn``, ``packed, use_onednn``: the model's layers by oneDNN (``rx.use_onednn``).
- ``packed, level``, ``ours, level``: log-probs over the level, another loss.

Case by case in fresh processes. All ways are first checked to give the same loss and gradients, those over the level
among themselves. Then they take turns; each timed call follows one that is not counted, because fresh memory is the
slower the longer it was not used; only a row per candidate has a single call per turn. A part is the CPU time of a step
that is cut between its stages, ``rest`` what the whole step takes over their sum. The floor is the operations of the
matrix products over the rate of the faster of two bare products, the head's and a layer's.

In cases with ``memory kept`` glibc keeps what is freed; otherwise it gives large buffers back to the kernel, and each
step touches them anew.

``trainer`` cases time ``RADDPOTrainer``, all of a step with AdamW, against the ten lines of docs/training.md on another
copy of the model, a block of steps each in turns. Step by step, the kernel would give what one frees to the other in
small pages, so that the trainer's huge pages were always fresh ones. ``ten lines that clip`` have a call of
``clip_grad_norm_`` more, as the trainer does by itself.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

from benchmarks.harness import cases as harness
from benchmarks.harness import report
from benchmarks.harness.timing import best_rate, middle
from benchmarks.peers import packing_cases, trainer_steps
from benchmarks.peers.packing_cases import HIDDEN, INTERMEDIATE, LEVELS
from benchmarks.peers.whole_steps import STAGES, WAYS, Steps, Way
from raddpo_ext.bench.compare import burst_of

MODULE = "benchmarks.peers.compare_whole_steps"
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}  # of the loss and, in the Euclidean norm, of all gradients together
MOST_LOGITS = 1 << 30  # bytes, of all positions; beyond it the way with all logits is left out
PARTS = ("ours", "packed", "ours, level", "packed, level")
LEVEL_PEERS = ("packed", "packed, level")  # with log-probs over the level
CALLS = 3  # of a packed way per turn, the first of them not counted


@dataclass(frozen=True)
class Case(packing_cases.Case):
    """A batch of two sessions."""

    sessions: int = 2
    trainer: bool = False
    keeps: bool = False  # whether the process keeps freed memory

    @property
    def name(self) -> str:
        parts = ["trainer"] if self.trainer else []
        parts += [f"V={self.vocab_size // 1000}k prompt={self.prompt} candidates={self.candidates} {self.dtype}"]
        parts += ["as many KV heads"] if self.kv_heads == packing_cases.HEADS else []
        parts += ["tied"] if self.tied else []
        parts += ["memory kept"] if self.keeps else []
        return " ".join(parts)

    @property
    def all_logits(self) -> int:
        """Bytes of the logits of every position of a row per candidate."""
        positions = self.sessions * self.candidates * (self.prompt + LEVELS)
        return positions * self.vocab_size * getattr(torch, self.dtype).itemsize


_BASE = Case(32_000, 128, 16)
CASES = [_BASE]
CASES += [replace(_BASE, vocab_size=size) for size in (8_000, 152_000)]
CASES += [replace(_BASE, prompt=prompt) for prompt in (32, 512)]
CASES += [replace(_BASE, candidates=count) for count in (4, 64)]
CASES += [replace(_BASE, kv_heads=packing_cases.HEADS), replace(_BASE, dtype="bfloat16")]
CASES += [replace(_BASE, vocab_size=152_000, dtype="bfloat16"), replace(_BASE, vocab_size=152_000, tied=True)]
CASES += [replace(_BASE, vocab_size=152_000, dtype=dtype, keeps=True) for dtype in ("float32", "bfloat16")]
CASES += [replace(_BASE, vocab_size=size, trainer=True) for size in (32_000, 152_000)]
CASES += [replace(_BASE, vocab_size=size, trainer=True, keeps=True) for size in (32_000, 152_000)]


def work(case: Case, rounds: int) -> dict[str, Any]:
    """One process's measurements."""
    if case.keeps:
        keep_freed_memory()
    if case.trainer:
        return {"seconds": trainer_steps.seconds(case, rounds)}
    steps = Steps(case)
    ways = {
        name: way for name, way in WAYS.items() if name != "replicated, all logits" or case.all_logits <= MOST_LOGITS
    }
    _check(steps, ways)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in PARTS}
    for _ in range(rounds):
        for name, way in ways.items():
            calls = 1 if way.layout == "replicated" else CALLS
            found = middle(burst_of(partial(steps.step, way), 0, steps.clear, calls=calls))
            seconds[name].append(found.wall)
            cpu[name].append(found.cpu)
            if name in PARTS:
                steps.clear()
                stages[name].append(steps.stages(way))
    return {
        "seconds": seconds,
        "cpu_seconds": {name: median(costs) for name, costs in cpu.items()},
        "stages": {
            name: {stage: median(one[stage] for one in found) for stage in STAGES} for name, found in stages.items()
        },
        "gflop": {name: {part: x / 1e9 for part, x in steps.flop(WAYS[name]).items()} for name in PARTS},
        "gflop_per_s": product_rate(steps) / 1e9,
    }


def keep_freed_memory() -> None:
    """As ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184`` in the environment does with glibc."""
    libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4
    if not libc.mallopt(mmap_max, 0) or not libc.mallopt(trim_threshold, -1):
        raise OSError("this C library has no mallopt that keeps freed memory")


def _check(steps: Steps, ways: dict[str, Way]) -> None:
    """All ways give the same loss and gradients, those over the level among themselves."""
    expected: dict[bool, Any] = {}
    for name, way in ways.items():
        steps.clear()
        loss, gradient = steps.step(way), steps.gradient()
        first, base = expected.setdefault(way.level, (loss, gradient))
        error = max(float((loss - first).abs() / first.abs()), float((gradient - base).norm() / base.norm()))
        assert error < TOLERANCE[steps.case.dtype], f"{name} differs by {error:.2g} in {steps.case.name}"


def product_rate(steps: Steps) -> float:
    """Operations per second of the faster of a layer's and the head's bare products."""
    inputs, packed = steps.rows("trie")
    assert packed is not None
    layer = (inputs["input_ids"].numel(), INTERMEDIATE, HIDDEN)
    head = (len(packed.distinct), steps.case.vocab_size, HIDDEN)
    return best_rate(layer, head, dtype=steps.model.dtype)


# Results.


def ratio(times: list[float], base: list[float]) -> dict[str, float]:
    """Of two methods' times, round by round."""
    by_round = [a / b for a, b in zip(times, base, strict=True)]
    return {"median": median(by_round), "least": min(by_round), "most": max(by_round)}


def summary(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of all processes, ratios within each round first."""
    seconds = {name: [x for run in runs for x in run["seconds"][name]] for name in runs[0]["seconds"]}
    found: dict[str, Any] = {"case": case.name}
    found["costs"] = {name: {"ms": 1e3 * median(times)} for name, times in seconds.items()}
    over = [("ours", name) for name in seconds if not name.endswith("level")]
    over += [("ours, level", name) for name in LEVEL_PEERS]
    if case.trainer:
        beside = {name: seconds[trainer_steps.beside(name)] for name in trainer_steps.OTHERS}
        found["ratios"] = {f"trainer / {name}": ratio(trainer, seconds[name]) for name, trainer in beside.items()}
        return found
    found["ratios"] = {f"{name} / {base}": ratio(seconds[name], seconds[base]) for base, name in over if name != base}
    for name, cost in found["costs"].items():
        cost["cpu_ms"] = 1e3 * median(run["cpu_seconds"][name] for run in runs)
    found["parts"] = {name: _parts(name, found, runs) for name in PARTS}
    return found | {"gflop": runs[0]["gflop"], "gflop_per_s": max(run["gflop_per_s"] for run in runs)}


def _parts(name: str, found: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, float]:
    """CPU ms by stage, and what the whole step takes beyond them."""
    parts = {stage: 1e3 * median(run["stages"][name][stage] for run in runs) for stage in STAGES}
    return parts | {"rest": found["costs"][name]["cpu_ms"] - sum(parts.values())}


def is_trainer(cell: dict[str, Any]) -> bool:
    return "parts" not in cell


def floor_ms(cell: dict[str, Any], way: str) -> float:
    """The way's matrix products at the best rate."""
    return 1e3 * sum(cell["gflop"][way].values()) / float(cell["gflop_per_s"])


def markdown(cells: list[dict[str, Any]]) -> str:
    """Times over ours, where a step's time goes, and the trainer."""
    steps, trainers = ([cell for cell in cells if is_trainer(cell) == which] for which in (False, True))
    tables = []
    if steps:
        others = [name for name in WAYS if name != "ours" and not name.endswith("level")]
        level = [f"{name} / ours, level" for name in LEVEL_PEERS]
        head = ["time over ours", "ours, ms", *others, "ours, level, ms", *level, "ours / its products", "level"]
        rows = [
            [
                cell["case"],
                f"{cell['costs']['ours']['ms']:.0f}",
                *(times(cell, f"{name} / ours") for name in others),
                f"{cell['costs']['ours, level']['ms']:.0f}",
                *(times(cell, name) for name in level),
                *(f"{cell['costs'][way]['ms'] / floor_ms(cell, way):.2f}x" for way in ("ours", "ours, level")),
            ]
            for cell in steps
        ]
        tables.append(report.markdown(head, rows))
    if trainers:
        rows = [[cell["case"], name, times(cell, name)] for cell in trainers for name in cell["ratios"]]
        tables.append(report.markdown(["a step with AdamW", "time of", "median (spread)"], rows))
    return "\n\n".join(tables)


def times(cell: dict[str, Any], name: str) -> str:
    if name not in cell["ratios"]:
        return "-"
    ratio = cell["ratios"][name]
    return f"{ratio['median']:.2f}x ({ratio['least']:.2f}-{ratio['most']:.2f})"


if __name__ == "__main__":
    harness.run(MODULE, __doc__, CASES, work=work, summary=summary, tables=markdown, processes=1)
