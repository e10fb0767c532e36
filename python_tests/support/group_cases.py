"""Random ragged groups with rewards for hypothesis, and the options of group_advantages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import raddpo_ext as rx

from .session_cases import Plan, build, rows_of, session_batch
from .tolerances import TOLERANCE

TENSORS = ("weights", "targets", "level_weights")
#: How rows are compared: every combination. True stands for the case's own tensor.
CORES: list[dict[str, Any]] = [
    *({"scale": s, "baseline": b} for s, b in product(["group", "batch", "none"], ["mean", "loo", True])),
    *({"credit": "siblings", "blend": blend} for blend in (1.0, 0.3, 0.0)),
    {"credit": "siblings", "blend": 0.5, "scale": "batch", "baseline": "loo"},
    *({"credit": "marginal", "contiguous": c, "targets": t} for c, t in product([True, False], [None, True])),
]


def name_of(core: dict[str, Any]) -> str:
    return "-".join("given" if value is True else str(value) for value in core.values())


@dataclass
class Case:
    """A batch with every tensor that group_advantages takes."""

    sessions: rx.SessionBatch
    rewards: Tensor
    weights: Tensor
    baseline: Tensor
    targets: rx.SessionBatch
    level_weights: Tensor

    def arguments(self, options: dict[str, Any]) -> dict[str, Any]:
        """``options`` with this case's value for each ``True`` that stands for one."""
        names = (*TENSORS, "baseline")
        return {k: getattr(self, k) if k in names and v is True else v for k, v in options.items()}

    @property
    def plan(self) -> Plan:
        offsets, positives = self.sessions.offsets.tolist(), self.sessions.num_positives.tolist()
        return [
            (list(range(first, first + count)), list(range(first + count, last)))
            for first, last, count in zip(offsets[:-1], offsets[1:], positives, strict=True)
        ]

    def take(self, plan: Plan, groups: list[int]) -> tuple[Case, Tensor]:
        """These rows of these groups, in this order, and the rows' numbers."""
        rows = torch.tensor(rows_of(plan), dtype=torch.int64)
        sessions = session_batch(self.sessions.tokens[rows], self.sessions.lengths[rows], plan)
        target_rows = [list(range(*self.targets.offsets[s : s + 2].tolist())) for s in groups]
        kept = torch.tensor([row for group in target_rows for row in group], dtype=torch.int64)
        targets = session_batch(
            self.targets.tokens[kept], self.targets.lengths[kept], [([], group) for group in target_rows]
        )
        chosen = torch.tensor(groups, dtype=torch.int64)
        taken = Case(
            sessions, self.rewards[rows], self.weights[rows], self.baseline[chosen], targets, self.level_weights
        )
        return taken, rows


def build_groups(
    counts: list[tuple[int, int]], levels: int, seed: int, dtype: torch.dtype = torch.float64, few: bool = True
) -> Case:
    """Groups of (experts, rollouts), some with equal SIDs and some empty; rewards of ``few`` different values or of
    many, NaN among them; one weight in eight is 0."""
    case = build(counts, levels, seed)
    generator = torch.Generator().manual_seed(seed)
    candidates = case.sessions.num_candidates

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rewards = torch.floor(3 * rand(candidates)) / 2 if few else 4 * rand(candidates) - 2
    rewards[rand(candidates) < 0.05] = math.nan
    weights = torch.where(rand(candidates) < 1 / 8, 0.0, 0.2 + rand(candidates))
    targets = build([(int(3 * rand(())), int(2 * rand(()))) for _ in counts], levels, seed + 1).sessions
    level_weights = torch.floor(5 * rand(levels)) / 4
    tensors = (rewards, weights, rand(len(counts)), level_weights)
    rewards, weights, baseline, level_weights = (tensor.to(dtype) for tensor in tensors)
    return Case(case.sessions, rewards, weights, baseline, targets, level_weights)


@st.composite
def group_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,), most: int = 4) -> Case:
    experts, rollouts = st.integers(0, 2), st.sampled_from([0, 1, 2, 3, 5, 17])
    counts = draw(st.lists(st.tuples(experts, rollouts), max_size=most))
    levels, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**32))
    return build_groups(counts, levels, seed, draw(st.sampled_from(dtypes)), draw(st.booleans()))


@st.composite
def group_options(draw: st.DrawFn, core: dict[str, Any]) -> dict[str, Any]:
    """What is left to choose beside one of :data:`CORES`."""
    maybe = st.sampled_from([None, True])
    chosen = {
        "weights": draw(maybe),
        "experts": draw(st.sampled_from(["group", "nll"])),
        "eps": draw(st.sampled_from([1e-6, 0.1])),
    }
    if core.get("credit") == "marginal":
        chosen["level_weights"] = draw(maybe)
    return core | chosen


def assert_advantages_close(got: rx.Advantages, expected: rx.Advantages) -> None:
    assert torch.equal(got.active, expected.active)
    assert (got.gates is None) == (expected.gates is None)
    assert got.values.shape == expected.values.shape
    dtype = got.values.dtype
    assert dtype == expected.values.dtype or expected.values.dtype == torch.float64
    rtol, atol = TOLERANCE["group_advantages", dtype]
    for value, other in [(got.values, expected.values), (got.gates, expected.gates)]:
        if value is not None and other is not None:
            torch.testing.assert_close(value.double(), other.double(), rtol=rtol, atol=atol)
