"""How several ways to compute one thing are checked and timed beside one another."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[[], Any]
TOLERANCE = 1e-4  # relative error in the Euclidean norm
ENOUGH = 3.0  # seconds of one method in all its bursts


class Cost(NamedTuple):
    """Seconds of a call, or medians of several calls' seconds."""

    wall: float
    cpu: float  # of all threads of this process


class Missing(Exception):
    """Something that a method needs is not on this machine; the message says what."""


class Mismatch(Exception):
    """A method found something else than ours did."""


def agree(result: Any, expected: Any) -> None:
    """Raises AssertionError unless these tuples of tensors are equal within :data:`TOLERANCE`."""
    for place, (got, value) in enumerate(zip(result, expected, strict=True)):
        error = _norm(got - value) / max(_norm(value), 1e-30)
        require(error <= TOLERANCE, f"its result {place} is off by {error:.2g}")


def require(holds: bool, otherwise: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not holds:
        raise AssertionError(otherwise)


def _norm(values: Tensor) -> float:
    return float(values.detach().double().norm())


@dataclass
class Comparison:
    """Ways to compute one thing.

    Attributes:
        name: what is computed, with its sizes.
        methods: calls by name, ours first; each returns what it found.
        floors: calls that only do what no way can do without.
        steps: how many of the thing a call computes; times are of one.
        agree: takes a method's result and ours; raises AssertionError unless they are the same.
        before: runs before each call, untimed.
        note: said beside the name.
        unavailable: methods that cannot run here, and why.
    """

    name: str
    methods: dict[str, Run]
    floors: dict[str, Run]
    steps: int = 1
    agree: Callable[[Any, Any], None] = agree
    before: Run = lambda: None
    note: str = ""
    unavailable: dict[str, str] = field(default_factory=dict)

    def offer(self, name: str, prepare: Callable[[], Run]) -> None:
        """Adds the method that ``prepare`` returns unless it raises :class:`Missing`."""
        try:
            self.methods[name] = prepare()
        except Missing as missing:
            self.unavailable[name] = str(missing)


def measure(
    comparison: Comparison, rounds: int, burst: float, device: torch.device | None = None
) -> dict[str, dict[str, float]]:
    """Checks the methods against ours, then times methods and floors in turns.

    A turn is a burst of ``burst`` seconds whose first call is not counted, unless it is the only one: it meets the
    caches as another method left them. Slow methods have fewer turns.

    Returns:
        By name the seconds of one step: ``median`` over the bursts of their medians, ``least`` and ``most`` of these,
        ``cpu`` the same median of the process's CPU time; and the number of ``calls``.

    Raises:
        Mismatch: a method's result is not ours.
    """
    _check_same(comparison)
    runs = comparison.methods | comparison.floors
    time_one = timed if device is None or device.type == "cpu" else _timed_on_gpu
    bursts: dict[str, list[list[Cost]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if sum(cost.wall for costs in bursts[name] for cost in costs) < ENOUGH:
                bursts[name].append(burst_of(run, burst, comparison.before, time_one))
    return {name: _summary(found, comparison.steps) for name, found in bursts.items()}


def _summary(bursts: list[list[Cost]], steps: int) -> dict[str, float]:
    wall = [median(cost.wall for cost in burst) / steps for burst in bursts]
    cpu = [median(cost.cpu for cost in burst) / steps for burst in bursts]
    calls = sum(map(len, bursts))
    return {"median": median(wall), "least": min(wall), "most": max(wall), "cpu": median(cpu), "calls": calls}


def _check_same(comparison: Comparison) -> None:
    """Also the first call of each method, in which some compile."""
    (first, run), *others = comparison.methods.items()
    comparison.before()
    expected = run()
    for name, other in others:
        comparison.before()
        try:
            comparison.agree(other(), expected)
        except AssertionError as error:
            raise Mismatch(f"{comparison.name}: {name} differs from {first}: {error}") from None


def burst_of(
    run: Run,
    seconds: float,
    before: Run = lambda: None,
    time_one: Callable[[Run], Cost] | None = None,
    calls: int = 1,
) -> list[Cost]:
    """Of each call but the first, which meets caches and free memory as another method left them; of the only one where
    one takes so many seconds. There are ``calls`` at least. ``before`` runs before each, untimed; ``time_one`` times
    it, else :func:`timed`."""
    costs: list[Cost] = []
    total = 0.0
    while len(costs) < calls or total < seconds:
        before()
        costs.append((time_one or timed)(run))
        total += costs[-1].wall
    return costs[1:] or costs


def timed(run: Run) -> Cost:
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    wall = time.perf_counter() - wall
    return Cost(wall, time.process_time() - cpu)


def _timed_on_gpu(run: Run) -> Cost:
    """By events on the stream: what the host does meanwhile counts only where the GPU waits for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cpu = time.process_time()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return Cost(begin.elapsed_time(end) / 1e3, time.process_time() - cpu)
