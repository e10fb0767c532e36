"""What policy gradients of sampled rollouts expect: without replacement integrated over the threshold, and what
``sample_search`` draws within 4.5 standard errors; of beams; and through autograd."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from support.gradient_truth import (
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
    assert_mean,
    bias,
    scores,
    turned,
    without_replacement,
)
from torch import Tensor

import raddpo_ext as rx
from benchmarks.alignment.table_policy import NUM_SIDS, Draws, Estimator

WITHOUT = {
    "less a number": LESS,
    "given": GIVEN,
    "self-normalised": Estimator(baseline=J, self_normalize=True),
    "mean": MEAN,
    "loo": RLOO,
    "group": Estimator({}),
    "siblings": Estimator({"credit": "siblings"}),
    "unweighted": Estimator(RLOO.advantages, use_weights=False),
    "vocabulary": Estimator(baseline=0.3, normalize="vocab"),
}


@cache
def drawn(rollouts: str, samples: int) -> Draws:
    return POLICY.draw(rollouts, 10_000, samples, seed=3)


@pytest.mark.parametrize("name", WITHOUT)
def test_two_draws_without_replacement(name: str) -> None:
    """Exact, and what the sampler draws agrees; unbiased is a baseline from elsewhere without ``group_advantages``."""
    expected = without_replacement(WITHOUT[name])
    assert_mean(POLICY.estimates(drawn("sample", 2), WITHOUT[name]), expected)
    if name == "less a number":
        assert_equal(expected, TRUTH, 1e-9)
    elif name == "vocabulary":
        assert_equal(expected, (P * (R - 0.3)) @ scores("vocab"), 1e-9)
    else:
        assert bias(expected) > 0.01


def test_weighted_advantages() -> None:
    """Each group's estimate, from the weighted mean, that of the other rows, and the unbiased weighted variance."""
    draws = POLICY.draw("sample", 50, 4)
    weights, rewards = draws.weights, R[draws.items]
    mass, total = weights.sum(1, keepdim=True), (weights * rewards).sum(1, keepdim=True)
    less_mean = rewards - total / mass
    less_others = rewards - (total - weights * rewards) / (mass - weights)
    freedom = mass - weights.square().sum(1, keepdim=True) / mass
    std = ((weights * less_mean**2).sum(1, keepdim=True) / freedom).sqrt()
    active = rewards.max(1, keepdim=True).values > rewards.min(1, keepdim=True).values
    advantages = ((MEAN, less_mean), (RLOO, less_others), (GRPO, less_mean / std.where(active, 1)))
    for estimator, values in advantages:
        found = torch.einsum("gi,gik->gk", weights * values * active, scores()[draws.items])
        assert_equal(POLICY.estimates(draws, estimator), found, 1e-9)


@pytest.mark.parametrize("samples", [4, 16])
@pytest.mark.parametrize("rollouts", ["sample", "independent"])
def test_more_draws(rollouts: str, samples: int) -> None:
    draws = drawn(rollouts, samples)
    assert_mean(POLICY.estimates(draws, LESS), TRUTH)
    if rollouts == "independent":
        assert_mean(POLICY.estimates(draws, RLOO), TRUTH)


@pytest.mark.parametrize("samples", [NUM_SIDS, NUM_SIDS + 10])
def test_the_whole_catalogue_has_no_variance(samples: int) -> None:
    """Every group gives the same, whatever the seed: the truth, unless a row's own reward is left out of its baseline;
    the group's standard deviation is a factor."""
    draws = POLICY.draw("sample", 5, samples)
    for name in ("less a number", "given", "self-normalised", "mean"):
        assert_equal(POLICY.estimates(draws, WITHOUT[name]), TRUTH.expand(5, -1), 1e-5)
    loo = (P * (R - J) / (1 - P)) @ scores()
    assert_equal(POLICY.estimates(draws, RLOO), loo.expand(5, -1), 1e-5)
    assert bias(loo) > 0.05
    std = (P @ (R - J) ** 2 / (1 - P @ P)).sqrt()
    assert_equal(POLICY.estimates(draws, GRPO), (TRUTH / std).expand(5, -1), 3e-5)


# Beams.


@pytest.mark.parametrize("samples", [4, 16])
def test_beams_are_no_sample(samples: int) -> None:
    """The same rows whatever the seed: what they miss is never made up for."""
    draws = POLICY.draw("beams", 1, samples)
    assert torch.equal(draws.items, POLICY.draw("beams", 1, samples, seed=1).items)
    (found,) = POLICY.estimates(draws, MEAN)
    rewards = R[draws.items[0]]
    assert_equal(found, (rewards - rewards.mean()) @ scores()[draws.items[0]] / samples)
    assert bias(found) > 0.5
    assert turned(found) > 0.5


# The whole chain.


@pytest.mark.parametrize("normalize", ["trie", "vocab"])
@pytest.mark.parametrize("rollouts", ["sample", "independent"])
def test_through_autograd(rollouts: str, normalize: str) -> None:
    """``token_logps`` of the table's logits, the loss's own mean, and one backward pass, give the groups' mean. Of
    active groups only it is larger by their share."""
    draws = POLICY.draw(rollouts, 300, 2)
    chosen = Estimator({"scale": "none"}, normalize=normalize)
    mean = {"aggregate": "constant", "max_length": 1, "reduction": "mean"}
    items = draws.items.flatten()
    support: dict[str, Any] = {"normalize": normalize}
    if normalize == "trie":
        support |= {"index": POLICY.index, "nodes": POLICY.nodes[items]}

    def gradient(count: str) -> Tensor:
        logits = POLICY.logits.clone().requires_grad_()
        logps = rx.token_logps(logits[POLICY.nodes[items]], POLICY.tokens[items], **support)
        (found,) = torch.autograd.grad(POLICY.loss(logps, draws, chosen, **mean, count=count), logits)
        return -found.flatten()

    expected = POLICY.estimates(draws, chosen).mean(0)
    assert_equal(gradient("all"), expected)
    active = (R[draws.items[:, 0]] != R[draws.items[:, 1]]).double().mean()
    assert 0.2 < active < 0.9
    assert_equal(gradient("active"), expected / active)
