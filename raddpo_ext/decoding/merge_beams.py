"""merge_beams: the results of searches over the parts of a catalogue, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.decoding.beam_search import BeamResult


def merge_beams(parts: Sequence[BeamResult], top_k: int | None = None) -> BeamResult:
    """Merge the results of one batch of queries over the parts of a catalogue, each searched by itself.

    A catalogue that is too large for one process is split by its SIDs' first codes; each process searches its part with
    the same model, ``normalize="vocab"`` or ``"level"`` and length penalty, whose scores are then comparable. With
    ``"trie"`` they are not: a part's first codes compete only with each other.

    The result equals that of one search over the whole catalogue if no search drops a prefix, that is, if beam widths
    suffice for all. Otherwise each part is searched with a width of its own, so more prefixes live on in total.

    Args:
        parts: results over disjoint parts, for the same queries and on one device. Numbers of rows and levels may
            differ.
        top_k: rows per query; default: the largest number of a part.

    Returns:
        The ``top_k`` best rows, best first. Rows of equal scores keep the order of the parts. Rows beyond those found
        are empty: score ``-inf``, item -1.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> def found(item, score):
        ...     return rx.BeamResult(torch.tensor([[item]]), torch.tensor([[score]]), torch.tensor([[[item, 0]]]))
        >>> merged = rx.merge_beams([found(7, -2.0), found(9, -1.0)], top_k=2)
        >>> merged.items, merged.scores
        (tensor([[9, 7]]), tensor([[-1., -2.]]))
    """
    parts = list(parts)
    _check_parts(parts)
    rows = max(part.items.shape[1] for part in parts)
    count = rows if top_k is None else _check.width(top_k, "top_k")
    # All rows of a query side by side, padded to one number of levels and to at least as many rows as are asked for.
    scores = _joined([part.scores for part in parts], count, -torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    levels = max(part.sids.shape[2] for part in parts)
    sids = [F.pad(part.sids, (0, levels - part.sids.shape[2]), value=-1) for part in parts]
    wide = order[..., None].expand(-1, -1, levels)
    token_logps = None
    if parts[0].token_logps is not None:
        given = [part.token_logps for part in parts if part.token_logps is not None]
        columns = max(logps.shape[2] for logps in given)
        padded = [F.pad(logps, (0, columns - logps.shape[2])) for logps in given]
        token_logps = _joined(padded, count, 0.0).gather(1, order[..., None].expand(-1, -1, columns))
    return BeamResult(
        _joined([part.items for part in parts], count, -1).gather(1, order),
        scores.gather(1, order),
        _joined(sids, count, -1).gather(1, wide),
        token_logps,
    )


def _joined(tensors: list[Tensor], rows: int, padding: float) -> Tensor:
    """``[B, sum of R, ...]``, padded to at least ``rows`` rows per query."""
    joined = torch.cat(tensors, 1)
    missing = max(0, rows - joined.shape[1])
    return F.pad(joined, (*[0, 0] * (joined.dim() - 2), 0, missing), value=padding)


def _check_parts(parts: list[BeamResult]) -> None:
    if not parts:
        raise ValueError("parts must hold at least one result, got none")
    first = parts[0]
    for i, part in enumerate(parts):
        _check.instance(part, f"parts[{i}]", BeamResult)
        if (part.token_logps is None) != (first.token_logps is None):
            raise ValueError(f"parts[{i}].token_logps must be given in all parts or in none")
        # Rows of one shape and place within a part, and the same queries in all.
        shape, device = part.items.shape, first.items.device
        for name, tensor in part._asdict().items():
            if tensor is None:
                continue
            if tensor.shape[:2] != shape or tensor.dim() != 2 + (name in ("sids", "token_logps")):
                raise ValueError(
                    f"parts[{i}].{name} must have the {tuple(shape)} queries and rows of its items, got shape "
                    f"{tuple(tensor.shape)}"
                )
            if tensor.device != device:
                raise ValueError(f"parts[{i}].{name} must be on the device of parts[0], {device}, got {tensor.device}")
        if len(part.items) != len(first.items):
            raise ValueError(f"parts[{i}] must have the {len(first.items)} queries of parts[0], got {len(part.items)}")
        if bool(part.scores.isnan().any()):
            raise ValueError(f"parts[{i}].scores must not hold NaN")
