"""The positions of item ids among the items of an index."""

from __future__ import annotations

import torch
from torch import Tensor


def places_of(ids: Tensor, items: Tensor) -> Tensor:
    """The position of each id in ``items``, -1 for an id that is not there. Passes once over all items."""
    wanted, order = ids.to(items.device).unique(return_inverse=True)
    there = torch.isin(items, wanted.to(items.dtype)).nonzero()[:, 0]  # too large an id may wrap to another one here
    # Look the wanted ids up among those found, which are compared at full width.
    found, by_id = items[there].long().sort()
    nearest = torch.searchsorted(found, wanted)
    nobody = found.new_full((1,), -1)  # for ids beyond the last
    known = torch.cat([found, nobody])[nearest] == wanted
    return torch.where(known, torch.cat([there[by_id], nobody])[nearest], -1)[order]
