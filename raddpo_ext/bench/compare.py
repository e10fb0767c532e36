"""Checks and times several ways to compute the same thing, in turns."""

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
    """This machine lacks something that a method needs; the message says what."""


class Mismatch(Exception):
    """A method's result differs from ours."""


def agree(result: Any, expected: Any) -> None:
    """Raise AssertionError unless these tuples of tensors are equal within :data:`TOLERANCE`."""
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
    """Several ways to compute the same thing.

    Attributes:
        name: what is computed, with its sizes.
        methods: calls by name, ours first; each returns its result.
        floors: calls that do only what no method can do without.
        steps: number of steps that a call computes; times are per step.
        agree: takes a method's result and ours; raises AssertionError unless they are equal.
        before: called before each call, untimed.
        note: printed beside the name.
        unavailable: methods that cannot run on this machine, and why.
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
        """Add the method that ``prepare`` returns, unless it raises :class:`Missing`."""
        try:
            self.methods[name] = prepare()
        except Missing as missing:
            self.unavailable[name] = str(missing)


def measure(
    comparison: Comparison, rounds: int, burst: float, device: torch.device | None = None
) -> dict[str, dict[str, float]]:
    """Compare the methods' results with ours, then time methods and floors in turns.

    A turn is a burst of ``burst`` seconds. Its first call is not counted unless it is the only one, because another
    method has used the caches before it. Slow methods have fewer turns.

    Returns:
        Per name the seconds of one step: ``median``, ``least`` and ``most`` of the bursts' medians, and ``cpu``, the
        median of the process's CPU time; and the number of ``calls``.

    Raises:
        Mismatch: a method's result differs from ours.
    """
    _check_same(comparison)
    # Methods take turns, so that a slow moment of the machine meets all of them.
    runs = comparison.methods | comparison.floors
    time_one = timed if device is None or device.type == "cpu" else _timed_on_gpu
    bursts: dict[str, list[list[Cost]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if sum(cost.wall for costs in bursts[name] for cost in costs) < ENOUGH:
                bursts[name].append(burst_of(run, burst, comparison.before, time_one))
    return {name: _summary(found, comparison.steps) for name, found in bursts.items()}


def _summary(bursts: list[list[Cost]], steps: int) -> dict[str, float]:
    """Medians over the bursts, per step."""
    wall = [median(cost.wall for cost in burst) / steps for burst in bursts]
    cpu = [median(cost.cpu for cost in burst) / steps for burst in bursts]
    calls = sum(map(len, bursts))
    return {"median": median(wall), "least": min(wall), "most": max(wall), "cpu": median(cpu), "calls": calls}


def _check_same(comparison: Comparison) -> None:
    """Compare the methods' results with ours. This is also the first call of each method, in which some compile."""
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
    """Time calls for at least ``seconds``.

    The first call is not counted, because another method has used the caches and the free memory before it. If one call
    takes ``seconds``, it is the only one and is counted.

    Args:
        run: the call.
        seconds: minimum duration of all calls together.
        before: called before each call, untimed.
        time_one: times a call; default :func:`timed`.
        calls: minimum number of calls.

    Returns:
        The cost of each counted call.
    """
    costs: list[Cost] = []
    total = 0.0
    while len(costs) < calls or total < seconds:
        before()
        costs.append((time_one or timed)(run))
        total += costs[-1].wall
    return costs[1:] or costs


def timed(run: Run) -> Cost:
    """Time a call on the CPU."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    wall = time.perf_counter() - wall
    return Cost(wall, time.process_time() - cpu)


def _timed_on_gpu(run: Run) -> Cost:
    """Time a call by events on the stream. Work of the host counts only while the GPU waits for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cpu = time.process_time()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return Cost(begin.elapsed_time(end) / 1e3, time.process_time() - cpu)
