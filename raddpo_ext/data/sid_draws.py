"""Draws of items by their SIDs without replacement, for the samplers of negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check


class SortedItems:
    """Items with integer weights, sorted by SID. Draws items from ranges of SIDs without replacement."""

    def __init__(self, of_item: Tensor, weights: Tensor) -> None:
        self.of_item = of_item
        self.order = of_item.argsort(stable=True)
        self.reached = weights[self.order].cumsum(0)  # cumulative weight, this item included
        last = of_item.bincount().cumsum(0) - 1
        self.bounds = torch.nn.functional.pad(self.reached[last], (1, 0))  # cumulative weight before each SID
        self.num_sids = len(last)

    def numbers(self, positives: Tensor) -> Tensor:
        """The SID of each positive, see :func:`sid_numbers`."""
        return sid_numbers(self.of_item, positives, "positives")

    def draw(self, begin: Tensor, end: Tensor, taken: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw items in proportion to their weights from the SIDs ``begin`` to ``end - 1`` ``[B]`` that are not taken.

        One random number below the free weight decides on an item: the taken SIDs are skipped in ascending order. In
        integers this is exact and needs no second try, and its cost does not grow with the catalogue.

        Args:
            taken: ``[B, F]`` SIDs, -1 for padding.

        Returns:
            int64 ``[B, count]``, -1 where nothing is free.
        """
        # Items own consecutive integers, as many as their weight: ``low`` to ``high - 1`` are those of the range.
        low, high = self.bounds[begin], self.bounds[end]
        chosen = []
        for _ in range(count):
            # The weight of the taken SIDs in the range, each counted once.
            taken = taken.sort(1).values
            counted = (taken >= begin[:, None]) & (taken < end[:, None])
            counted[:, 1:] &= taken[:, 1:] != taken[:, :-1]
            starts = self.bounds[taken.clamp(min=0)]
            weights = torch.where(counted, self.bounds[taken.clamp(min=0) + 1] - starts, 0)
            free = high - low - weights.sum(1)
            # A random integer below the free weight, moved up by each taken SID that it reaches.
            share = torch.rand(len(taken), generator=generator, dtype=torch.float64)
            place = low + torch.minimum((share * free).long(), free - 1)
            for column in range(taken.shape[1]):
                place += torch.where(place >= starts[:, column], weights[:, column], 0)
            # The item that owns this integer.
            position = torch.searchsorted(self.reached, place, right=True).clamp(max=len(self.order) - 1)
            item = torch.where(free > 0, self.order[position], -1)
            chosen.append(item)
            taken = torch.cat([taken, self.numbers(item[:, None])], 1)
        return torch.stack(chosen, 1) if chosen else taken[:, :0]


def distinct_sids(sids: Any) -> tuple[Tensor, Tensor]:
    """The distinct SIDs in lexicographic order, int64 ``[U, L]``, and for each item the number of its SID, ``[N]``."""
    codes = _check.integer_tensor(sids, "sids", 2).cpu()
    if not codes.numel():
        raise ValueError(f"sids must hold at least one SID of one code, got shape {tuple(codes.shape)}")
    wrong = (codes < -1).any(1) | (codes[:, 0] < 0) | ((codes[:, 1:] >= 0) & (codes[:, :-1] < 0)).any(1)
    _check.none(wrong, lambda row: f"sids[{row}] must be codes >= 0, then -1 as padding, got {codes[row].tolist()}")
    distinct, of_item = torch.unique(codes, dim=0, return_inverse=True)
    return distinct, of_item


def sid_numbers(of_item: Tensor, items: Tensor, name: str) -> Tensor:
    """The number of each item's SID; -1 for an item of -1."""
    outside = ((items < -1) | (items >= len(of_item))).any(1)
    _check.none(
        outside,
        lambda row: (
            f"{name}[{row}] holds an item outside [0, {len(of_item)}): {items[row].tolist()}; items are row numbers of "
            "sids, not item ids"
        ),
    )
    return torch.where(items >= 0, of_item[items.clamp(min=0)], -1)
