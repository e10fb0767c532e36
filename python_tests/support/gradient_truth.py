"""The truth that policy gradients are held against: a table of logits over 30 SIDs, whose expected reward and its
gradient are sums over all of them."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import combinations, combinations_with_replacement

import numpy as np
import torch
from torch import Tensor
from torch.autograd.functional import jacobian

from benchmarks.alignment.table_policy import NUM_SIDS, Draws, Estimator, TablePolicy

POLICY = TablePolicy()
P, R, J = POLICY.probabilities, POLICY.rewards, POLICY.expected_reward
GAPS = R[:, None] - R
TRUTH = POLICY.truth

RLOO = Estimator({"scale": "none", "baseline": "loo"})
MEAN = Estimator({"scale": "none"})
GRPO = Estimator({"eps": 1e-12})
LESS = Estimator(baseline=0.3)  # the rewards less a number
GIVEN = Estimator({"scale": "none", "baseline": True}, baseline=0.3)


@cache
def token_scores(normalize: str = "trie") -> Tensor:
    """The gradient of each token's log-prob ``[30, 4, P]``, by plain torch."""
    found = jacobian(lambda logits: POLICY.token_logps(logits, normalize), POLICY.logits)
    return found.flatten(2)


def scores(normalize: str = "trie") -> Tensor:
    """Of each SID's log-prob ``[30, P]``."""
    return token_scores(normalize).sum(1)


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(TRUTH.abs().max()))


def bias(found: Tensor, expected: Tensor = TRUTH) -> float:
    """Relative to the length of the truth."""
    return float((found - expected).norm() / TRUTH.norm())


def turned(found: Tensor) -> float:
    """The bias that no step size makes up for: of ``found``, divided by the factor that fits it best."""
    return bias(found / float(found @ TRUTH / (TRUTH @ TRUTH)))


def assert_mean(estimates: Tensor, expected: Tensor) -> None:
    """Every entry within 4.5 standard errors."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert ((estimates.mean(0) - expected).abs() <= 4.5 * error + 1e-6).all(), bias(estimates.mean(0), expected)


def independent(estimator: Estimator, samples: int) -> Tensor:
    """The expectation over all multisets of draws."""
    sets = list(combinations_with_replacement(range(NUM_SIDS), samples))
    items = torch.tensor(sets)
    ways = [math.factorial(samples) / math.prod(map(math.factorial, Counter(one).values())) for one in sets]
    chances = torch.tensor(ways, dtype=torch.float64) * P[items].prod(1)
    assert math.isclose(float(chances.sum()), 1, rel_tol=1e-12)
    return chances @ POLICY.estimates(Draws(items), estimator)


def without_replacement(estimator: Estimator, samples: int = 2) -> Tensor:
    """The expectation over all sets of draws and their threshold: the largest perturbed score of what is left, whose
    ``exp(-score)``, times the probability of what is left, has the density ``exp(-x)``."""
    sets = torch.tensor(list(combinations(range(NUM_SIDS), samples)))
    x, share = map(torch.from_numpy, np.polynomial.laguerre.laggauss(48))
    left = 1 - P[sets].sum(1)
    rates = P[sets][:, None] / left[:, None, None]
    included = -torch.expm1(-rates * x[:, None])  # the chance of a perturbed score above the threshold
    chances = (share * included.prod(2)).flatten()
    assert math.isclose(float(chances.sum()), 1, rel_tol=1e-9)
    items = sets[:, None].expand(included.shape).flatten(0, 1)
    weights = (P[sets][:, None] / included).flatten(0, 1)
    return chances @ POLICY.estimates(Draws(items, weights), estimator)


def over_pairs(values: Tensor, gradients: Tensor) -> Tensor:
    """``sum_ij p_i p_j values_ij gradients_i`` for ``values [30, 30]`` and ``gradients [30, P]``."""
    return (P[:, None] * P * values).sum(1) @ gradients


def covariance(gradients: Tensor) -> Tensor:
    """Of the reward and each SID's gradient ``[30, P]``."""
    return (P * (R - J)) @ gradients
