"""adaptive_lengths: short SIDs for what is rare, long ones for what is wanted often."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.sids.prefixes import numbered

READINGS = ("mass", "entropy")


def adaptive_lengths(
    sids: Tensor, weights: Any = None, *, budget: float, min_length: int = 1, reading: str = "mass"
) -> Tensor:
    """A length for each SID, after SA2CRQ's idea of adaptive lengths. Its equations are not public: both readings of it
    here are ours.

    A SID ends at its shortest prefix that is fine enough, or else at its last code. Whether a prefix is fine enough
    does not depend on the item, so that no shortened SID is a prefix of another; items whose SIDs become equal share
    one.

    - ``"mass"``: the prefix has at most ``2 ** -budget`` of the traffic.
    - ``"entropy"``: which of its items is wanted is uncertain by at most ``budget`` bits.

    Args:
        sids: int64 ``[N, L]``.
        weights: ``[N]`` traffic of each item, finite and not negative, with a positive sum. Default: 1 each.
        budget: bits, at least 0.
        min_length: at least this many codes are kept, from 1 to ``L``.
        reading: ``"mass"`` or ``"entropy"``.

    Returns:
        int64 ``[N]`` in ``[min_length, L]``, the ``lengths`` of :meth:`TrieIndex.build`.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> sids = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        >>> rx.sids.adaptive_lengths(sids, [8, 6, 1, 1], budget=2)
        tensor([2, 2, 1, 1])
    """
    tensor = _check.integer_tensor(sids, "sids", 2)
    items, levels = tensor.shape
    if not items or not levels:
        raise ValueError(f"sids must have at least one row and level, got shape {tuple(tensor.shape)}")
    _check.not_negative(budget, "budget")
    _check.integer(min_length, "min_length", 1, levels)
    _check.choice(reading, "reading", READINGS)
    traffic = _traffic(weights, items)
    lengths = torch.full((items,), levels)
    for level, prefix in reversed([*enumerate(numbered(tensor).T)][min_length - 1 : levels - 1]):
        mass = torch.zeros(int(prefix.max()) + 1, dtype=torch.float64).index_add_(0, prefix, traffic)
        if reading == "mass":
            fine = mass <= 2.0**-budget
        else:
            of_prefix = traffic / mass.clamp(min=torch.finfo(torch.float64).tiny)[prefix]
            bits = torch.zeros_like(mass).index_add_(0, prefix, -torch.xlogy(of_prefix, of_prefix)) / math.log(2)
            fine = bits <= budget
        lengths[fine[prefix]] = level + 1
    return lengths


def _traffic(weights: Any, items: int) -> Tensor:
    """Shares of the traffic: float64 ``[items]``."""
    if weights is None:
        return torch.full((items,), 1 / items, dtype=torch.float64)
    traffic = torch.as_tensor(weights).double()
    if traffic.shape != (items,):
        raise ValueError(f"weights must have one entry per row of sids ({items}), got shape {tuple(traffic.shape)}")
    _check.none(
        ~((traffic >= 0) & traffic.isfinite()),
        lambda row: f"weights[{row}] must be finite and at least 0, got {float(traffic[row])}",
    )
    if not bool(traffic.sum() > 0):
        raise ValueError("weights must have a positive sum, got 0")
    return traffic / traffic.sum()
