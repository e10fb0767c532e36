"""From ranks to metrics, intervals and decisions."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


def ndcg(ranks: np.ndarray, k: int = 10) -> np.ndarray:
    """NDCG@k of each query with one wanted item, from its rank (1 is best, 0 is not found): float64."""
    ranks = ranks.astype(np.float64)  # of uint8 the logarithm would be float16
    hit = (ranks > 0) & (ranks <= k)
    return np.where(hit, 1 / np.log2(1 + np.maximum(ranks, 1)), 0.0)


class Difference(NamedTuple):
    """A mean with its 95 % interval and its mean in standard errors."""

    mean: float
    low: float
    high: float
    z: float

    @property
    def decided(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_bootstrap(differences: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> list[Difference]:
    """The percentile interval of each column's mean, the rows (users) drawn anew, the same rows for all columns.

    Args:
        differences: ``[users, columns]``.
        resamples: how often.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    users = len(differences)
    means = np.empty((resamples, differences.shape[1]))
    for row in range(resamples):
        means[row] = np.bincount(rng.integers(users, size=users), minlength=users) @ differences / users
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    mean, error = differences.mean(0), differences.std(0) / np.sqrt(users)
    z = np.divide(mean, error, out=np.zeros_like(mean), where=error > 0)
    return [Difference(*map(float, row)) for row in zip(mean, low, high, z, strict=True)]


class Choice(NamedTuple):
    """What the rule chose, and why: the best candidate's difference to the article's reading."""

    chosen: str
    best: str
    article: str
    difference: Difference


def choose(scores: dict[str, np.ndarray], article: str, resamples: int = RESAMPLES) -> Choice:
    """The rule for the defaults: the candidate of the highest mean, unless the 95 % interval of its paired difference
    to the article's reading holds 0; then the article's reading.

    Args:
        scores: NDCG@10 of each validation user, by candidate.
        article: the candidate that is the article's reading.
        resamples: of the bootstrap.
    """
    best = max(scores, key=lambda name: scores[name].mean())
    difference = paired_bootstrap((scores[best] - scores[article])[:, None], resamples)[0]
    return Choice(best if difference.low > 0 else article, best, article, difference)


def over_seeds(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Each user's mean over the seeds."""
    return np.mean(np.stack(columns), 0)


def pack(values: np.ndarray) -> str:
    """uint8 values as text."""
    return base64.b85encode(zlib.compress(values.astype(np.uint8).tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
