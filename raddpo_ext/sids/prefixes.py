"""The prefixes of SIDs by number."""

from __future__ import annotations

import torch
from torch import Tensor


def numbered(sids: Tensor) -> Tensor:
    """For each item and level, the number of its prefix up to there: int64 ``[N, L]``, from 0 within each level.

    Numbers are in the order of the prefixes.
    """
    numbers = torch.empty_like(sids)
    prefix = torch.zeros(len(sids), dtype=torch.int64)
    for level in range(sids.shape[1]):
        codes = sids[:, level].unique(return_inverse=True)[1]
        width = int(codes.max()) + 1 if len(codes) else 1
        prefix = (prefix * width + codes).unique(return_inverse=True)[1]  # at most N * N: no overflow
        numbers[:, level] = prefix
    return numbers
