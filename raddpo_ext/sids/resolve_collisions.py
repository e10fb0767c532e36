"""resolve_collisions: SIDs of which each names one item."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.sids.codebooks import Codebooks, check_codes
from raddpo_ext.sids.embeddings import CHUNK, check_embeddings, rows_of
from raddpo_ext.sids.prefixes import ranks
from raddpo_ext.sids.residual_kmeans import Level

MODES = ("nearest_free", "extra_level", "keep")
_ROOM = 1 << 24  # entries of the table of free codes


class ResolvedSIDs(NamedTuple):
    """SIDs as :meth:`TrieIndex.build` takes them.

    Attributes:
        sids: int64 ``[N, L]``, or ``[N, L + 1]`` with -1 beyond the end of a shorter SID.
        lengths: int64 ``[N]``, or None if all SIDs have ``L`` codes.
    """

    sids: Tensor
    lengths: Tensor | None


def resolve_collisions(
    sids: Tensor, x: Tensor | np.ndarray, codebooks: Codebooks, mode: str = "nearest_free"
) -> ResolvedSIDs:
    """Change the SIDs that several items share.

    - ``"nearest_free"``: of the items that share a SID, the one nearest to its last code's vector keeps it. The others,
      nearer ones first and SIDs in their order, take the nearest last code that no item has under the same prefix. If
      the prefix has no free code left, the items that still share the SID get an extra level, as below.
    - ``"extra_level"``: the items that share a SID are numbered at one more level, the nearest with 0. Other SIDs keep
      their length, so that none is a prefix of another.
    - ``"keep"``: nothing is changed.

    Ties go to the lower row and code.

    Args:
        sids: int64 ``[N, L]``, of ``codebooks``.
        x: the embeddings, floating-point ``[N, D]`` on the CPU; only those of colliding items are read.
        codebooks: of ``L`` levels.
        mode: as above.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> x = torch.tensor([[0.4], [0.1], [9.0]])
        >>> books = rx.sids.Codebooks((torch.tensor([[0.0], [1.0], [9.0]]),))
        >>> sids = rx.sids.encode(x, books)
        >>> rx.sids.resolve_collisions(sids, x, books).sids.tolist()
        [[1], [0], [2]]
        >>> rx.sids.resolve_collisions(sids, x, books, mode="extra_level")
        ResolvedSIDs(sids=tensor([[ 0,  1],
                [ 0,  0],
                [ 2, -1]]), lengths=tensor([2, 2, 1]))
    """
    _check.choice(mode, "mode", MODES)
    _check.instance(codebooks, "codebooks", Codebooks)
    check_codes(sids, "sids", codebooks.sizes)
    check_embeddings(x)
    if tuple(x.shape) != (len(sids), codebooks.dim):
        raise ValueError(f"x must have shape {(len(sids), codebooks.dim)}, got {tuple(x.shape)}")
    if mode == "keep":
        return ResolvedSIDs(sids, None)
    order, places = _by_distance(sids, x, codebooks)
    if mode == "nearest_free":
        movers = order[places > 0]
        moved = _nearest_free(sids, movers, x, codebooks)
        found = moved >= 0
        sids = sids.clone()
        sids[movers[found], -1] = moved[found]
        order, places = _shared(sids, order)
    if not len(order):
        return ResolvedSIDs(sids, None)
    extra = torch.full((len(sids), 1), -1)
    extra[order, 0] = places
    return ResolvedSIDs(torch.cat([sids, extra], 1), torch.full((len(sids),), sids.shape[1]) + (extra[:, 0] >= 0))


def _by_distance(sids: Tensor, x: Tensor | np.ndarray, codebooks: Codebooks) -> tuple[Tensor, Tensor]:
    """As :func:`_shared`, the items of a SID by their distance to its last vector."""
    rows = _shared(sids, torch.arange(len(sids)))[0].sort().values
    distances = torch.empty(len(rows))
    for begin in range(0, len(rows), CHUNK):
        part = rows[begin : begin + CHUNK]
        distances[begin : begin + CHUNK] = (rows_of(x, part) - codebooks.decode(sids[part])).square().sum(1)
    return _shared(sids, rows[distances.argsort(stable=True)])


def _shared(sids: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``order`` whose SID another one has, SIDs in their order and otherwise in that of ``order``; and the
    place of each among those of its SID."""
    numbers = ranks(sids[order])
    counts = torch.bincount(numbers)
    several = counts[numbers] > 1
    order, numbers = order[several], numbers[several]
    counts = torch.where(counts > 1, counts, 0)
    by_sid = numbers.argsort(stable=True)
    return order[by_sid], torch.arange(len(order)) - (counts.cumsum(0) - counts)[numbers[by_sid]]


def _nearest_free(sids: Tensor, movers: Tensor, x: Tensor | np.ndarray, codebooks: Codebooks) -> Tensor:
    """The last codes that ``movers`` take, which are in the order of their SIDs; -1 where none is free."""
    *before, book = codebooks.levels
    last = Level.of(book)
    moved = torch.empty_like(movers)
    if not len(movers):
        return moved
    prefixes = ranks(sids[:, :-1])
    full, groups = prefixes[movers].unique(return_inverse=True)  # prefixes with movers
    group_of_prefix = torch.full((int(prefixes.max()) + 1,), -1)
    group_of_prefix[full] = torch.arange(len(full))
    groups_of_items = group_of_prefix[prefixes]
    at_once = max(1, _ROOM // len(book))
    for first in range(0, len(full), at_once):
        # Which codes are free under each of some prefixes.
        inside = (groups_of_items >= first) & (groups_of_items < first + at_once)
        room = torch.ones(min(at_once, len(full) - first), len(book), dtype=torch.int32)
        room[groups_of_items[inside] - first, sids[inside, -1]] = 0
        begin, end = torch.searchsorted(groups, torch.tensor([first, first + at_once])).tolist()
        for at in range(begin, end, CHUNK):
            rows = movers[at : min(at + CHUNK, end)]
            residual = rows_of(x, rows)
            for level, vectors in enumerate(before):
                residual = residual - vectors[sids[rows, level]]
            distances = last.distances(residual)
            moved[at : at + len(rows)] = torch.ops.raddpo.assign_balanced(
                distances, room, groups[at : at + len(rows)] - first
            )
    return moved
