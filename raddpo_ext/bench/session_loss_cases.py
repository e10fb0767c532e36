"""The sessions whose loss is timed.

By default there are 256 with 1 to 4 positives, 3 to 64 negatives and one weight per pair. SIDs have 4 codes. Half of a
session's negatives are near its winner in the sorted catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from raddpo_ext.bench import catalogues
from raddpo_ext.losses.session import SessionBatch

BETA = 2.0
ITEMS, CODES, NEIGHBOURS = 50_000, 256, 40  # of the catalogue; rows of it around the winner
Loss = Callable[[Tensor], Tensor]
Step = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """``positives`` as in :func:`raddpo_ext.rad_dpo_loss`."""

    positives: str
    sessions: int = 256
    counts: tuple[int, int] = (1, 4)  # of positives, min and max
    negatives: tuple[int, int] = (3, 64)
    levels: int = 4

    @property
    def name(self) -> str:
        (least, most), (fewest, top) = self.counts, self.negatives
        return f"{self.positives} S{self.sessions} P{least}-{most} N{fewest}-{top} L{self.levels}"


CASES = [Case("winner"), Case("each"), Case("pooled")]


class Batch:
    """A case's sessions, weights and log-probs, a leaf."""

    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        rng = np.random.default_rng(0)
        # Rows of the sorted catalogue: its neighbours share long prefixes.
        catalogue = np.unique(catalogues.clustered(ITEMS, CODES, case.levels), axis=0)
        least, most = zip(case.counts, case.negatives, strict=True)
        counts = rng.integers(least, most, (case.sessions, 2), endpoint=True)
        rows: list[int] = []
        for positives, negatives in counts:
            drawn = rng.integers(len(catalogue), size=positives + negatives)
            near = drawn[0] + rng.integers(1, NEIGHBOURS, negatives // 2)
            rows += [*drawn[: len(drawn) - len(near)], *near % len(catalogue)]
        self.case = case
        self.sessions = SessionBatch(
            torch.from_numpy(catalogue[rows]).long(),
            torch.full((len(rows),), case.levels),
            torch.tensor([0, *accumulate(counts.sum(1).tolist())]),
            torch.from_numpy(counts[:, 0].copy()),
        ).to(device)
        self.tokens = self.sessions.tokens
        generator = torch.Generator().manual_seed(0)
        self.logps = (-3 * torch.rand(len(rows), case.levels, generator=generator)).to(device).requires_grad_()
        self.weights = (0.5 + 0.5 * torch.rand(self.sessions.num_pairs, generator=generator)).to(device)

    def differentiate(self, loss: Loss) -> Step:
        def step() -> tuple[Tensor, Tensor]:
            value = loss(self.logps)
            return value.detach(), torch.autograd.grad(value, self.logps)[0]

        return step
