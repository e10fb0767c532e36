"""The session losses against the plain reference, against formulas written out, and what they must leave unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.session_cases import (
    CORES,
    FIELDS,
    Case,
    Plan,
    assert_close,
    assert_results_close,
    assert_totals_close,
    build,
    cases,
    detached,
    name_of,
    on,
    options,
    rows_of,
    run,
    scale_of,
    settings_of_machine,
)
from support.tolerances import TOLERANCE
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference

CORE = pytest.mark.parametrize("core", CORES, ids=name_of)
BOTH = (torch.float64, torch.float32)


@CORE
@settings(max_examples=8)
@given(cases(BOTH), options(), settings_of_machine())
def test_equals_reference(core: dict[str, Any], case: Case, chosen: dict[str, Any], machine: tuple[str, int]) -> None:
    arguments = core | chosen
    with on(machine):
        got, gradient = run(rx.rad_dpo_loss, case, arguments, (1, -0.7, 0.4))
    expected, expected_gradient = run(reference.rad_dpo_loss, case.to(torch.float64), arguments, (1, -0.7, 0.4))
    scale = max(scale_of(expected), chosen["beta"])
    assert got._fields == (*FIELDS, "kept", "totals")
    assert_close(got.kept, expected.kept)
    assert_totals_close(got.totals, expected.totals, scale)
    for name in FIELDS[:-1]:
        value = getattr(got, name)
        assert value.dtype == case.logps.dtype
        assert value.requires_grad == (name in FIELDS[:3])
        assert_close(value, getattr(expected, name), scale)
    near = expected.margins.abs() < scale * TOLERANCE["session_loss", case.logps.dtype].atol
    if not (near & (expected.margins != 0)).any():  # else a margin's sign is a matter of rounding
        assert_close(got.accuracy, expected.accuracy)
    assert_close(gradient, expected_gradient, scale)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("core", CORES[::7], ids=name_of)
def test_long_sessions(core: dict[str, Any], dtype: torch.dtype) -> None:
    """Many negatives, many positives, many tokens."""
    for counts, levels in [([(2, 700), (0, 3), (1, 65)], 3), ([(20, 9), (1, 31)], 40)]:
        case = build(counts, levels, seed=9, dtype=dtype)
        arguments = core | {"pair_weights": True, "ref_logps": True, "reduction": "none"}
        got, gradient = run(rx.rad_dpo_loss, case, arguments, (1, 1, 0))
        expected, expected_gradient = run(reference.rad_dpo_loss, case.to(torch.float64), arguments, (1, 1, 0))
        assert_results_close((*got, gradient), (*expected, expected_gradient), 4 * scale_of(expected))


@settings(max_examples=60)
@given(
    cases(BOTH),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from(["mean", "sum", "none"]),
    st.booleans(),
    st.booleans(),
    settings_of_machine(),
)
def test_multilabel_equals_reference(
    case: Case, temperature: float, reduction: str, weigh: bool, normalize: bool, machine: tuple[str, int]
) -> None:
    arguments: dict[str, Any] = {"temperature": temperature, "reduction": reduction}
    arguments |= {"normalizer": 2.5} if normalize and reduction == "mean" else {}
    found = []
    for function, kind in [(rx, case.logps.dtype), (reference, torch.float64)]:
        scores = case.logps[:, 0].nan_to_num(1e30).to(kind).requires_grad_()
        weights = {"pair_weights": case.pair_weights.to(kind)} if weigh else {}
        with on(machine):
            loss = function.multilabel_contrastive_loss(scores, case.sessions, **arguments, **weights)
        upstream = torch.linspace(1, 2, loss.numel(), dtype=kind).view(loss.shape)
        found.append((loss, *torch.autograd.grad(loss, scores, upstream)))
    for value, expected in zip(*found, strict=True):
        assert_close(value, expected, 4 / temperature)


def gradcheck(function: Any, case: Case, free: Tensor) -> None:
    """Numerically, in the entries ``free``. A detached token is held constant: it is not among them."""

    def of_entries(entries: Tensor) -> Any:
        return function(case.logps.masked_scatter(free, entries))

    entries = case.logps[free].requires_grad_()
    assert torch.autograd.gradcheck(of_entries, entries, atol=1e-6, rtol=1e-5)


EXTRAS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "beta": 0.8, "gamma": 0.5, "length_normalized": False, "label_smoothing": 0.2},
    {"reduction": "none", "ref_logps": True, "pair_weights": True, "level_weights": True, "sft_weight": 0.4},
    {"normalizer": (1.5, 20), "pair_weights": True, "label_smoothing": 0.1, "gamma": -0.3},
]


@CORE
def test_gradcheck(core: dict[str, Any]) -> None:
    """TLGD's gradient is that of a function whose detached tokens are constants. Where each negative has one detached
    prefix, these are simply not varied; ``each`` with ``winner`` has one per positive and is checked as the mean of
    its winners, below."""
    if (core.get("protect"), core["positives"]) == ("winner", "each"):
        core = core | {"protect": "positives"}
    case = build([(2, 4), (1, 3), (0, 2), (3, 0)], 3, seed=2)
    fixed = case.detach if "detach" in core else detached(case, core["protect"], core["positives"])
    parts = ("preference",) if "detach" in core else FIELDS[:3]  # the SFT term ignores the mask
    for extra in EXTRAS:

        def losses(logps: Tensor, arguments: dict[str, Any] = core | extra) -> tuple[Tensor, ...]:
            result = rx.rad_dpo_loss(logps, case.sessions, **case.arguments(arguments))
            return tuple(getattr(result, name) for name in parts)

        gradcheck(losses, case, case.sessions.mask() & ~fixed)


def test_multilabel_gradcheck() -> None:
    case = build([(2, 4), (1, 3), (0, 2)], 3, seed=3)
    scores = case.logps[:, 0].nan_to_num(0.0).requires_grad_()

    def loss(scores: Tensor) -> Tensor:
        weights, kind = case.pair_weights, {"temperature": 0.7, "reduction": "none"}
        return rx.multilabel_contrastive_loss(scores, case.sessions, pair_weights=weights, **kind)

    assert torch.autograd.gradcheck(loss, scores)


# What must not change, and how.


@settings(max_examples=60)
@given(cases(most=4), st.sampled_from(CORES), options(), st.randoms(use_true_random=False))
def test_order_does_not_matter(case: Case, core: dict[str, Any], chosen: dict[str, Any], random: Any) -> None:
    """Of sessions and of negatives with their weights; of positives too, where none is the winner."""
    arguments = core | chosen | {"reduction": "sum", "normalizer": None}
    plan: Plan = [([*p_rows], [*n_rows]) for p_rows, n_rows in case.plan]
    random.shuffle(plan)
    for p_rows, n_rows in plan:
        random.shuffle(n_rows)
        if core["positives"] != "winner":
            random.shuffle(p_rows)
    got, gradient = run(rx.rad_dpo_loss, case.take(plan), arguments, (1, 0.3, 0))
    expected, expected_gradient = run(rx.rad_dpo_loss, case, arguments, (1, 0.3, 0))
    scale = scale_of(expected)
    for name in ("loss", "preference", "sft", "accuracy"):
        assert_close(getattr(got, name), getattr(expected, name), scale)
    assert_close(gradient, expected_gradient[rows_of(plan)], scale)
    number = case.pairs()
    pairs = [number[p, n] for p_rows, n_rows in plan for p in p_rows for n in n_rows]
    assert got.margins.tolist() == expected.margins[pairs].tolist()


@settings(max_examples=60)
@given(cases(most=5), st.sampled_from(CORES), options(reduction="mean"), st.data())
def test_parts_sum_to_the_whole(case: Case, core: dict[str, Any], chosen: dict[str, Any], data: st.DataObject) -> None:
    """Any split of the sessions, with the whole batch's counts as the normalizer."""
    assigned = [data.draw(st.integers(0, 2)) for _ in case.plan]
    arguments = core | chosen | {"normalizer": None}
    whole, gradient = run(rx.rad_dpo_loss, case, arguments)
    kept = (run(rx.rad_dpo_loss, case, arguments | {"reduction": "none"})[0].preference != 0).sum()
    tokens = sum(len(case.sids[p]) for p_rows, _ in case.plan for p in p_rows)
    arguments["normalizer"] = (kept.clamp(min=1), max(tokens, 1))
    scale = scale_of(whole)
    summed, summed_gradient = torch.zeros(3, dtype=torch.float64), torch.zeros_like(gradient)
    for part in range(3):
        plan = [rows for rows, where in zip(case.plan, assigned, strict=True) if where == part]
        result, part_gradient = run(rx.rad_dpo_loss, case.take(plan), arguments)
        summed += torch.stack(result[:3]).detach()
        summed_gradient[rows_of(plan)] += part_gradient
    assert_close(summed, torch.stack(whole[:3]), scale)
    assert_close(summed_gradient, gradient, scale)


@settings(max_examples=40)
@given(cases(), st.sampled_from(CORES), options(), st.data())
def test_an_empty_session_changes_nothing(
    case: Case, core: dict[str, Any], chosen: dict[str, Any], data: st.DataObject
) -> None:
    arguments, plan = core | chosen, list(case.plan)
    at = data.draw(st.integers(0, len(plan)))
    plan.insert(at, ([], []))
    expected, expected_gradient = run(rx.rad_dpo_loss, case, arguments)
    got, gradient = run(rx.rad_dpo_loss, case.take(plan), arguments)
    if chosen["reduction"] == "none":
        for name in FIELDS[:3]:
            value = getattr(got, name).tolist()
            assert value.pop(at) == 0
            assert value == getattr(expected, name).tolist()
        return
    assert_results_close(got, expected, scale_of(expected))
    assert_close(gradient, expected_gradient)


@settings(max_examples=40)
@given(cases(), st.sampled_from([core for core in CORES if core["positives"] == "each"]), options(reduction="none"))
def test_each_is_the_mean_of_its_winners(case: Case, core: dict[str, Any], chosen: dict[str, Any]) -> None:
    """A session is one with each of its positives as the only one; ``protect="positives"`` would know only that one."""
    if core.get("protect") == "positives":
        core = core | {"protect": "none"}
    got, gradient = run(rx.rad_dpo_loss, case, core | chosen, (0, 1, 0))
    expected, expected_gradient = torch.zeros_like(got.preference), torch.zeros_like(gradient)
    for session, (p_rows, n_rows) in enumerate(case.plan):
        kept = 0
        for p in p_rows:
            plan: Plan = [([p], n_rows)]
            alone, alone_gradient = run(
                rx.rad_dpo_loss, case.take(plan), core | chosen | {"positives": "winner"}, (0, 1 + 0.5 * session, 0)
            )
            kept += bool(alone.preference != 0)
            expected[session] += alone.preference[0].detach()
            expected_gradient[rows_of(plan)] += alone_gradient
        if kept:
            expected[session] /= kept
            expected_gradient[p_rows + n_rows] /= kept
    scale = scale_of(got)
    assert_close(got.preference, expected, scale)
    assert_close(gradient, expected_gradient, scale)


@settings(max_examples=40)
@given(cases(BOTH), options(), st.sampled_from(["loss", "reward"]))
def test_pooled_with_one_positive_is_winner(case: Case, chosen: dict[str, Any], weighting: str) -> None:
    case = case.take([(p_rows[:1], n_rows) for p_rows, n_rows in case.plan])
    arguments = chosen | {"weighting": weighting}
    got, gradient = run(rx.rad_dpo_loss, case, arguments | {"positives": "pooled"})
    expected, expected_gradient = run(rx.rad_dpo_loss, case, arguments)
    scale = scale_of(expected)
    assert_results_close(got, expected, scale)
    assert_close(gradient, expected_gradient, scale)
