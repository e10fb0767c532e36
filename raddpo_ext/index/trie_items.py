"""From item ids back to their SIDs, which the index stores the other way round."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from raddpo_ext.index.trie import TrieIndex


class UnknownItem(ValueError):
    """An id that the index lacks, and its position among those asked for."""

    def __init__(self, name: str, item: int | str, position: int) -> None:
        super().__init__(f"{name} = {item!r:.60} is no item of the index")
        self.name, self.item, self.position = name, item, position

    def __reduce__(self) -> tuple[type[UnknownItem], tuple[str, int | str, int]]:
        return type(self), (self.name, self.item, self.position)  # from one process to another


def codes_of_items(index: TrieIndex, ids: Tensor, name: str) -> Tensor:
    """Codes of each item, int64 ``[K, sid_levels]`` padded with -1, for int64 ids ``[K]``.

    Raises:
        UnknownItem: for the first id that the index lacks.
    """
    places = places_of(index, ids)
    if bool((places < 0).any()):
        position = int((places < 0).nonzero()[0, 0])
        raise UnknownItem(f"{name}[{position}]", int(ids[position]), position)
    return index.paths(_leaves(index, places))[0]


def places_of(index: TrieIndex, ids: Tensor) -> Tensor:
    """Where each id stands in ``index.items``, -1 for one that it lacks: one pass over them, however many are asked."""
    items = index.items
    wanted, order = ids.to(index.device).unique(return_inverse=True)
    there = torch.isin(items, wanted.to(items.dtype)).nonzero()[:, 0]  # too large an id may wrap to one that is there
    found, by_id = items[there].long().sort()
    nearest = torch.searchsorted(found, wanted)
    nobody = found.new_full((1,), -1)  # beyond the last
    known = torch.cat([found, nobody])[nearest] == wanted
    return torch.where(known, torch.cat([there[by_id], nobody])[nearest], -1)[order]


def _leaves(index: TrieIndex, positions: Tensor) -> Tensor:
    """The node that holds each position: the last whose items begin at or before it, by bisection of their places."""
    low = torch.zeros_like(positions)
    high = torch.full_like(positions, index.num_nodes)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        begins = index.item_ranges(index.nodes_at(middle))[0] <= positions
        low, high = torch.where(begins, middle, low), torch.where(begins, high, middle)
    return index.nodes_at(low)
