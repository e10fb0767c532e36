"""The session losses' CUDA kernels, run on the CPU by a shim (cuda_on_cpu), under several orders of threads and blocks.
The public functions are called as they are; only their operators are exchanged for the kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cuda_on_cpu.shim import Shim
from support.session_cases import (
    CORES,
    Case,
    assert_close,
    assert_results_close,
    build,
    cases,
    name_of,
    options,
    run,
    scale_of,
)

import raddpo_ext as rx
from raddpo_ext import _autograd, reference

BOTH = (torch.float64, torch.float32)
CORE = pytest.mark.parametrize("core", CORES, ids=name_of)
ORDERS = [(0, 0), (1, 1), (2, 3), (4, 5)]  # of threads, of blocks: ascending, descending, shuffled


@contextmanager
def on_shim(shim: Shim, order: tuple[int, int] = (0, 0)) -> Iterator[None]:
    kernels: dict[Any, Callable[..., Any]] = {
        torch.ops.raddpo.session_loss.default: shim.session_loss,
        torch.ops.raddpo.session_loss_backward.default: shim.session_loss_backward,
    }
    shim.set_order(*order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_autograd, "below_autograd", lambda op, *arguments: kernels[op](*arguments))
        yield


def run_on_shim(
    shim: Shim,
    order: tuple[int, int],
    case: Case,
    arguments: dict[str, Any],
    parts: tuple[float, float, float] = (1, -0.7, 0.4),
) -> list[torch.Tensor]:
    with on_shim(shim, order):
        result, gradient = run(rx.rad_dpo_loss, case, arguments, parts)
    return [*result, gradient]


def assert_matches_cpu(shim: Shim, order: tuple[int, int], case: Case, arguments: dict[str, Any]) -> None:
    """The kernel's sums have another order, its exponentials are the CPU's own."""
    result, gradient = run(rx.rad_dpo_loss, case, arguments, (1, -0.7, 0.4))
    got = run_on_shim(shim, order, case, arguments)
    assert got[3].tolist() == result.rewards.tolist()
    assert got[4].tolist() == result.margins.tolist()
    assert got[5] == result.accuracy
    scale = max(1.0, arguments.get("beta", 2.0)) * max([1.0, *result.rewards[result.rewards.isfinite()].abs().tolist()])
    assert_results_close(got, [*result, gradient], scale)


@CORE
@settings(max_examples=8)
@given(cases(BOTH), options(), st.sampled_from(ORDERS))
def test_matches_cpu(
    shim: Shim, core: dict[str, Any], case: Case, chosen: dict[str, Any], order: tuple[int, int]
) -> None:
    assert_matches_cpu(shim, order, case, core | chosen)


@settings(max_examples=40)
@given(cases(), st.sampled_from(CORES), options(), st.sampled_from(ORDERS))
def test_equals_reference(
    shim: Shim, case: Case, core: dict[str, Any], chosen: dict[str, Any], order: tuple[int, int]
) -> None:
    expected, gradient = run(reference.rad_dpo_loss, case, core | chosen, (1, -0.7, 0.4))
    got = run_on_shim(shim, order, case, core | chosen)
    assert_results_close(got, (*expected, gradient), max(scale_of(expected), chosen["beta"]))


@pytest.mark.parametrize("core", CORES[::3], ids=name_of)
def test_order_does_not_matter(shim: Shim, core: dict[str, Any]) -> None:
    """More candidates than threads, more sessions than lanes: the same bits under every order."""
    for counts in ([(3, 300), (0, 2), (2, 40), (150, 2)], [(1 + s % 3, s % 7) for s in range(150)]):
        case = build(counts, 4, seed=5, dtype=torch.float32)
        arguments = core | {"pair_weights": True, "ref_logps": True}
        results = [run_on_shim(shim, order, case, arguments) for order in ORDERS]
        for result in results[1:]:
            assert [value.tolist() for value in result] == [value.tolist() for value in results[0]]
        assert_matches_cpu(shim, (2, 3), case, arguments)


def test_more_sessions_than_blocks(shim: Shim) -> None:
    case = build([(1, 1)] * 9 + [(0, 0)] * 4100 + [(2, 2)] * 5, 2, seed=1)
    for reduction in ("mean", "none"):
        assert_matches_cpu(shim, (2, 3), case, {"reduction": reduction})


@settings(max_examples=40)
@given(cases(BOTH), st.sampled_from(CORES), options(), st.integers(0, 2**32), st.sampled_from([1e4, math.inf]))
def test_extreme_values(
    shim: Shim, case: Case, core: dict[str, Any], chosen: dict[str, Any], seed: int, size: float
) -> None:
    factor = torch.rand(len(case.logps), 1, generator=torch.Generator().manual_seed(seed)) < 0.4
    case.logps *= torch.where(factor, size, 1.0).to(case.logps)
    *parts, _, gradient = run_on_shim(shim, (2, 3), case, core | chosen)  # totals may have infinities of both signs
    assert not any(value.isnan().any() for value in (*parts, gradient))
    assert_matches_cpu(shim, (4, 5), case, core | chosen)


def test_weights_of_any_size(shim: Shim) -> None:
    """Down to the least positive float32, up to the greatest, alone and together."""
    for weights in ([1e-45], [3e-42, 1e-38], [3e38, 3e38], [3e38, 1.0, 1e-45], [1e-30, 7e-31]):
        case = build([(1, len(weights))], 2, seed=3, dtype=torch.float32)
        case.sessions.lengths[:], case.sessions.tokens[:] = 2, torch.arange(2 + 2 * len(weights)).view(-1, 2)
        logps = -torch.arange(case.logps.numel(), dtype=torch.float32).view_as(case.logps) / 3
        case = replace(case, logps=logps, pair_weights=torch.tensor(weights))
        for aggregation in ("negatives", "margins"):
            arguments = {"pair_weights": True, "aggregation": aggregation}
            expected, gradient = run(reference.rad_dpo_loss, case.to(torch.float64), arguments, (1, 1, 1))
            result, cpu_gradient = run(rx.rad_dpo_loss, case, arguments, (1, 1, 1))
            for got in ([*result, cpu_gradient], run_on_shim(shim, (0, 0), case, arguments, (1, 1, 1))):
                assert_results_close(got, (*expected, gradient), 8)


@settings(max_examples=30)
@given(cases(BOTH), st.sampled_from(["mean", "sum", "none"]), st.sampled_from(ORDERS), st.booleans())
def test_multilabel(shim: Shim, case: Case, reduction: str, order: tuple[int, int], weigh: bool) -> None:
    arguments: dict[str, Any] = {"pair_weights": case.pair_weights} if weigh else {}
    found = []
    for context in (on_shim(shim, order), nullcontext()):
        scores = case.logps[:, 0].nan_to_num(1e30).requires_grad_()
        with context:
            loss = rx.multilabel_contrastive_loss(
                scores, case.sessions, reduction=reduction, temperature=0.7, **arguments
            )
            found.append((loss, *torch.autograd.grad(loss.sum(), scores)))
    for value, expected in zip(*found, strict=True):
        assert_close(value, expected, 6)


def test_no_gradient_is_computed_in_vain(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build([(1, 2)], 3, seed=2)
    asked = []
    kernel = shim.session_loss
    monkeypatch.setattr(shim, "session_loss", lambda *arguments: asked.append(arguments[-1]) or kernel(*arguments))
    with on_shim(shim):
        rx.rad_dpo_loss(case.logps, case.sessions)
        logps = case.logps.requires_grad_()
        with torch.no_grad():
            rx.rad_dpo_loss(logps, case.sessions)
            rx.multilabel_contrastive_loss(logps[:, 0], case.sessions)
        rx.rad_dpo_loss(logps, case.sessions)
        rx.multilabel_contrastive_loss(logps[:, 0], case.sessions)
    assert asked == [False, False, False, True, True]


def test_malformed_sessions(shim: Shim) -> None:
    """Values that no check has seen: sessions that fit no batch are empty, lengths are cut. Nothing else is touched."""
    case = build([(1, 2), (2, 2), (1, 1)], 3, seed=2)
    s = case.sessions
    wrong = {"offsets": [-3, 2**62], "num_positives": [-1, 2**62], "lengths": [-5, 2**62], "pair_offsets": [-1, 2**62]}
    for name, value in [(name, value) for name, values in wrong.items() for value in values]:
        kept = getattr(s, name).clone()
        getattr(s, name)[1] = value
        with on_shim(shim):
            for positives in ("winner", "each", "pooled"):
                rx.rad_dpo_loss(case.logps, s, positives=positives)
                rx.rad_dpo_loss(case.logps.requires_grad_(), s, positives=positives).loss.backward()
        getattr(s, name).copy_(kept)
