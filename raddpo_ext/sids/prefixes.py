"""The prefixes of SIDs by number."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 2**62  # of a key


def numbered(sids: Tensor) -> Tensor:
    """For each item and level, the number of its prefix up to there: int64 ``[N, L]``, from 0 within each level.

    Numbers are in the order of the prefixes.
    """
    return torch.stack([ranks(sids[:, : level + 1]) for level in range(sids.shape[1])], 1)


def ranks(codes: Tensor) -> Tensor:
    """For each row of codes, its place among the different rows in their order: int64 ``[N]``."""
    keys, count = torch.zeros(len(codes), dtype=torch.int64), 1
    for column in codes.long().T if len(codes) else ():
        low = int(column.min())
        width = int(column.max()) - low + 1
        if count * width > _LARGEST:
            keys = keys.unique(return_inverse=True)[1]
            count = int(keys.max()) + 1
        if count * width > _LARGEST:  # codes far apart
            column = column.unique(return_inverse=True)[1]
            low, width = 0, int(column.max()) + 1
        keys, count = keys * width + (column - low), count * width
    return keys.unique(return_inverse=True)[1]
