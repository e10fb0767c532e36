"""What each estimator of a policy gradient expects over independent draws, exactly: all of them are enumerated."""

from __future__ import annotations

import math

import pytest
import torch
from support.gradient_truth import (
    GAPS,
    GIVEN,
    GRPO,
    LESS,
    MEAN,
    POLICY,
    RLOO,
    TRUTH,
    J,
    P,
    R,
    assert_equal,
    bias,
    covariance,
    independent,
    over_pairs,
    scores,
    token_scores,
    turned,
)
from torch import Tensor

import raddpo_ext as rx
from benchmarks.alignment.table_policy import LEVELS, NUM_SIDS, Draws, Estimator

LENGTHS = POLICY.lengths.double()
EXPERT = 7  # reward 0.2


def of_dead_groups(samples: int, baseline: float) -> Tensor:
    """What groups of equal rewards add to the expectation: they are one value's, all of them."""
    found = torch.zeros_like(TRUTH)
    for value in R.unique():
        rows = value == R
        found += P[rows].sum() ** (samples - 1) * (value - baseline) * (P[rows] @ scores()[rows])
    return found


def test_truth_is_the_covariance() -> None:
    assert_equal(covariance(scores()), TRUTH)
    assert POLICY.lengths.bincount().gt(0).tolist() == [False, True, True, True, True]
    assert float(R.min()) < 0 < float(R.max())
    assert math.isclose(float(P.sum()), 1, rel_tol=1e-12)


@pytest.mark.parametrize("samples", [2, 3])
def test_independent_draws(samples: int) -> None:
    """Exact: unbiased are the leave-one-out baseline, and any number that does not depend on the draws."""
    assert_equal(independent(RLOO, samples), TRUTH)
    assert_equal(independent(MEAN, samples), (samples - 1) / samples * TRUTH)
    assert_equal(independent(LESS, samples), TRUTH)
    assert_equal(independent(Estimator(), samples), TRUTH)


@pytest.mark.parametrize("samples", [2, 3])
def test_a_given_baseline_lacks_dead_groups(samples: int) -> None:
    """``group_advantages`` gives groups of equal rewards 0; with a baseline of one's own the truth has them too."""
    missing = of_dead_groups(samples, 0.3)
    assert_equal(independent(GIVEN, samples), TRUTH - missing)
    assert bias(missing, torch.zeros_like(missing)) > 0.2


def test_group_scale_counts_wins() -> None:
    """Of two draws it is the gradient of the chance to beat another draw, whatever by."""
    assert_equal(independent(GRPO, 2), over_pairs(GAPS.sign() / math.sqrt(2), scores()), 1e-9)
    assert bias(independent(GRPO, 2)) > 0.5


def test_batch_scale_is_a_factor() -> None:
    draws = POLICY.draw("independent", 500, 4)
    batch = POLICY.estimates(draws, Estimator({"scale": "batch", "baseline": "loo", "eps": 1e-12}))
    assert_equal(batch * R[draws.items].std(), POLICY.estimates(draws, RLOO), 1e-9)


def test_aggregates() -> None:
    """A mean over a row's tokens changes the direction where SIDs differ in length; a constant does not."""
    by_sequence = Estimator(RLOO.advantages, {"aggregate": "sequence"})
    assert_equal(independent(by_sequence, 2), covariance(scores() / LENGTHS[:, None]))
    assert turned(independent(by_sequence, 2)) > 0.1
    constant = Estimator(RLOO.advantages, {"aggregate": "constant"})
    assert_equal(independent(constant, 2), TRUTH / LEVELS)
    for aggregate, factor in (("sequence", torch.ones_like(LENGTHS)), ("token", LENGTHS)):
        item = Estimator(RLOO.advantages, {"objective": "clip", "ratio": "item", "aggregate": aggregate})
        assert_equal(independent(item, 2), covariance(scores() * factor[:, None]))


def test_sibling_credit() -> None:
    """Of two draws, the token where they part gets +-1, the others nothing."""
    tokens = POLICY.tokens.masked_fill(torch.arange(LEVELS) >= POLICY.lengths[:, None], -1)
    level = (tokens[:, None] != tokens).long().argmax(2)
    parting = token_scores()[torch.arange(NUM_SIDS)[:, None], level]
    found = independent(Estimator({"credit": "siblings", "eps": 1e-12}), 2)
    assert_equal(found, torch.einsum("ij,ijk->k", P[:, None] * P * GAPS.sign(), parting), 1e-9)
    assert bias(found) > 0.5
    half = independent(
        Estimator({"credit": "siblings", "blend": 0.5, "scale": "none", "baseline": "loo", "eps": 1e-12}), 2
    )
    assert_equal(half, (found + TRUTH) / 2, 1e-9)


def test_marginal_credit() -> None:
    """Of two draws, a token that matches the target where the other's does not gets 1 / sqrt(2), times its gate."""
    mask = torch.arange(LEVELS) < POLICY.lengths[:, None]
    target = POLICY.tokens[EXPERT].masked_fill(~mask[EXPERT], -1)
    match = ((POLICY.tokens == target) & mask).double().cumprod(1)
    before = match.cumsum(1) - match  # matches before each token
    gates = torch.where(torch.arange(LEVELS) > 0, before / torch.arange(LEVELS).clamp(min=1), 1.0)
    both = (mask[:, None] & mask).double() * (GAPS != 0)[..., None]
    credit = (match[:, None] - match) / math.sqrt(2) * gates[:, None] * both
    expected = torch.einsum("ij,ijl,ilk->k", P[:, None] * P, credit, token_scores())
    found = independent(Estimator({"credit": "marginal", "targets": EXPERT, "eps": 1e-12}), 2)
    assert_equal(found, expected, 1e-9)
    assert bias(found) > 0.5


@pytest.mark.parametrize("baseline", [0.0, 0.3])
def test_vocabulary(baseline: float) -> None:
    """Rollouts of the trie with log-probs over the vocabulary: not the gradient of the expected reward. No baseline is
    neutral, for the log-probs contain the mass of the legal tokens."""
    over = {"normalize": "vocab"}
    assert_equal(independent(Estimator(RLOO.advantages, **over), 2), covariance(scores("vocab")))
    found = independent(Estimator(baseline=baseline, **over), 2)
    assert_equal(found, (P * (R - baseline)) @ scores("vocab"))
    mass = P @ (scores("vocab") - scores())  # the mean gradient of the log of the legal mass
    assert_equal(found - covariance(scores("vocab")), (J - baseline) * mass)
    assert bias(found) > 0.3


@pytest.mark.parametrize("preset", rx.POLICY_PRESETS)
def test_objectives_agree_at_the_first_step(preset: str) -> None:
    """Every ratio is 1; only GBPO weighs rows of negative advantage otherwise."""
    options = {"objective": "clip"} | rx.POLICY_PRESETS[preset]
    # A term of whole items is the same for each of their tokens: it is their mean.
    aggregate = "sequence" if options.get("ratio") == "item" else "token"
    options = {k: options[k] for k in ("objective", "clip", "ratio") if k in options} | {"aggregate": aggregate}
    found = independent(Estimator(RLOO.advantages, options), 2)
    weight = torch.ones_like(GAPS)
    if preset == "gbpo":
        weight = torch.where(GAPS < 0, (P / torch.maximum(P, 1 - P))[:, None], 1.0)
        assert bias(found) > 0.2
    assert_equal(found, over_pairs(GAPS * weight, scores()))


@pytest.mark.parametrize("ratio", ["item", "token"])
def test_off_policy(ratio: str) -> None:
    """Draws of an older policy: the ratio of items corrects for it, that of tokens does so only in part."""
    old = POLICY.logits + 0.5 * torch.randn(POLICY.logits.shape, generator=torch.Generator().manual_seed(0))
    old_tokens = POLICY.token_logps(old)
    q = old_tokens.sum(1).exp()
    sets = torch.cartesian_prod(torch.arange(NUM_SIDS), torch.arange(NUM_SIDS))
    unclipped = {"objective": "clip", "clip": (1.0, 1e9), "ratio": ratio, "old_logps": old_tokens[sets.flatten()]}
    unclipped["aggregate"] = "sequence" if ratio == "item" else "token"
    found = q[sets].prod(1) @ POLICY.estimates(Draws(sets), Estimator(RLOO.advantages, unclipped))
    if ratio == "item":
        assert_equal(found, TRUTH)
        return
    rho = (POLICY.token_logps(POLICY.logits) - old_tokens).exp()
    assert_equal(found, torch.einsum("c,cl,clk->k", q * (R - q @ R), rho, token_scores()))
    assert bias(found) > 0.1


def with_expert(samples: int) -> tuple[Tensor, Draws]:
    """The chance of each tuple of draws, behind an expert."""
    draws = torch.cartesian_prod(*[torch.arange(NUM_SIDS)] * samples)
    return P[draws].prod(1), Draws(torch.cat((torch.full((len(draws), 1), EXPERT), draws), 1), experts=1)


def test_experts_beside_the_group() -> None:
    """``"nll"``: the gradient is that of the rollouts alone, and the likelihood's; of groups that count only."""
    chances, draws = with_expert(2)
    for count, share in (("all", 1.0), ("active", float(P @ (GAPS != 0).double() @ P))):
        chosen = Estimator({**RLOO.advantages, "experts": "nll"}, {"experts": "nll", "nll_weight": 0.3, "count": count})
        found = 3 * (chances @ POLICY.estimates(draws, chosen))
        assert_equal(found, 2 * TRUTH + 0.3 * share * scores()[EXPERT])


def test_experts_in_the_group() -> None:
    """``"group"``: the expert is a row that the policy did not draw, so the sum is biased towards it."""
    chances, draws = with_expert(2)
    found = 3 * (chances @ POLICY.estimates(draws, RLOO))
    rewards = R[draws.items]
    advantages = 1.5 * (rewards - rewards.mean(1, keepdim=True))
    once = torch.cat((draws.items[:, :1] >= 0, draws.items[:, 1:] != EXPERT), 1)  # a rollout equal to it is left out
    assert_equal(found, torch.einsum("g,gi,gik->k", chances, advantages * once, scores()[draws.items]))
    assert bias(found / 2) > 0.3
