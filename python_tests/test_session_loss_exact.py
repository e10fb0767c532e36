"""What the session losses promise to the bit: dropped pairs, detached tokens, padding, extreme values, determinism."""

from __future__ import annotations

import math
from itertools import product
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
    build,
    cases,
    common_prefix,
    detached,
    name_of,
    options,
    run,
    scale_of,
    session_batch,
)

import raddpo_ext as rx
from raddpo_ext import reference

CORE = pytest.mark.parametrize("core", CORES, ids=name_of)
BOTH = (torch.float64, torch.float32)
DTYPE = pytest.mark.parametrize("dtype", BOTH, ids=["float64", "float32"])


def case_of(sids: list[list[int]], num_positives: int, dtype: torch.dtype = torch.float64) -> Case:
    """One session of these SIDs with random values, NaN as padding."""
    levels = max(map(len, sids), default=3)
    rows = [sid + [-7] * (levels - len(sid)) for sid in sids]
    tokens = torch.tensor(rows, dtype=torch.int64).view(-1, levels)
    plan: Plan = [(list(range(num_positives)), list(range(num_positives, len(sids))))]
    case = build([(num_positives, len(sids) - num_positives)], levels, seed=7)
    sessions = session_batch(tokens, torch.tensor([len(sid) for sid in sids], dtype=torch.int64), plan)
    values = -4 * torch.rand(2, *tokens.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values[:, ~sessions.mask()] = math.nan
    weights = 0.3 + torch.rand(sessions.num_pairs, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return Case(sessions, values[0], values[1], weights, case.detach, case.level_weights).to(dtype)


W, P, N, M = [1, 2, 3], [1, 5, 6], [1, 2, 4], [7, 2]
DEAD = {
    "no negatives": ([W, P], 2),
    "no positives": ([N, M], 0),
    "nothing": ([], 0),
    "negatives of length 0": ([W, P, [], []], 2),
    "positives of length 0": ([[], [], N, M], 2),
    "equal SIDs": ([W, W, W], 1),
    "weight 0": ([W, N, M], 1),
}


@pytest.mark.parametrize("kind", DEAD)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_session_without_a_pair_contributes_nothing(kind: str, smoothing: float) -> None:
    """Beside one that has some: as if it were not there, but for its SFT."""
    sids, positives = DEAD[kind]
    both = case_of([W, P, N, M, *sids], 2)
    plan: Plan = [([0, 1], [2, 3]), ([*range(4, 4 + positives)], [*range(4 + positives, len(sids) + 4)])]
    sessions = session_batch(both.sessions.tokens, both.sessions.lengths, plan)
    weights = both.pair_weights.new_full((sessions.num_pairs,), 0.7)
    weights[4:] = 0.0 if kind == "weight 0" else 0.7
    both = Case(sessions, both.logps, both.ref_logps, weights, both.detach, both.level_weights)
    for core in CORES:
        arguments = core | {"pair_weights": True, "label_smoothing": smoothing}
        got, gradient = run(rx.rad_dpo_loss, both, arguments, (0, 1, 0))
        expected, expected_gradient = run(rx.rad_dpo_loss, both.take(plan[:1]), arguments, (0, 1, 0))
        assert got.preference == expected.preference
        assert got.accuracy == expected.accuracy
        assert torch.equal(gradient[:4], expected_gradient)
        assert (gradient[4:] == 0).all()
        assert (got.margins[4:] == 0).all()
        terms = rx.rad_dpo_loss(both.logps, sessions, **both.arguments(arguments), reduction="none")
        assert terms.preference[1] == 0
        assert terms.loss[1] == terms.sft[1]
        alone, gradient = run(rx.rad_dpo_loss, both.take(plan[1:]), arguments, (0, 1, 0))
        assert alone.preference == alone.accuracy == 0
        assert (gradient == 0).all()


# The negative's SID; under which ``positives`` it has no use left; which of its pairs (winner's, other's) are dropped.
DROPPED: dict[str, tuple[list[int], set[str], list[bool]]] = {
    "length 0": ([], {"winner", "each", "pooled"}, [True, True]),
    "equals the winner": (W, {"winner", "pooled"}, [True, False]),
    "equals another positive": (P, {"pooled"}, [False, True]),
    "weight 0": ([1, 2, 8], {"winner", "pooled"}, [True, False]),
    "weights 0": ([1, 2, 8], {"winner", "each", "pooled"}, [True, True]),
}


@pytest.mark.parametrize("kind", DROPPED)
def test_a_dropped_pair_is_as_if_the_negative_were_not_there(kind: str) -> None:
    """A negative equal to another positive stays against the winner; a pool drops it."""
    sid, wholly, pairs = DROPPED[kind]
    case = case_of([W, P, N, sid, M], 2)
    if "0" in kind:
        case.pair_weights.view(2, 3)[pairs, 1] = 0.0
    for core in CORES:
        arguments = core | {"pair_weights": True}
        got, gradient = run(rx.rad_dpo_loss, case, arguments, (0, 1, 0))
        without, expected = run(rx.rad_dpo_loss, case.take([([0, 1], [2, 4])]), arguments, (0, 1, 0))
        if core["positives"] in wholly:
            assert_close(got.preference, without.preference)
            assert_close(gradient[[0, 1, 2, 4]], expected)
            assert (gradient[3] == 0).all()
        else:
            assert (got.preference - without.preference).abs() > 1e-3
        margins = (got.rewards[:2, None] - got.rewards[2:]).clone()
        margins[torch.tensor(pairs) | (core["positives"] == "pooled"), 1] = 0.0
        assert got.margins.view(2, 3).tolist() == margins.tolist()


def test_a_positive_of_length_0_is_no_positive() -> None:
    """It neither wins nor pools nor protects; as the first, it leaves ``winner`` without a pair."""
    case, rest = case_of([[], W, P, N, M], 3), [([1, 2], [3, 4])]
    for core in CORES:
        got, gradient = run(rx.rad_dpo_loss, case, core)
        expected, expected_gradient = run(rx.rad_dpo_loss, case.take(rest), core)
        assert (gradient[0] == 0).all()
        assert got.sft == expected.sft
        if core["positives"] == "winner":
            assert got.preference == 0
            assert got.margins[2:].tolist() == expected.margins.tolist()
        else:
            assert_close(gradient[1:], expected_gradient)
            assert_close(got.loss, expected.loss)
            assert got.accuracy == expected.accuracy


def test_multilabel_drops_what_a_pool_drops() -> None:
    """Candidates of length 0, negatives that are a positive's SID, those of which one weight is 0; and no other."""
    case = case_of([W, P, [], N, M, P, [], [9, 9]], 3)
    scores = torch.tensor([1.0, -0.5, 9.0, 0.3, 0.2, 9.0, 9.0, 9.0], dtype=torch.float64, requires_grad=True)
    weights = torch.ones(3, 5, dtype=torch.float64)
    weights[1, 4] = 0.0  # of [9, 9]
    weights[2] = 0.0  # the positive of length 0 has no say
    loss = rx.multilabel_contrastive_loss(scores, case.sessions, pair_weights=weights.flatten())
    kept, positives = [0, 1, 3, 4], [0, 1]
    expected = scores[kept].logsumexp(0) - scores[positives].logsumexp(0)
    assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert_close(gradient, torch.autograd.grad(expected, scores)[0])
    assert gradient[[2, 5, 6, 7]].tolist() == [0.0] * 4


@pytest.mark.parametrize("kind", DEAD)
def test_multilabel_of_a_session_without_a_pair(kind: str) -> None:
    """Adds exactly 0 and does not count."""
    sids, positives = DEAD[kind]
    both = case_of([W, P, N, M, *sids], 2)
    plan: Plan = [([0, 1], [2, 3]), ([*range(4, 4 + positives)], [*range(4 + positives, len(sids) + 4)])]
    sessions = session_batch(both.sessions.tokens, both.sessions.lengths, plan)
    weights = torch.full((sessions.num_pairs,), 0.7, dtype=torch.float64)
    weights[4:] *= kind != "weight 0"
    scores = torch.linspace(-1, 1, len(both.logps), dtype=torch.float64, requires_grad=True)
    loss = rx.multilabel_contrastive_loss(scores, sessions, pair_weights=weights)
    live = both.take(plan[:1]).sessions
    assert loss == rx.multilabel_contrastive_loss(scores[:4], live, pair_weights=weights[:4])
    assert (torch.autograd.grad(loss, scores)[0][4:] == 0).all()


@CORE
@settings(max_examples=5)
@given(cases(BOTH), options(), st.integers(0, 2**32), st.sampled_from([1e4, 1e2]))
def test_wide_gaps(core: dict[str, Any], case: Case, chosen: dict[str, Any], seed: int, size: float) -> None:
    """Rewards some 1e4 apart, either way."""
    factor = torch.rand(len(case.logps), 1, generator=torch.Generator().manual_seed(seed)) < 0.5
    case.logps *= torch.where(factor, size, 1.0).to(case.logps)
    arguments = core | chosen
    got, gradient = run(rx.rad_dpo_loss, case, arguments)
    expected, expected_gradient = run(reference.rad_dpo_loss, case.to(torch.float64), arguments)
    for name in FIELDS[:-1]:
        assert getattr(got, name).isfinite().all()
        assert_close(getattr(got, name), getattr(expected, name), 4 * scale_of(expected))
    assert gradient.isfinite().all()
    # An error of the size of a reward's rounding is a relative error of a share.
    assert_close(gradient, expected_gradient, 4 * chosen["beta"] * scale_of(expected))


@CORE
@settings(max_examples=5)
@given(cases(BOTH), options(), st.integers(0, 2**32), st.sampled_from([0.1, 0.6, 1.0]))
def test_minus_infinity(core: dict[str, Any], case: Case, chosen: dict[str, Any], seed: int, share: float) -> None:
    """An impossible negative is as one that is not there but for its margin; an impossible winner costs infinity, and
    nothing where its negatives are all impossible. With label smoothing the loss may be infinite, never NaN."""
    rows = torch.rand(case.logps.shape, generator=torch.Generator().manual_seed(seed)) < share
    case.logps[rows & case.sessions.mask()] = -math.inf
    arguments = core | chosen
    got, gradient = run(rx.rad_dpo_loss, case, arguments)
    assert not any(getattr(got, name).isnan().any() for name in FIELDS)
    assert not gradient.isnan().any()
    assert gradient.isfinite().all()
    if chosen["label_smoothing"] == 0:
        expected, expected_gradient = run(reference.rad_dpo_loss, case.to(torch.float64), arguments)
        for name in FIELDS:
            assert_close(getattr(got, name), getattr(expected, name), 30)
        assert_close(gradient, expected_gradient, 30)


@CORE
@DTYPE
def test_impossible_negatives_are_not_smoothed(core: dict[str, Any], dtype: torch.dtype) -> None:
    """Label smoothing has an infinite price for a session whose negatives are all impossible, but no gradient."""
    case = case_of([W, P, N, M], 2, dtype)
    case.logps[2:, 1] = -math.inf
    result, gradient = run(rx.rad_dpo_loss, case, core | {"label_smoothing": 0.1}, (0, 1, 0))
    assert result.preference == math.inf
    assert gradient[case.sessions.mask()].unique().tolist() == [0.0]


def test_an_infinite_term_of_weight_0_is_no_nan() -> None:
    case = case_of([W, P, N, M], 2)
    case.logps[1, 1] = -math.inf
    result, gradient = run(rx.rad_dpo_loss, case, {"sft_weight": 0.0})
    assert result.sft == math.inf
    assert result.loss == result.preference
    assert result.loss.isfinite()
    assert gradient.isfinite().all()
    result, gradient = run(rx.rad_dpo_loss, case, {"level_weights": [1.0, 0.0, 1.0]}, (0, 0, 1))
    assert result.sft.isfinite()
    assert gradient[:, 1].tolist() == [0.0] * 4


@DTYPE
@pytest.mark.parametrize("seed", range(2))
def test_the_largest_values_are_never_nan(dtype: torch.dtype, seed: int) -> None:
    """Sums that overflow are the infinities above."""
    case = build([(2, 3), (3, 5), (1, 2)], 3, seed, dtype)
    least = torch.finfo(dtype).min
    case.logps[torch.rand(case.logps.shape, generator=torch.Generator().manual_seed(seed)) < 0.6] = least
    case.logps[~case.sessions.mask()] = math.nan
    for core, smoothing, normalized in product(CORES, [0.0, 0.1], [True, False]):
        extra = {"label_smoothing": smoothing, "length_normalized": normalized, "pair_weights": True}
        result, gradient = run(rx.rad_dpo_loss, case, core | extra, (1, 1, 1))
        assert not any(part.isnan().any() for part in (*(getattr(result, name) for name in FIELDS), gradient))
    scores = (torch.rand(len(case.logps), dtype=dtype) - 0.5) * -least / 8
    scores.requires_grad_()
    loss = rx.multilabel_contrastive_loss(scores, case.sessions, temperature=0.3)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, scores)[0].isfinite().all()


@settings(max_examples=60)
@given(cases(BOTH), st.sampled_from(CORES), options(), st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))
def test_padding_is_never_read(case: Case, core: dict[str, Any], chosen: dict[str, Any], filling: float) -> None:
    """Nor written: its gradient is exactly 0. ``check`` does not look at it either."""
    arguments = core | chosen
    expected, expected_gradient = run(rx.rad_dpo_loss, case, arguments)
    padding = ~case.sessions.mask()
    assert (expected_gradient[padding] == 0).all()
    tokens = case.sessions.tokens.masked_fill(padding, 6)
    other = Case(
        session_batch(tokens, case.sessions.lengths, case.plan),
        case.logps.masked_fill(padding, filling),
        case.ref_logps.masked_fill(padding, -filling),
        case.pair_weights,
        case.detach ^ padding,
        case.level_weights,
    )
    got, gradient = run(rx.rad_dpo_loss, other, arguments | {"check": True})
    for part, same in zip((*got, gradient), (*expected, expected_gradient), strict=True):
        assert torch.equal(part, same)


# Token-level gradient detachment.


@settings(max_examples=80)
@given(cases(BOTH, most=4), st.sampled_from(CORES), options())
def test_detached_tokens_get_exactly_0_and_no_other_changes(
    case: Case, core: dict[str, Any], chosen: dict[str, Any]
) -> None:
    free = {k: v for k, v in core.items() if k not in ("protect", "detach")} | {"protect": "none"} | chosen
    kept, unprotected = run(rx.rad_dpo_loss, case, free, (0, 1, 0))
    got, gradient = run(rx.rad_dpo_loss, case, core | chosen, (0, 1, 0))
    for name in FIELDS:
        assert torch.equal(getattr(got, name), getattr(kept, name))
    if "detach" in core:
        never = always = case.detach
    elif (core["protect"], core["positives"]) == ("winner", "each"):
        # Below the least of the prefixes all uses are detached, above the greatest none.
        always = torch.zeros_like(case.detach)
        never = detached(case, "positives", "each")
        for p_rows, n_rows in case.plan:
            for n in n_rows if p_rows else []:
                always[n, : min(common_prefix(case.sids[p], case.sids[n]) for p in p_rows)] = True
    else:
        never = always = detached(case, core["protect"], core["positives"])
    assert (gradient[always] == 0).all()
    assert torch.equal(gradient[~never], unprotected[~never])


def test_sft_stays_whole() -> None:
    case = build([(2, 4), (3, 2), (1, 0)], 3, seed=1)
    expected = torch.zeros_like(case.logps)
    for p_rows, _ in case.plan:
        expected[p_rows] = -case.level_weights
    expected[~case.sessions.mask()] = 0
    for core in CORES:
        arguments = core | {"level_weights": True, "reduction": "sum"}
        assert torch.equal(run(rx.rad_dpo_loss, case, arguments, (0, 0, 1))[1], expected)


def test_a_detach_mask_replaces_protect() -> None:
    case = build([(2, 4), (3, 2)], 3, seed=1)
    found = [run(rx.rad_dpo_loss, case, {"detach": True, "protect": name})[1] for name in ("winner", "none")]
    assert torch.equal(*found)
    nothing = torch.zeros_like(case.detach)
    expected = run(rx.rad_dpo_loss, case, {"protect": "none"})[1]
    assert torch.equal(run(rx.rad_dpo_loss, case, {"detach": nothing})[1], expected)


def test_the_algebra() -> None:
    """What the specification says of shared prefixes, at equal lengths and unweighted."""
    beta, levels, free = 2.0, 3, {"protect": "none", "reduction": "sum"}
    pair = case_of([W, N], 1)
    result, gradient = run(rx.rad_dpo_loss, pair, free, (0, 1, 0))
    assert_close(gradient[0, :2], -gradient[1, :2])  # a pair's common prefix cancels in the gradient
    pair.logps[:, :2] -= torch.tensor([3.0, 0.7])
    assert_close(run(rx.rad_dpo_loss, pair, free)[0].preference, result.preference)  # and in the value

    case = case_of([W, N, [1, 8, 8], [1, 2, 9], [7, 7, 7]], 1)  # prefix 1 shared by three of four, 1 2 by two
    r = beta * case.logps.mean(1)
    gap = r[1:].logsumexp(0) - r[0]
    unit, shares = gap.sigmoid() * beta / levels, r[1:].softmax(0)
    gradient = run(rx.rad_dpo_loss, case, free, (0, 1, 0))[1]
    for level, sharing in enumerate([[0, 1, 2], [0, 2], []]):
        net = gradient[0, level] + gradient[1:][sharing, level].sum()
        assert_close(-net, unit * (1 - shares[sharing].sum()))
        assert net < 0
    assert_close(gradient[0], -unit.expand(3))
    protected = run(rx.rad_dpo_loss, case, {"reduction": "sum"}, (0, 1, 0))[1]
    assert torch.equal(protected[0], gradient[0])  # the full push up
    assert protected[1:].tolist() == gradient[1:].where(~detached(case, "winner", "winner")[1:], 0.0).tolist()

    shorter = case_of([W, [1, 2]], 1)  # a shorter negative does push the shared prefix down
    gradient = run(rx.rad_dpo_loss, shorter, free, (0, 1, 0))[1]
    assert gradient[:, 0].sum() > 0
