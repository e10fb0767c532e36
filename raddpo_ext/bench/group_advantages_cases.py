"""The groups whose advantages are timed: 16 SIDs of 4 codes each, the first an expert, a fifth of the rest rewarded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raddpo_ext.losses.session import SessionBatch

SIZE = 16  # rows of a group
CODES = (8, 8, 32, 256)  # of each level, as far as rollouts for one prompt differ
EPS = 1e-6
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """``credit`` as in :func:`raddpo_ext.group_advantages`."""

    credit: str
    rows: int

    @property
    def name(self) -> str:
        return f"{self.credit} {self.rows} rows"


CASES = [Case(credit, rows) for credit in ("sequence", "siblings", "marginal") for rows in (512, 16_384)]


class Batch:
    """A case's groups and rewards."""

    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        levels = [torch.randint(codes, (case.rows,), generator=generator) for codes in CODES]
        groups = case.rows // SIZE
        self.case = case
        self.sessions = SessionBatch(
            torch.stack([sum(CODES[:i]) + level for i, level in enumerate(levels)], 1),
            torch.full((case.rows,), len(CODES)),
            torch.arange(0, case.rows + 1, SIZE),
            torch.ones(groups, dtype=torch.int64),
        ).to(device)
        rewards = (torch.rand(case.rows, generator=generator) < 0.2).float()
        rewards[::SIZE] = 1
        self.rewards = rewards.to(device)
