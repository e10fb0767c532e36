"""group_advantages' CUDA kernel, run on the CPU by a shim (cuda_on_cpu), under several orders of threads and blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cuda_on_cpu.shim import Shim
from support.group_cases import (
    CORES,
    Case,
    assert_advantages_close,
    build_groups,
    group_cases,
    group_options,
    name_of,
)
from support.operator_calls import Recorder

import raddpo_ext as rx
from raddpo_ext.policy import group_advantages

CORE = pytest.mark.parametrize("core", CORES, ids=name_of)
ORDERS = [(0, 0), (1, 1), (2, 3), (4, 5)]  # of threads, of blocks: ascending, descending, shuffled


def on_both(
    shim: Shim, case: Case, options: dict[str, Any], orders: list[tuple[int, int]]
) -> tuple[rx.Advantages, list[rx.Advantages]]:
    """The CPU kernel's result, and the CUDA kernel's under each order."""
    with Recorder() as recorder:
        expected = rx.group_advantages(case.rewards, case.sessions, **case.arguments(options))
    ((_, arguments),) = recorder.calls["raddpo::group_advantages"]
    found = []
    for order in orders:
        shim.set_order(*order)
        values, active, gates = shim.group_advantages(*arguments)
        found.append(rx.Advantages(values, active, gates if expected.gates is not None else None))
    return expected, found


@CORE
@settings(max_examples=10)
@given(st.data())
def test_matches_cpu(shim: Shim, core: dict[str, Any], data: st.DataObject) -> None:
    case = data.draw(group_cases((torch.float64, torch.float32)))
    order = data.draw(st.sampled_from(ORDERS))
    expected, (got,) = on_both(shim, case, data.draw(group_options(core)), [order])
    assert_advantages_close(got, expected)


@CORE
def test_order_does_not_matter(shim: Shim, core: dict[str, Any]) -> None:
    """More rows than threads, and groups of none and one: the same bits under every order."""
    case = build_groups([(2, 150), (0, 1), (0, 0), (1, 5), (3, 0)], 3, seed=5, few=False)
    options = core | {"weights": True}
    expected, found = on_both(shim, case, options, ORDERS)
    for got in found:
        assert_advantages_close(got, expected)
        assert got.values.tolist() == found[0].values.tolist()


def test_more_groups_than_blocks(shim: Shim) -> None:
    counts = [(0, 3)] * 9 + [(0, 0)] * 520 + [(1, 4)] * 5
    for core in (CORES[0], {"credit": "siblings"}, {"scale": "batch"}):
        expected, (got,) = on_both(shim, build_groups(counts, 2, seed=1), core, [(2, 3)])
        assert_advantages_close(got, expected)


def test_malformed_groups_are_empty(shim: Shim) -> None:
    """What the CPU would have refused, and a GPU cannot look at: no address outside of the tensors."""
    case = build_groups([(1, 4), (0, 3)], 2, seed=1, dtype=torch.float32)
    for offsets in ([0, 99, 8], [-5, 4, 8], [8, 0, 8]):
        with Recorder() as recorder:
            rx.group_advantages(case.rewards, case.sessions, credit="siblings")
        ((_, arguments),) = recorder.calls["raddpo::group_advantages"]
        a = group_advantages.Arguments(*arguments)._replace(offsets=torch.tensor(offsets))
        shim.group_advantages(*a)


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_infinite_rewards_are_not_finite_advantages(shim: Shim, bad: float) -> None:
    """Nothing raises on a GPU without ``check``, but nothing looks right either; other groups do not notice."""
    case = build_groups([(0, 4), (0, 4)], 2, seed=0, dtype=torch.float32)
    case.sessions.lengths[:] = 2
    case.rewards[:] = torch.arange(8.0)
    for core in [*CORES[:9:3], {"credit": "siblings"}]:
        expected, _ = on_both(shim, case, core, [])
        with Recorder() as recorder:
            rx.group_advantages(case.rewards, case.sessions, **case.arguments(core))
        ((_, arguments),) = recorder.calls["raddpo::group_advantages"]
        rewards = case.rewards.clone()
        rewards[1] = bad
        shim.set_order(0, 0)
        values, active, _ = shim.group_advantages(*group_advantages.Arguments(*arguments)._replace(rewards=rewards))
        assert active.tolist() == [True, True]
        assert not values[:4].isfinite().all()
        if core.get("scale") != "batch":
            torch.testing.assert_close(values[4:], expected.values[4:])
