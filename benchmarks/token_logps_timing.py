"""How one case of a loss is checked and timed in this process.

A problem has a ``case`` (with ``name`` and ``dtype``), ``leaves`` whose gradients are compared, ``reset()`` to be run
before each call and ``clear()`` before a checked one; a method is called with it once and returns the call to be timed,
which returns a value, or a value and a gradient.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.catalogues import Missing
from benchmarks.token_logps_cases import Case, Problem
from benchmarks.token_logps_peers import FLOORS, Method, Step

BURST = 0.05  # seconds
ENOUGH = 0.3  # seconds of one method in one process
LONG = 1.0  # a call of so many seconds is timed in the check
# Relative error of values and of each gradient, in the Euclidean norm.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@dataclass
class Checked:
    """The methods that can be had, each called once."""

    steps: dict[str, Step] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def check(problem: Problem, methods: Mapping[str, Method]) -> Checked:
    """Prepares and calls the methods; raises AssertionError if one's value or gradients are not those of the first."""
    checked = Checked()
    expected: dict[str, Tensor] = {}
    for name, method in methods.items():
        try:
            step = method(problem)
        except Missing as missing:
            checked.unavailable[name] = str(missing)
            continue
        results, checked.seconds[name], checked.peak_bytes[name] = _first_call(problem, step)
        checked.steps[name] = step
        if not expected:
            expected = {what: value.clone() for what, value in results.items()}
        elif name not in FLOORS:
            _check_same(problem.case, name, results, expected)
    problem.clear()
    return checked


def _first_call(problem: Problem, step: Step) -> tuple[dict[str, Tensor], float, int]:
    """Value and gradients, seconds, and the peak of the process's memory over what it held before."""
    problem.clear()
    report.reset_peak_memory()
    before, start = report.memory_status("VmRSS"), time.perf_counter()
    returned = step()
    seconds, peak = time.perf_counter() - start, report.memory_status("VmHWM") - before
    values = (returned,) if isinstance(returned, Tensor) else returned
    results = {what: value.detach() for what, value in zip(("value", "gradient"), values, strict=False)}
    return results | {f"gradient of {name}": leaf.grad for name, leaf in problem.leaves.items()}, seconds, peak


def _check_same(case: Case, name: str, results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for what, value in expected.items():
        error = float((results[what].float() - value.float()).norm() / value.float().norm())
        assert error <= TOLERANCE[case.dtype], f"{what} by {name} differs from ours by {error:.2g} in {case.name}"


def run_case(problem: Problem, methods: Mapping[str, Method], rounds: int) -> dict[str, Any]:
    """Median seconds a call and peak bytes by method."""
    checked = check(problem, methods)
    times = {name: [seconds] if seconds > LONG else [] for name, seconds in checked.seconds.items()}
    for _, (name, step) in product(range(rounds), checked.steps.items()):
        if sum(times[name]) < ENOUGH:
            times[name] += _burst(problem, step)
    problem.clear()
    seconds = {name: median(values) for name, values in times.items()}
    return {"seconds": seconds, "peak_bytes": checked.peak_bytes, "unavailable": checked.unavailable}


def _burst(problem: Problem, step: Step) -> list[float]:
    """Seconds of each call but the first; of the only one where one call takes that long."""
    times: list[float] = []
    while sum(times) < BURST:
        problem.reset()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times[1:] or times
