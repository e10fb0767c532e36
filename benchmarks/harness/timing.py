"""What a call costs on the CPU: wall time, CPU time and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.harness import report
from raddpo_ext._matmul import linear
from raddpo_ext.bench.compare import Cost, timed

Call = Callable[[], Any]


class Measured(NamedTuple):
    """A call's value, its cost, and the peak of the process's memory over what it held before."""

    value: Any
    cost: Cost
    peak_bytes: int


def take_turns(calls: Mapping[str, Call], rounds: int, before: Call = lambda: None) -> dict[str, list[Cost]]:
    """Each method's cost in each round."""
    costs: dict[str, list[Cost]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            before()
            costs[name].append(timed(call))
    return costs


def middle(costs: list[Cost]) -> Cost:
    return Cost(*map(median, zip(*costs, strict=True)))


def best_rate(*shapes: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of CPU time of the fastest bare product, by the faster library, the best of several calls.

    Args:
        shapes: rows, columns and the length of a sum of each product, whose result goes to memory that is there.
    """
    rates = []
    for rows, columns, inner in shapes:
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        call = partial(linear, left, right, out=out)
        rates.append(2 * rows * columns * inner / min(timed(call).cpu for _ in range(7)))
    return max(rates)


def measured(call: Call) -> Measured:
    """One call after unused memory was given back, so that its peak is its own."""
    value = None

    def keep() -> None:
        nonlocal value
        value = call()

    report.reset_peak_memory()
    held = report.memory_status("VmRSS")
    cost = timed(keep)
    return Measured(value, cost, report.memory_status("VmHWM") - held)


def methods_costs(methods: Mapping[str, Call], rounds: int, before: Call = lambda: None) -> dict[str, Any]:
    """By method: seconds, one per round, the median CPU time, and the peak of one call that is not timed."""
    peaks = {name: measured(run).peak_bytes for name, run in methods.items()}
    costs = take_turns(methods, rounds, before)
    return {
        "seconds": {name: [cost.wall for cost in found] for name, found in costs.items()},
        "cpu_seconds": {name: middle(found).cpu for name, found in costs.items()},
        "peak_bytes": peaks,
    }
