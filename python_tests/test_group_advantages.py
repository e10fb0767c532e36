"""group_advantages against the reference, against plain transcriptions of published formulas, and by hand."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.group_cases import (
    CORES,
    Case,
    assert_advantages_close,
    build_groups,
    group_cases,
    group_options,
    name_of,
)
from support.session_cases import on, settings_of_machine
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import _C, reference

CORE = pytest.mark.parametrize("core", CORES, ids=name_of)
BOTH = (torch.float64, torch.float32)


def groups_of(tokens: Any, sizes: list[int], experts: list[int] | None = None) -> rx.SessionBatch:
    tokens = torch.as_tensor(tokens)
    lengths = torch.full((len(tokens),), tokens.shape[1])
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return rx.SessionBatch(tokens, lengths, offsets, torch.tensor(experts or [0] * len(sizes)))


def rollouts(rewards: Tensor, size: int) -> rx.SessionBatch:
    """Groups of one size, of different SIDs."""
    return groups_of(torch.arange(len(rewards))[:, None], [size] * (len(rewards) // size))


@CORE
@settings(max_examples=30)
@given(st.data())
def test_equals_the_reference(core: dict[str, Any], data: st.DataObject) -> None:
    """On every instruction set and number of threads."""
    case, options = data.draw(group_cases(BOTH)), data.draw(group_options(core))
    expected = reference.group_advantages(case.rewards.double(), case.sessions, **case.arguments(options))
    with on(data.draw(settings_of_machine())):
        got = rx.group_advantages(case.rewards, case.sessions, **case.arguments(options))
    assert got.values.dtype == case.rewards.dtype
    assert_advantages_close(got, expected)


@CORE
def test_many_groups_on_two_threads(core: dict[str, Any]) -> None:
    """More than one piece of work, and a group that is larger than all scratch memory before it."""
    case = build_groups([(1, 15)] * 200 + [(2, 200)] + [(0, 1)] * 50, 4, seed=3)
    expected = reference.group_advantages(case.rewards, case.sessions, **case.arguments(core))
    for threads in (1, 2):
        with on((_C.isa(), threads)):
            got = rx.group_advantages(case.rewards, case.sessions, **case.arguments(core))
        assert_advantages_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("core", [CORES[0], {"credit": "siblings", "baseline": True, "blend": 0.5}], ids=name_of)
def test_half_precision(dtype: torch.dtype, core: dict[str, Any]) -> None:
    """Every float type of every tensor gives float32, computed from the values as they are."""
    case = build_groups([(1, 7), (0, 5)], 3, seed=1, dtype=dtype, few=False)
    got = rx.group_advantages(case.rewards, case.sessions, **case.arguments(core | {"weights": True}))
    assert got.values.dtype == torch.float32
    single = Case(case.sessions, *(t.float() for t in (case.rewards, case.weights, case.baseline)), None, None)  # type: ignore[arg-type]
    expected = reference.group_advantages(single.rewards, case.sessions, **single.arguments(core | {"weights": True}))
    assert_advantages_close(got, expected)


REWARDS = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [2, 4, 12])
def test_published_formulas(size: int) -> None:
    """GRPO, Dr. GRPO and RLOO as they are written for groups of one size."""
    groups, table = rollouts(REWARDS, size), REWARDS.view(-1, size)
    mean, std = table.mean(1, keepdim=True), table.std(1, keepdim=True)
    loo = size / (size - 1) * (table - mean)
    for options, expected in [
        ({}, (table - mean) / (std + 1e-6)),
        ({"eps": 0.01}, (table - mean) / (std + 0.01)),
        ({"scale": "none"}, table - mean),
        ({"scale": "none", "baseline": "loo"}, loo),
        ({"scale": "batch"}, (table - mean) / (REWARDS.std() + 1e-6)),
        ({"scale": "none", "baseline": mean[:, 0] / 2}, table - mean / 2),
    ]:
        got = rx.group_advantages(REWARDS, groups, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(got.values, expected.flatten(), rtol=1e-12, atol=1e-12)
        assert got.active.all()
        assert got.gates is None


def test_equal_weights_change_nothing() -> None:
    """Only the ratios of weights matter: they do not say how many rows a row stands for."""
    groups = rollouts(REWARDS, 6)
    for baseline in ("mean", "loo"):
        plain = rx.group_advantages(REWARDS, groups, baseline=baseline).values
        for weight in (1.0, 0.25, 1e-9, 1e9):
            weighted = rx.group_advantages(
                REWARDS, groups, baseline=baseline, weights=torch.full_like(REWARDS, weight)
            ).values
            torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tiny", [1e-9, 1e-20, 1e-60])
def test_a_weight_that_outweighs_the_others(tiny: float) -> None:
    """The mean is the heavy row's reward, but the mean of the others is not; nothing is lost to rounding."""
    groups = groups_of([[0], [1], [2]], [3])
    rewards, weights = torch.tensor([1.0, 0.0, 0.5]).double(), torch.tensor([1.0, tiny, tiny], dtype=torch.float64)
    loo = rx.group_advantages(rewards, groups, scale="none", baseline="loo", weights=weights).values
    torch.testing.assert_close(loo, torch.tensor([0.75, -1.0, -0.5]).double(), rtol=1e-7, atol=1e-7)
    # sum w c^2 / (W - sum w^2 / W) = tiny (1 + .25) / (4 tiny) to first order
    scaled = rx.group_advantages(rewards, groups, weights=weights, eps=1e-12).values
    torch.testing.assert_close(scaled[1], torch.tensor(-1 / math.sqrt(1.25 / 4)).double(), rtol=1e-7, atol=0)


def test_siblings_by_hand() -> None:
    """Rows 1-2-*, 1-3-* and 4-*: scores of the first tokens 1/2 and 0, of 2 and 3 after 1: 1 and 0."""
    groups = groups_of([[1, 2, 5], [1, 2, 6], [1, 3, 5], [1, 3, 5], [4, 2, 5]], [5])
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    got = rx.group_advantages(rewards, groups, credit="siblings", eps=1e-12)
    expected = [[1, 1, 0], [1, 1, 0], [1, -1, 0], [1, -1, 0], [-1, 0, 0]]
    assert got.values.tolist() == pytest.approx([pytest.approx(row) for row in expected])
    rewards[1] = 0.0  # now 5 and 6 after 1-2 differ, and 1-2 scores 1/2, 1 scores 1/4
    got = rx.group_advantages(rewards, groups, credit="siblings", eps=1e-12)
    expected = [[1, 1, 1], [1, 1, -1], [1, -1, 0], [1, -1, 0], [-1, 0, 0]]
    assert got.values.tolist() == pytest.approx([pytest.approx(row) for row in expected])


def test_rows_of_different_lengths_among_siblings() -> None:
    """A row that ends with a prefix is none of its children, but counts towards the prefix's own score."""
    tokens = torch.tensor([[1, 2], [1, 3], [1, -7], [4, 2]])
    lengths = torch.tensor([2, 2, 1, 2])
    groups = rx.SessionBatch(tokens, lengths, torch.tensor([0, 4]), torch.tensor([0]))
    got = rx.group_advantages(torch.tensor([0.0, 1.0, 2.0, 0.0]), groups, credit="siblings", eps=1e-12)
    assert got.values.tolist() == [[1, -1], [1, 1], [1, 0], [-1, 0]]


def test_marginal_by_hand() -> None:
    """Against the target 1-2-3: matches of 3, 2, 1, 0 and (elsewhere) 2 tokens."""
    tokens = [[1, 2, 3], [1, 2, 4], [1, 5, 4], [6, 5, 4], [6, 2, 3]]
    groups, targets = groups_of(tokens, [5]), groups_of([[1, 2, 3]], [1])
    rewards = torch.arange(5).double()
    got = rx.group_advantages(rewards, groups, credit="marginal", targets=targets, level_weights=[1, 2, 4])
    added = torch.tensor([[1.0, 2, 4], [1, 2, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]).double()
    expected = (added - added.mean(0)) / (added.std(0) + 1e-6)
    torch.testing.assert_close(got.values, expected, rtol=1e-12, atol=1e-12)
    assert got.gates is not None
    assert got.gates.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0.5], [1, 0, 0], [1, 0, 0]]

    got = rx.group_advantages(rewards, groups, credit="marginal", targets=targets, contiguous=False)
    added[4] = torch.tensor([0, 2, 4])
    added = added / torch.tensor([1, 2, 4])
    expected = (added - added.mean(0)) / (added.std(0) + 1e-6)
    torch.testing.assert_close(got.values, expected, rtol=1e-12, atol=1e-12)
    assert got.gates is not None
    assert got.gates.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0.5], [1, 0, 0], [1, 0, 0.5]]


def test_the_experts_are_the_default_targets() -> None:
    case = build_groups([(2, 9), (1, 4), (0, 5)], 3, seed=5)
    first = case.sessions.offsets[:-1]
    rows = torch.cat([torch.arange(f, f + n) for f, n in zip(first, case.sessions.num_positives, strict=True)])
    truth = rx.SessionBatch(
        case.sessions.tokens[rows],
        case.sessions.lengths[rows],
        torch.tensor([0, 2, 3, 3]),
        torch.zeros(3, dtype=torch.int64),
    )
    for contiguous in (True, False):
        options: dict[str, Any] = {"credit": "marginal", "contiguous": contiguous, "experts": "nll"}
        got = rx.group_advantages(case.rewards, case.sessions, **options)
        expected = rx.group_advantages(case.rewards, case.sessions, **options, targets=truth)
        assert got.values.tolist() == expected.values.tolist()
        assert got.gates is not None
        assert expected.gates is not None
        assert got.gates.tolist() == expected.gates.tolist()


def test_targets_of_another_length() -> None:
    tokens = [[1, 2, 3], [1, 4, 3]]
    for target, gates in [([[1]], [[1, 1, 0.5], [1, 1, 0.5]]), ([[1, 2, 3, 4]], [[1, 1, 1], [1, 1, 0.5]])]:
        got = rx.group_advantages(
            torch.tensor([1.0, 0.0]), groups_of(tokens, [2]), credit="marginal", targets=groups_of(target, [1])
        )
        assert got.gates is not None
        assert got.gates.tolist() == gates


def test_compiles() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    case = build_groups([(1, 7), (0, 5), (2, 0)], 3, seed=1, dtype=torch.float32)

    def run(rewards: Tensor, credit: str) -> tuple[Tensor, Tensor]:
        found = rx.group_advantages(rewards * 2, case.sessions, credit=credit)
        return found.values + 0, found.active

    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    for credit in ("sequence", "siblings", "marginal"):
        for got, expected in zip(compiled(case.rewards, credit), run(case.rewards, credit), strict=True):
            assert torch.equal(got, expected)


def test_has_no_gradient() -> None:
    rewards = REWARDS.clone().requires_grad_()
    assert not rx.group_advantages(rewards, rollouts(REWARDS, 4)).values.requires_grad
    with pytest.raises(NotImplementedError, match="group_advantages does not work within vmap"):
        torch.func.vmap(lambda r: rx.group_advantages(r, rollouts(REWARDS, 4)).values)(REWARDS.expand(2, -1))


def test_strided_rewards() -> None:
    groups = rollouts(REWARDS, 4)
    strided = torch.stack([REWARDS, -REWARDS], 1)[:, 0]
    assert torch.equal(rx.group_advantages(strided, groups).values, rx.group_advantages(REWARDS, groups).values)
