"""Random ragged sessions for hypothesis, the options of the session losses, and what both tests and benchmarks ask of
them. Shapes are drawn one by one and shrink; tokens and values come from a drawn seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import _C

from .instruction_sets import ISAS
from .tolerances import TOLERANCE

FIELDS = ("loss", "preference", "sft", "rewards", "margins", "accuracy")
# Equal in their lower 32 bits, two of them.
TOKENS = torch.tensor([5, 6, 5 + 2**32])
TENSORS = ("ref_logps", "pair_weights", "detach", "level_weights")
# How a positive meets its negatives: every combination. True stands for the case's own tensor.
CORES: list[dict[str, Any]] = [
    {**protection, "aggregation": aggregation, "weighting": weighting, "positives": positives}
    for protection, (positives, aggregation), weighting in product(
        [{"protect": "winner"}, {"protect": "positives"}, {"protect": "none"}, {"detach": True}],
        [
            ("winner", "negatives"),
            ("winner", "margins"),
            ("each", "negatives"),
            ("each", "margins"),
            ("pooled", "negatives"),
        ],
        ["loss", "reward"],
    )
]
Plan = list[tuple[list[int], list[int]]]  # rows of each session's positives and negatives


def name_of(core: dict[str, Any]) -> str:
    return "-".join("detach" if value is True else value for value in core.values())


@dataclass
class Case:
    """A batch with every tensor that the losses take; NaN and token -7 wherever a length forbids to read."""

    sessions: rx.SessionBatch
    logps: Tensor
    ref_logps: Tensor
    pair_weights: Tensor
    detach: Tensor
    level_weights: Tensor

    def arguments(self, options: dict[str, Any]) -> dict[str, Any]:
        """``options`` with this case's tensor for each ``True`` that stands for one."""
        return {k: getattr(self, k) if k in TENSORS and v is True else v for k, v in options.items()}

    def to(self, dtype: torch.dtype) -> Case:
        floats = ("logps", "ref_logps", "pair_weights", "level_weights")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in floats})

    @property
    def plan(self) -> Plan:
        """The sessions as they are."""
        offsets, positives = self.sessions.offsets.tolist(), self.sessions.num_positives.tolist()
        return [
            (list(range(first, first + count)), list(range(first + count, last)))
            for first, last, count in zip(offsets[:-1], offsets[1:], positives, strict=True)
        ]

    @property
    def sids(self) -> list[tuple[int, ...]]:
        rows = zip(self.sessions.tokens.tolist(), self.sessions.lengths.tolist(), strict=True)
        return [tuple(row[:length]) for row, length in rows]

    def pairs(self) -> dict[tuple[int, int], int]:
        """The number of each pair, by its rows."""
        return {pair: number for number, pair in enumerate(pair for rows in self.plan for pair in product(*rows))}

    def take(self, plan: Plan) -> Case:
        """The batch made of these rows, in this order, each pair with its weight."""
        rows = torch.tensor(rows_of(plan), dtype=torch.int64)
        number = self.pairs()
        pairs = torch.tensor([number[pair] for rows in plan for pair in product(*rows)], dtype=torch.int64)
        return replace(
            self,
            sessions=session_batch(self.sessions.tokens[rows], self.sessions.lengths[rows], plan),
            logps=self.logps[rows],
            ref_logps=self.ref_logps[rows],
            pair_weights=self.pair_weights[pairs],
            detach=self.detach[rows],
        )


def rows_of(plan: Plan) -> list[int]:
    return [row for positives, negatives in plan for row in positives + negatives]


def session_batch(tokens: Tensor, lengths: Tensor, plan: Plan) -> rx.SessionBatch:
    """Rows are taken as they lie; only the plan's counts matter."""
    sizes = torch.tensor([0] + [len(positives) + len(negatives) for positives, negatives in plan])
    return rx.SessionBatch(tokens, lengths, sizes.cumsum(0), torch.tensor([len(p) for p, _ in plan], dtype=torch.int64))


def build(counts: list[tuple[int, int]], levels: int, seed: int, dtype: torch.dtype = torch.float64) -> Case:
    """Sessions of (positives, negatives): SIDs that mostly continue a prefix of another of their session (often all of
    it), a third of them shorter than ``levels``, some empty; one pair weight in eight is 0."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def integer(end: int) -> int:
        return int(torch.randint(end, (), generator=generator))

    candidates = sum(map(sum, counts))
    tokens = TOKENS[torch.randint(len(TOKENS), (candidates, levels), generator=generator)]
    lengths = torch.full((candidates,), levels)
    plan: Plan = []
    row = 0
    for positives, negatives in counts:
        first = row
        plan.append((list(range(row, row + positives)), list(range(row + positives, row + positives + negatives))))
        for row in range(first, first + positives + negatives):
            if row > first and integer(4):
                other, shared = first + integer(row - first), integer(levels + 1)
                tokens[row, :shared] = tokens[other, :shared]
            if not integer(3):
                lengths[row] = integer(levels + 1)
        row = first + positives + negatives
    padding = torch.arange(levels) >= lengths[:, None]
    tokens[padding] = -7
    logps, ref_logps = (-4 * rand(candidates, levels) for _ in range(2))
    logps[padding] = ref_logps[padding] = math.nan
    pairs = sum(p * n for p, n in counts)
    weights = torch.where(rand(pairs) < 1 / 8, 0.0, 0.2 + rand(pairs))
    detach = rand(candidates, levels) < 0.4
    case = Case(session_batch(tokens, lengths, plan), logps, ref_logps, weights, detach, 2 * rand(levels))
    return case.to(dtype)


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,), most: int = 3) -> Case:
    positives = st.integers(0, 3)
    negatives = st.sampled_from([0, 1, 2, 3, 5, 17])
    counts = draw(st.lists(st.tuples(positives, negatives), max_size=most))
    return build(counts, draw(st.integers(1, 5)), draw(st.integers(0, 2**32)), draw(st.sampled_from(dtypes)))


@st.composite
def options(draw: st.DrawFn, **fixed: Any) -> dict[str, Any]:
    """Everything but what :data:`CORES` holds."""
    maybe = st.sampled_from([None, True])
    chosen: dict[str, Any] = {
        "beta": draw(st.sampled_from([0.1, 2.0, 5.0])),
        "gamma": draw(st.sampled_from([0.0, 0.7, -0.4])),
        "length_normalized": draw(st.booleans()),
        "label_smoothing": draw(st.sampled_from([0.0, 0.2])),
        "sft_weight": draw(st.sampled_from([0.0, 1.0, 0.3])),
        "ref_logps": draw(maybe),
        "pair_weights": draw(maybe),
        "level_weights": draw(maybe),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    } | fixed
    if chosen["reduction"] == "mean":
        counts = st.sampled_from([None, (3, 7.5), (torch.tensor(2.5), torch.tensor(4))])
        chosen["normalizer"] = draw(counts)
    return chosen


@st.composite
def settings_of_machine(draw: st.DrawFn) -> tuple[str, int]:
    """An instruction set of this CPU and a number of threads, for :func:`on`."""
    available = ISAS[: ISAS.index(_C.best_isa()) + 1]
    return draw(st.sampled_from(available[::-1])), draw(st.sampled_from([1, 2]))


@contextmanager
def on(machine: tuple[str, int]) -> Iterator[None]:
    isa, threads = _C.isa(), torch.get_num_threads()
    _C.set_isa(machine[0])
    torch.set_num_threads(machine[1])
    try:
        yield
    finally:
        _C.set_isa(isa)
        torch.set_num_threads(threads)


def run(
    function: Callable[..., Any], case: Case, options: dict[str, Any], parts: tuple[float, float, float] = (1, 0, 0)
) -> tuple[Any, Tensor]:
    """The result, and the gradient of ``loss, preference, sft`` times ``parts`` (and, of vectors, 1, 1.5, 2, ...)."""
    logps = case.logps.clone().requires_grad_()
    result = function(logps, case.sessions, **case.arguments(options))
    upstream = [
        part * (1 + 0.5 * torch.arange(value.numel(), dtype=value.dtype)).view(value.shape)
        for part, value in zip(parts, result[:3], strict=True)
    ]
    (gradient,) = torch.autograd.grad(result[:3], logps, upstream)
    return result, gradient


def scale_of(result: Any) -> float:
    return max([1.0, *result.rewards.abs().tolist()])


def assert_close(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    if got.dtype == torch.bool:
        assert torch.equal(got, expected)
        return
    rtol, atol = TOLERANCE["session_loss", got.dtype]
    torch.testing.assert_close(
        got.detach().double(), expected.detach().double(), rtol=rtol, atol=scale * atol, equal_nan=True
    )


def assert_totals_close(got: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """The means, as float32 log-probs give them, and their counts exactly."""
    assert got.dtype == torch.float64
    assert torch.equal(got[..., 1], expected[..., 1])
    means = [table[..., 0] / table[..., 1].clamp(min=1) for table in (got, expected)]
    # Whether a margin is above 0 may be a matter of rounding: who compares it, compares the accuracy.
    assert_close(*(torch.cat((values[..., :5], values[..., 6:]), -1).float() for values in means), scale)


def assert_results_close(got: Sequence[Tensor], expected: Sequence[Tensor], scale: float = 1.0) -> None:
    """The fields of two :class:`rx.SessionLossOutput`; a gradient may follow them."""
    at = rx.SessionLossOutput._fields.index("totals")
    for place, (value, other) in enumerate(zip(got, expected, strict=True)):
        (assert_totals_close if place == at else assert_close)(value, other, scale)


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    return shared


def detached(case: Case, protect: str, positives: str) -> Tensor:
    """The negatives' tokens that TLGD detaches in every use, bool ``[C, L]``; one rule per negative is needed, so not
    for ``positives="each"`` with ``protect="winner"``."""
    found = torch.zeros(case.logps.shape, dtype=torch.bool)
    for p_rows, n_rows in case.plan if protect != "none" else []:
        against = p_rows[:1] if (protect, positives) == ("winner", "winner") else p_rows
        for n in n_rows:
            found[n, : max((common_prefix(case.sids[p], case.sids[n]) for p in against), default=0)] = True
    return found
