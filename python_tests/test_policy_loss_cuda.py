"""policy_loss' CUDA kernels, run on the CPU by a shim (cuda_on_cpu), under several orders of threads and blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cuda_on_cpu.shim import Shim
from support.operator_calls import Recorder
from support.policy_cases import (
    CORES,
    Case,
    assert_policy_close,
    build_policy,
    name_of,
    policy_cases,
    policy_options,
    run,
)
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext.policy import policy_loss_op as op

CORE = pytest.mark.parametrize("core", CORES, ids=name_of)
ORDERS = [(0, 0), (1, 1), (2, 3), (4, 5)]  # of threads, of blocks: ascending, descending, shuffled
EVERYTHING: dict[str, Any] = dict.fromkeys(("old_logps", "ref_logps", "weights", "gates", "level_weights"), True)
EVERYTHING |= {"kl_weight": 0.3, "nll_weight": 0.7, "protect": "positives"}
Found = tuple[rx.PolicyLossOutput, Tensor]


def calls(case: Case, options: dict[str, Any]) -> tuple[Found, op.Arguments, op.BackwardArguments]:
    """The CPU kernels' result and gradient, and what the operators were called with."""
    with Recorder() as recorder:
        expected = run(rx.policy_loss, case, options)
    ((_, forward),), ((_, backward),) = (
        recorder.calls[f"raddpo::{name}"] for name in ("policy_loss", "policy_loss_backward")
    )
    return expected, op.Arguments(*forward), op.BackwardArguments(*backward)


def on_cuda(shim: Shim, forward: op.Arguments, backward: op.BackwardArguments, order: tuple[int, int]) -> Found:
    shim.set_order(*order)
    results = shim.policy_loss(*forward)
    saved = {"gradient": results.gradient, "scales": results.scales, "counted": results.counted}
    output = rx.PolicyLossOutput._make(results[: len(rx.PolicyLossOutput._fields)])
    return output, shim.policy_loss_backward(*backward._replace(**saved))


@CORE
@settings(max_examples=10)
@given(st.data())
def test_matches_cpu(shim: Shim, core: dict[str, Any], data: st.DataObject) -> None:
    case = data.draw(policy_cases((torch.float64, torch.float32)))
    expected, forward, backward = calls(case, data.draw(policy_options(core)))
    assert_policy_close(on_cuda(shim, forward, backward, data.draw(st.sampled_from(ORDERS))), expected)


@pytest.mark.parametrize("core", CORES[:6], ids=name_of)
def test_order_does_not_matter(shim: Shim, core: dict[str, Any]) -> None:
    """More rows than lanes, and groups of none and one: the same bits under every order."""
    case = build_policy([(2, 70), (0, 1), (0, 0), (1, 5), (3, 0)], 3, seed=5)
    expected, forward, backward = calls(case, core | EVERYTHING)
    found = [on_cuda(shim, forward, backward, order) for order in ORDERS]
    for output, gradient in found:
        assert_policy_close((output, gradient), expected)
        assert torch.equal(gradient, found[0][1])
        assert all(torch.equal(x, y) for x, y in zip(output, found[0][0], strict=True))


def test_more_groups_than_blocks(shim: Shim) -> None:
    counts = [(1, 3)] * 5 + [(0, 0)] * 8200 + [(1, 4)] * 5
    expected, forward, backward = calls(build_policy(counts, 2, seed=1), EVERYTHING)
    assert_policy_close(on_cuda(shim, forward, backward, (2, 3)), expected)


def test_malformed_groups_are_empty(shim: Shim) -> None:
    """What the CPU would have refused, and a GPU cannot look at: no address outside of the tensors."""
    case = build_policy([(1, 4), (0, 3)], 2, seed=1, dtype=torch.float32)
    _, forward, backward = calls(case, EVERYTHING)
    for offsets in ([0, 99, 8], [-5, 4, 8], [8, 0, 8]):
        shim.policy_loss(*forward._replace(offsets=torch.tensor(offsets)))
        shim.policy_loss_backward(*backward._replace(offsets=torch.tensor(offsets)))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["advantages", "weights", "gates"])
def test_what_is_not_finite_is_no_finite_loss(shim: Shim, name: str, bad: float) -> None:
    """Nothing raises on a GPU without ``check``, but nothing looks right either."""
    case = build_policy([(0, 4), (0, 4)], 2, seed=0, dtype=torch.float32)
    case.sessions.lengths[:] = 2
    case.advantages[:] = torch.tensor([1.0, -1, 1, -1, 2, -2, 2, -2])
    case.logps.fill_(-1.0)
    case.gates.fill_(1.0)
    _, forward, _ = calls(case, {"weights": True, "gates": True})
    values = getattr(forward, name).clone()
    values[1] = bad
    shim.set_order(0, 0)
    assert not shim.policy_loss(*forward._replace(**{name: values})).loss.isfinite()
