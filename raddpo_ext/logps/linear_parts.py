"""Chooses which rows of the hidden states linear_token_logps multiplies by which rows of the head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raddpo_ext.logps.softmax_support import Lists, SoftmaxSupport

_IGNORED = -1  # marks ignored targets of a part: the user's ignore_index may be the number of one of its columns


class Part(NamedTuple):
    """Rows of the hidden states that are multiplied by the same rows of the head, in one product ``[R, N]``.

    Attributes:
        rows: int64 ``[R]``, None for all of them in order.
        first: the head's rows are ``first : first + width``, where ``columns`` is None.
        width: ``N``.
        columns: otherwise, int64 ``[N]`` rows of the head, ascending.
        targets: int64 ``[R]`` columns of the product; ``ignored`` for a target that is ignored or outside its support.
        ignored: a number that is not a column.
        outside: bool ``[R]``: targets outside their support, or None if there are none.
        lists: each row's support in columns of the product; None for all columns.
        num_targets: exclusive upper bound of the targets, ``N`` by default. A target that is at least ``N`` has no
            column: only the softmax of its row is computed.
    """

    rows: Tensor | None
    first: int
    width: int
    columns: Tensor | None
    targets: Tensor
    ignored: int
    outside: Tensor | None
    lists: Lists | None
    num_targets: int | None = None


def parts_of(
    targets: Tensor, support: SoftmaxSupport | None, num_columns: int, ignore_index: int, skip_ignored: bool
) -> list[Part]:
    """The parts that cover every row whose log-prob must be computed.

    Args:
        targets: int64 ``[T]``.
        support: shaped like ``targets``, or None for the whole vocabulary.
        skip_ignored: skip ignored rows, which reads values.
    """
    # The whole vocabulary: one part, of all rows or of those that are not ignored.
    if len(targets) == 0:
        return []
    if support is None:
        if skip_ignored:
            ignored = targets == ignore_index
            if bool(ignored.any()):
                some = (~ignored).nonzero()[:, 0]
                part = Part(some, 0, num_columns, None, targets[some], ignore_index, None, None)
                return [part] if len(some) else []
        return [Part(None, 0, num_columns, None, targets, ignore_index, None, None)]
    if torch.compiler.is_compiling() and not support.period:  # a graph's shapes cannot depend on values
        return [Part(None, 0, num_columns, None, targets, ignore_index, None, support.lists)]
    # A support: one part per group, as its rows share most of their columns.
    parts = []
    for group in range(support.num_groups):
        rows = _rows_of_group(targets, support, group, ignore_index, skip_ignored)
        if rows is None:
            continue
        if support.vocab is None:
            parts.append(_of_depth(rows, targets[rows], support))
        else:
            parts.append(_of_level(rows, targets[rows], support, group, ignore_index, skip_ignored))
    return parts


def _rows_of_group(
    targets: Tensor, support: SoftmaxSupport, group: int, ignore_index: int, skip_ignored: bool
) -> Tensor | None:
    """The rows of a group, None if there are none."""
    # The group is a position of the last dimension, so its rows are known without reading values.
    if support.period and not skip_ignored:
        if group >= support.period:
            return None
        return torch.arange(group, len(targets), support.period, device=targets.device)
    rows = ((support.groups == group) & (targets != ignore_index)).nonzero()[:, 0]
    return rows if len(rows) else None


def _of_level(
    rows: Tensor, targets: Tensor, support: SoftmaxSupport, level: int, ignore_index: int, skip_ignored: bool
) -> Part:
    """The part of a level: its rows of the head are those of the level's tokens."""
    assert support.vocab is not None
    begin, width, first, consecutive = support.vocab.level_runs[level]
    columns: Tensor | None = None
    # The targets as columns of the part.
    if consecutive:
        local = targets - first
        outside = (local < 0) | (local >= width)
    else:
        columns = support.lists.columns[begin : begin + width].to(torch.int64)
        local, outside = _find(columns, targets)
    # Ignored targets are not outside of their support.
    counted = targets != ignore_index
    local = torch.where(outside | ~counted, _IGNORED, local)
    outside = outside & counted
    outside_or_none = None if skip_ignored and not bool(outside.any()) else outside
    return Part(rows, first, width, columns, local, _IGNORED, outside_or_none, None)


def _of_depth(rows: Tensor, targets: Tensor, support: SoftmaxSupport) -> Part:
    """The part of a depth: its rows of the head are those of the children of any of its prefixes."""
    all_lists = support.lists
    # Supports that begin at the same place are the children of one node: take each node's children once.
    begins, which = all_lists.begins[rows].unique(return_inverse=True)
    counts = torch.zeros_like(begins).scatter_(0, which, all_lists.counts[rows])
    ends = counts.cumsum(0)
    starts = ends - counts
    places = torch.arange(int(ends[-1]), device=rows.device) + torch.repeat_interleave(begins - starts, counts)
    columns, lists = all_lists.columns[places].to(torch.int64), None
    # Several nodes: multiply the union of their children once, and list each node's in it.
    if len(begins) > 1:
        columns, numbers = columns.unique(return_inverse=True)
        lists = Lists(numbers.to(torch.int32), starts[which], counts[which])
    local, outside = _find(columns, targets)
    return Part(rows, 0, len(columns), columns, torch.where(outside, _IGNORED, local), _IGNORED, outside, lists)


def _find(columns: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each target in ascending ``columns``, and a mask of the targets that are not there."""
    place = torch.searchsorted(columns, targets).clamp(max=len(columns) - 1)
    return place, columns[place] != targets
