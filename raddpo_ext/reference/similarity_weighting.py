"""Similarity weighting in a plain loop over pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raddpo_ext.losses.session import SessionBatch


class SimilarityWeighting:
    """See :class:`raddpo_ext.SimilarityWeighting`, for a single process. The state is in lists without
    padding.
    """

    def __init__(
        self,
        window: int = 4096,
        quantiles: Sequence[float] = (0.5, 0.7, 0.9),
        steepness: float = 12.0,
        min_weight: float = 0.5,
    ) -> None:
        self.window, self.quantiles = window, quantiles
        self.steepness, self.min_weight = steepness, min_weight
        self.training = True
        self.commits_by_itself = True
        self.history: list[float] = []
        self.pending: list[float] = []
        self.thresholds: list[float] | None = None

    def __call__(self, embeddings: Tensor, sessions: SessionBatch) -> Tensor:
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        rows = embeddings.detach().to(dtype)
        weights: list[float] = []
        appended: list[float] = []
        # Weights first, from the thresholds before this call.
        for positive, negative in _pairs(sessions):
            similarity = _cosine(rows[positive], rows[negative])
            weights.append(self.weight(similarity))
            sids = _sid(sessions, positive), _sid(sessions, negative)
            if math.isfinite(similarity) and all(sids) and sids[0] != sids[1]:
                appended.append(similarity)
        if self.training:
            self.pending += appended
            if self.commits_by_itself:
                self._commit()
        return torch.tensor(weights, dtype=dtype, device=embeddings.device)

    def commit(self) -> None:
        self.commits_by_itself = False
        self._commit()

    def weight(self, similarity: float) -> float:
        """The weight of a pair with this similarity."""
        if self.thresholds is None or not math.isfinite(similarity):
            return 1.0
        low, middle, high = self.thresholds
        if similarity <= low:
            return 1.0
        if similarity >= high:
            return self.min_weight
        width = middle - low if similarity < middle else high - middle
        u = (similarity - middle) / width
        return self.min_weight + (1 - self.min_weight) / (1 + math.exp(u * self.steepness / 2))

    def _commit(self) -> None:
        self.history = (self.history + self.pending)[-self.window :]
        self.pending = []
        if len(self.history) == self.window:
            self.thresholds = np.quantile(self.history, self.quantiles).astype(np.float32).tolist()


def _pairs(sessions: SessionBatch) -> list[tuple[int, int]]:
    """The rows of each pair of a positive and a negative of the same session."""
    pairs = []
    offsets = sessions.offsets.tolist()
    for session, positives in enumerate(sessions.num_positives.tolist()):
        start, end = offsets[session], offsets[session + 1]
        for positive in range(start, start + positives):
            for negative in range(start + positives, end):
                pairs.append((positive, negative))
    return pairs


def _sid(sessions: SessionBatch, row: int) -> list[int]:
    return sessions.tokens[row, : int(sessions.lengths[row])].tolist()


def _cosine(first: Tensor, second: Tensor) -> float:
    """The cosine in float32, the dtype of the history; NaN if a row is zero or not finite."""
    return (_direction(first) * _direction(second)).sum().float().item()


def _direction(row: Tensor) -> Tensor:
    row = row / row.abs().max()  # keeps squares from overflow
    return row / torch.linalg.vector_norm(row)
