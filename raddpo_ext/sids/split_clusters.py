"""split_clusters: a further code for SIDs that too many items share."""

from __future__ import annotations

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.sids.prefixes import ranks


def split_clusters(sids: Tensor, max_items: int = 50, max_groups: int = 100, *, seed: int) -> Tensor:
    """A group of at most ``max_items`` for each item among those that share its SID (the suffix of CQ-SID).

    A SID of ``n`` items has ``ceil(n / max_items)`` groups, at most ``max_groups``; then they hold more than
    ``max_items`` each. Items are dealt to the groups at random, and the groups of a SID differ by at most one item.

    Args:
        sids: int64 ``[N, L]``.
        max_items, max_groups: at least 1.
        seed: of the deal.

    Returns:
        int64 ``[N]`` in ``[0, max_groups)``: 0 for SIDs of at most ``max_items`` items.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> groups = rx.sids.split_clusters(torch.tensor([[7], [7], [7], [8]]), max_items=2, seed=0)
        >>> groups[:3].bincount(), groups[3]
        (tensor([2, 1]), tensor(0))
    """
    tensor = _check.integer_tensor(sids, "sids", 2)
    if not tensor.shape[1]:
        raise ValueError(f"sids must have at least one level, got shape {tuple(tensor.shape)}")
    _check.integer(max_items, "max_items", 1)
    _check.integer(max_groups, "max_groups", 1)
    _check.integer(seed, "seed", 0)
    clusters = ranks(tensor)
    # The place of each item in a random order of its cluster: groups take them in turn.
    order = torch.randperm(len(tensor), generator=torch.Generator().manual_seed(seed))
    order = order[clusters[order].argsort(stable=True)]
    counts = torch.bincount(clusters)
    places = torch.empty_like(clusters)
    places[order] = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[clusters[order]]
    groups = ((counts + max_items - 1) // max_items).clamp(max=max_groups)
    return places % groups[clusters]
