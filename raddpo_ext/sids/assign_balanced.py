"""assign_balanced: nearest codes, each for at most so many rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.sids.codebooks import Codebooks
from raddpo_ext.sids.embeddings import check_embeddings, chunks
from raddpo_ext.sids.residual_kmeans import Level


def assign_balanced(x: Tensor | np.ndarray, codebook: Tensor, capacity: int) -> Tensor:
    """Each row's nearest code that has fewer than ``capacity`` rows yet, in the order of the rows.

    Ties go to the lower code. Earlier rows choose first: order the rows by importance, or shuffle them. For the next
    level subtract ``codebook[codes]`` from the rows.

    Args:
        x: floating-point ``[N, D]`` on the CPU; read in chunks.
        codebook: float32 ``[K, D]``, such as a level of :class:`Codebooks`.
        capacity: rows that each code takes. ``K * capacity`` must be at least ``N``.

    Returns:
        int64 ``[N]``.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [0.2], [1.0]])
        >>> rx.sids.assign_balanced(x, torch.tensor([[0.0], [1.0]]), capacity=2)
        tensor([0, 0, 1, 1])
    """
    check_embeddings(x)
    book = Codebooks((codebook,)).levels[0]
    if x.shape[1] != book.shape[1]:
        raise ValueError(f"x must have the codebook's {book.shape[1]} columns, got {x.shape[1]}")
    _check.integer(capacity, "capacity", 1, 2**31 - 1)
    if capacity * len(book) < len(x):
        raise ValueError(f"capacity must be at least {-(-len(x) // len(book))} for {len(x)} rows, got {capacity}")
    room = torch.full((1, len(book)), capacity, dtype=torch.int32)
    codes, level = torch.empty(len(x), dtype=torch.int64), Level.of(book)
    for rows, part in chunks(x):
        codes[rows] = torch.ops.raddpo.assign_balanced(level.distances(part), room, None)
    return codes


@torch.library.register_fake("raddpo::assign_balanced")
def _(distances: Tensor, room: Tensor, groups: Tensor | None) -> Tensor:
    return distances.new_empty(len(distances), dtype=torch.int64)
