"""How one case of a loss is checked and timed in this process.

A problem has a ``case`` (with ``name`` and ``dtype``), ``leaves`` whose gradients are compared, ``reset()`` to be run
before each call and ``clear()`` before a checked one; a method is called with it once and returns the call to be timed,
which returns a value, or a value and a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.timing import Measured, measured, middle
from raddpo_ext.bench.compare import Cost, Missing, burst_of
from raddpo_ext.bench.token_logps_cases import Case, Problem, Step
from raddpo_ext.bench.token_logps_peers import FLOORS, Method

BURST = 0.05  # seconds
ENOUGH = 0.3  # seconds of one method in one process,
LEAST = 3  # in so many calls at least
LONG = 4.0  # a call of so many seconds is timed in the check only
# Relative error of values and of each gradient, in the Euclidean norm.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@dataclass
class Checked:
    """The methods that can be had, each called once."""

    steps: dict[str, Step] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
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
        problem.clear()
        first = measured(step)
        results = _results(problem, first)
        checked.costs[name], checked.peak_bytes[name] = first.cost, first.peak_bytes
        checked.steps[name] = step
        if not expected:
            expected = {what: value.clone() for what, value in results.items()}
        elif name not in FLOORS:
            _check_same(problem.case, name, results, expected)
    problem.clear()
    return checked


def _results(problem: Problem, first: Measured) -> dict[str, Tensor]:
    """Value and gradients."""
    values = (first.value,) if isinstance(first.value, Tensor) else first.value
    results = {what: value.detach() for what, value in zip(("value", "gradient"), values, strict=False)}
    return results | {f"gradient of {name}": leaf.grad for name, leaf in problem.leaves.items()}


def _check_same(case: Case, name: str, results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for what, value in expected.items():
        error = float((results[what].float() - value.float()).norm() / value.float().norm())
        assert error <= TOLERANCE[case.dtype], f"{what} by {name} differs from ours by {error:.2g} in {case.name}"


def run_case(problem: Problem, methods: Mapping[str, Method], rounds: int) -> dict[str, Any]:
    """Median seconds per call, the wall's and the CPU's, and peak bytes by method."""
    checked = check(problem, methods)
    long = {name: [cost] for name, cost in checked.costs.items() if cost.wall > LONG}
    costs: dict[str, list[Cost]] = {name: long.get(name, []) for name in checked.steps}
    for _, (name, step) in product(range(rounds), checked.steps.items()):
        if name not in long and (len(costs[name]) < LEAST or sum(cost.wall for cost in costs[name]) < ENOUGH):
            costs[name] += burst_of(step, BURST, problem.reset, calls=2)
    problem.clear()
    found = {name: middle(values) for name, values in costs.items()}
    return {
        "seconds": {name: cost.wall for name, cost in found.items()},
        "cpu_seconds": {name: cost.cpu for name, cost in found.items()},
        "peak_bytes": checked.peak_bytes,
        "unavailable": checked.unavailable,
    }
