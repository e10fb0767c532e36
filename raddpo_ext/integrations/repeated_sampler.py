"""RepeatedSampler: gives the rows of a step again, for its further iterations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler


class RepeatedSampler(Sampler[int]):
    """Repeats each run of rows some times, and leaves out the rows of an incomplete last run.

    Args:
        sampler: gives the rows. If it draws their order, it does so from ``seed`` and the epoch.
        rows: number of rows of a run.
        times: how often each run is given.
        seed: see above.
    """

    def __init__(self, sampler: Any, rows: int, times: int, seed: int) -> None:
        if len(sampler) < rows:
            raise ValueError(f"train_dataset must have at least one batch of {rows} rows, got {len(sampler)}")
        self.sampler, self.rows, self.times, self.seed = sampler, rows, times, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler) // self.rows * self.rows * self.times

    def __iter__(self) -> Iterator[int]:
        if hasattr(self.sampler, "generator"):
            self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        numbers = list(self.sampler)
        for begin in range(0, len(self.sampler) // self.rows * self.rows, self.rows):
            for _ in range(self.times):
                yield from numbers[begin : begin + self.rows]
