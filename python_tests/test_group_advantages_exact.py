"""What holds exactly: groups that teach nothing, rows that do not count, independence of order and of other groups."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.group_cases import CORES, build_groups, group_cases, group_options, name_of
from torch import Tensor

import raddpo_ext as rx

CORE = pytest.mark.parametrize("core", CORES, ids=name_of)
ALONE = pytest.mark.parametrize("core", [c for c in CORES if c.get("scale") != "batch"], ids=name_of)
NAN = math.nan


def bits(values: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in values + 0.0]  # -0 is 0


def group(size: int, experts: int = 0, levels: int = 2) -> rx.SessionBatch:
    """One group of SIDs that share their first token by twos."""
    tokens = torch.stack([torch.arange(size) // 2 + level * torch.arange(size) for level in range(levels)], 1)
    return rx.SessionBatch(tokens, torch.full((size,), levels), torch.tensor([0, size]), torch.tensor([experts]))


def of_one(core: dict[str, Any], rewards: Any, sessions: rx.SessionBatch, **options: Any) -> rx.Advantages:
    if core.get("baseline") is True:
        core = core | {"baseline": torch.tensor([0.3])}
    if core.get("targets") is True:
        core = core | {"targets": group(3, levels=sessions.tokens.shape[1])}
    return rx.group_advantages(torch.as_tensor(rewards), sessions, **core, **options)


@CORE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rewards", [[0.1] * 7, [1e30] * 5, [-3.0, -3.0], [0.0, -0.0, 0.0], [NAN, 0.1, 0.1], [NAN] * 3])
def test_equal_rewards_give_exact_zeros(core: dict[str, Any], dtype: torch.dtype, rewards: list[float]) -> None:
    got = of_one(core, torch.tensor(rewards, dtype=dtype), group(len(rewards)))
    assert got.active.tolist() == [False]
    assert not got.values.any()


@CORE
@pytest.mark.parametrize("step", [1e-13, 2.0**-52])
def test_rewards_that_hardly_differ_are_not_equal(core: dict[str, Any], step: float) -> None:
    """Never "the standard deviation is small"."""
    got = of_one(core, torch.tensor([1.0, 1.0, 1.0 + step], dtype=torch.float64), group(3), eps=1e-30)
    assert got.active.tolist() == [True]
    if core.get("credit", "sequence") == "sequence" and core.get("baseline") is not True:
        assert got.values[2] > 0 >= got.values[0]


@CORE
@pytest.mark.parametrize("size", [0, 1])
def test_groups_of_none_and_one(core: dict[str, Any], size: int) -> None:
    """A single row gets 0, not its reward."""
    got = of_one(core, torch.full((size,), 5.0), group(size))
    assert got.active.tolist() == [False]
    assert not got.values.any()
    assert len(got.values) == size


@CORE
def test_no_groups(core: dict[str, Any]) -> None:
    case = build_groups([], 3, seed=0)
    got = rx.group_advantages(case.rewards, case.sessions, **case.arguments(core))
    assert got.active.shape == (0,)
    assert got.values.shape[0] == 0


@CORE
@settings(max_examples=20)
@given(st.data())
def test_rows_that_do_not_count(core: dict[str, Any], data: st.DataObject) -> None:
    """NaN rewards, weights of 0, length 0, and experts under "nll": the batch without them gives the same bits."""
    case = data.draw(group_cases())
    options = data.draw(group_options(core)) | {"targets": True}
    if core.get("credit") != "marginal":
        del options["targets"]
    got = rx.group_advantages(case.rewards, case.sessions, **case.arguments(options))
    left_out = case.rewards.isnan() | (case.sessions.lengths == 0)
    if options["weights"]:
        left_out |= case.weights == 0
    if options["experts"] == "nll":
        left_out |= case.sessions.is_positive()
    assert not got.values[left_out].any()
    plan = [([i for i in p if not left_out[i]], [i for i in n if not left_out[i]]) for p, n in case.plan]
    taken, rows = case.take(plan, list(range(len(plan))))
    expected = rx.group_advantages(taken.rewards, taken.sessions, **taken.arguments(options))
    assert torch.equal(got.active, expected.active)
    assert bits(got.values[rows]) == bits(expected.values)


@CORE
@settings(max_examples=20)
@given(st.data())
def test_order_does_not_matter(core: dict[str, Any], data: st.DataObject) -> None:
    """Rows within their half of the group, and groups: the same bits."""
    case, options = data.draw(group_cases((torch.float64, torch.float32))), data.draw(group_options(core))
    options["weights"] = None
    groups = data.draw(st.permutations(range(len(case.plan))))
    plan = [tuple(data.draw(st.permutations(half)) for half in case.plan[s]) for s in groups]
    taken, rows = case.take(plan, groups)  # type: ignore[arg-type]
    got = rx.group_advantages(case.rewards, case.sessions, **case.arguments(options))
    moved = rx.group_advantages(taken.rewards, taken.sessions, **taken.arguments(options))
    assert got.active[groups].tolist() == moved.active.tolist()
    assert bits(moved.values) == bits(got.values[rows])


@ALONE
@settings(max_examples=20)
@given(st.data())
def test_other_groups_do_not_matter(core: dict[str, Any], data: st.DataObject) -> None:
    case, options = data.draw(group_cases()), data.draw(group_options(core))
    got = rx.group_advantages(case.rewards, case.sessions, **case.arguments(options))
    for s, rows_of_group in enumerate(case.plan):
        taken, rows = case.take([rows_of_group], [s])
        alone = rx.group_advantages(taken.rewards, taken.sessions, **taken.arguments(options))
        assert alone.active.tolist() == [bool(got.active[s])]
        assert bits(alone.values) == bits(got.values[rows])


def test_the_batch_is_one_scale() -> None:
    """Under "batch", and only there, a group's advantages depend on another group's rewards."""
    sessions = rx.SessionBatch(
        torch.arange(8)[:, None], torch.ones(8).long(), torch.tensor([0, 4, 8]), torch.zeros(2).long()
    )
    rewards = torch.arange(8).double()
    wider = torch.cat([rewards[:4], 10 * rewards[4:]])
    before, after = (rx.group_advantages(r, sessions, scale="batch").values for r in (rewards, wider))
    assert (after[:4].abs() < before[:4].abs()).all()


@pytest.mark.parametrize("experts", ["group", "nll"])
def test_experts(experts: str) -> None:
    """In the group's statistics, or out of them with an advantage of 0."""
    got = rx.group_advantages(torch.tensor([1.0, 0.0, 0.5]), group(3, experts=1), scale="none", experts=experts)
    assert got.values.tolist() == ([0.5, -0.5, 0] if experts == "group" else [0, -0.25, 0.25])
    alike = rx.group_advantages(torch.tensor([1.0, 0.0, 0.0]), group(3, experts=1), experts=experts)
    assert alike.active.tolist() == [experts == "group"]


def test_padding_is_not_read() -> None:
    """Tokens beyond the lengths decide nothing, and their advantages and gates are 0."""
    case = build_groups([(1, 9), (0, 5)], 4, seed=7)
    other = case.sessions.tokens.clone()
    other[~case.sessions.mask()] = 5
    sessions = rx.SessionBatch(other, case.sessions.lengths, case.sessions.offsets, case.sessions.num_positives)
    for credit in ("siblings", "marginal"):
        got = rx.group_advantages(case.rewards, case.sessions, credit=credit)
        assert torch.equal(rx.group_advantages(case.rewards, sessions, credit=credit).values, got.values)
        assert not got.values[~case.sessions.mask()].any()
        assert got.gates is None or not got.gates[~case.sessions.mask()].any()


@CORE
@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e70])
def test_rewards_of_any_size_are_finite(core: dict[str, Any], scale: float) -> None:
    rewards = scale * torch.tensor([1.0, -1.0, 0.5, 1.0, 0.25], dtype=torch.float64)
    assert of_one(core, rewards, group(5)).values.isfinite().all()


SESSIONS = group(4)
GOOD = torch.tensor([1.0, 0.0, 2.0, 3.0])
MESSAGES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rewards": [1.0] * 4}, TypeError, "rewards must be a float32, bfloat16, float16 or float64 tensor, got list"),
    ({"rewards": GOOD.long()}, TypeError, "rewards must be a float32, bfloat16, float16 or float64 tensor, got torch"),
    ({"rewards": GOOD[:3]}, ValueError, "rewards must have shape (4,), got (3,)"),
    ({"rewards": GOOD[:, None]}, ValueError, "rewards must have shape (4,), got (4, 1)"),
    ({"rewards": GOOD.to("meta")}, ValueError, "rewards must be on the device of sessions, cpu, got meta"),
    ({"rewards": torch.tensor([0.0, 1.0, math.inf, 1.0])}, ValueError, "rewards[2] must be NaN or at most 1e+75"),
    ({"rewards": torch.tensor([0.0, -math.inf, 0.0, 1.0])}, ValueError, "got -inf"),
    ({"rewards": 1e80 * GOOD.double()}, ValueError, "rewards[0] must be NaN or at most 1e+75 in size, got 1e+80"),
    ({"sessions": GOOD}, TypeError, "sessions must be a SessionBatch, got Tensor"),
    ({"credit": "token"}, ValueError, "credit must be one of 'sequence', 'siblings', 'marginal', got 'token'"),
    ({"scale": "std"}, ValueError, "scale must be one of 'group', 'batch', 'none', got 'std'"),
    ({"scale": None}, ValueError, "scale must be one of 'group', 'batch', 'none', got None"),
    ({"scale": "none", "credit": "marginal"}, ValueError, "scale must be 'group' with credit='marginal', got 'none'"),
    ({"baseline": "median"}, ValueError, "baseline must be one of 'mean', 'loo', got 'median'"),
    ({"baseline": "loo", "credit": "marginal"}, ValueError, "baseline must be 'mean' with credit='marginal'"),
    ({"baseline": torch.zeros(1), "credit": "marginal"}, ValueError, "baseline must be 'mean' with credit='marginal'"),
    ({"baseline": torch.zeros(2)}, ValueError, "baseline must have shape (1,), got (2,)"),
    ({"baseline": torch.zeros(1).long()}, TypeError, "baseline must be a float32, bfloat16, float16 or float64 tensor"),
    ({"baseline": torch.tensor([NAN])}, ValueError, "baseline[0] must be finite, got nan"),
    ({"weights": torch.ones(3)}, ValueError, "weights must have shape (4,), got (3,)"),
    ({"weights": [1.0] * 4}, TypeError, "weights must be a float32, bfloat16, float16 or float64 tensor, got list"),
    ({"weights": torch.ones(4, device="meta")}, ValueError, "weights must be on cpu, got meta"),
    ({"weights": torch.tensor([1.0, -1.0, 1.0, 1.0])}, ValueError, "weights[1] must be finite and at least 0, got -1"),
    ({"weights": torch.tensor([1.0, 1.0, NAN, 1.0])}, ValueError, "weights[2] must be finite and at least 0, got nan"),
    ({"weights": torch.tensor([1e80] * 4).double()}, ValueError, "weights[0] must be"),
    ({"experts": "all"}, ValueError, "experts must be one of 'group', 'nll', got 'all'"),
    ({"targets": SESSIONS}, ValueError, "targets must be None with credit='sequence'"),
    ({"targets": GOOD, "credit": "marginal"}, TypeError, "targets must be a SessionBatch, got Tensor"),
    (
        {"targets": build_groups([(1, 0), (1, 0)], 2, 0).sessions, "credit": "marginal"},
        ValueError,
        "targets must have one session per group (1), got 2",
    ),
    ({"targets": SESSIONS.to("meta"), "credit": "marginal"}, ValueError, "targets must be on the device of sessions"),
    ({"level_weights": [1.0, 1.0]}, ValueError, "level_weights must be None with credit='sequence'"),
    ({"level_weights": [1.0], "credit": "marginal"}, ValueError, "level_weights must have shape (2,), got (1,)"),
    ({"level_weights": [1.0, -1.0], "credit": "marginal"}, ValueError, "level_weights[1] must be at least 0, got -1"),
    ({"contiguous": 1}, TypeError, "contiguous must be a bool, got int"),
    ({"blend": 0.5}, ValueError, "blend must be 1 with credit='sequence': only credit='siblings' takes it, got 0.5"),
    ({"blend": 1.5, "credit": "siblings"}, ValueError, "blend must be in [0, 1], got 1.5"),
    ({"blend": "half", "credit": "siblings"}, TypeError, "blend must be a number, got 'half'"),
    ({"eps": 0}, ValueError, "eps must be positive, got 0"),
]


@pytest.mark.parametrize(("changed", "error", "message"), MESSAGES)
def test_refuses(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rx.group_advantages(**({"rewards": GOOD, "sessions": SESSIONS} | changed))


def test_an_infinite_reward_of_a_row_that_does_not_count_is_refused() -> None:
    """It is no reward, whoever has it."""
    sessions = rx.SessionBatch(SESSIONS.tokens, torch.tensor([2, 2, 0, 2]), SESSIONS.offsets, SESSIONS.num_positives)
    with pytest.raises(ValueError, match=re.escape("rewards[2] must be")):
        rx.group_advantages(torch.tensor([0.0, 1.0, math.inf, 1.0]), sessions)
