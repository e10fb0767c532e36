"""Metrics of retrieval and of alignment: one value a query, so that two models can be compared query by query."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.losses.session import SessionBatch


def retrieval_metrics(found: Tensor, wanted: Tensor, ks: Sequence[int] = (5, 10, 50)) -> dict[str, Tensor]:
    """Recall, NDCG and MRR of each query, for items or for SIDs.

    With ``W`` the query's distinct wanted ones and ``rank(w)`` the first place of ``w`` among the found, from 1:

    - ``recall@k = |{w in W: rank(w) <= k}| / |W|``: the multi-label recall, with one wanted the hit rate.
    - ``ndcg@k = sum_{w: rank(w) <= k} 1 / log2(1 + rank(w)) / sum_{r = 1}^{min(k, |W|)} 1 / log2(1 + r)``.
    - ``mrr = 1 / min_w rank(w)``, 0 if none is among the ``R`` found.

    What is found twice counts at its first place; the second one gains nothing and still takes up its place.

    Args:
        found: integers, best first: items ``[B, R]`` or SIDs' codes ``[B, R, L]``. -1 pads: an item of -1 and a SID of
            nothing but -1 are empty places; a shorter SID ends in -1.
        wanted: integers ``[B, P]``, or ``[B, P, L]`` where ``found`` holds SIDs; padded likewise, in any order.
        ks: cut-offs from 1 to ``R``. Where fewer can be found than a cut-off asks for, pad ``found`` to it.

    Returns:
        float64 ``[B]`` each: ``recall@k`` and ``ndcg@k`` for every ``k``, and ``mrr``.

    Raises:
        ValueError: also for a query without a wanted one, for which there is no recall: leave such queries out. Values
            are checked on every device, which on CUDA synchronises.
        TypeError: not tensors of integers.
    """
    found, wanted = _places(found, "found"), _places(wanted, "wanted")
    if found.device != wanted.device:
        raise ValueError(f"wanted must be on the device of found, {found.device}, got {wanted.device}")
    if len(found) != len(wanted) or found.shape[2:] != wanted.shape[2:]:
        raise ValueError(
            f"found and wanted must be [B, R] and [B, P], or [B, R, L] and [B, P, L], got {tuple(found.shape)} and "
            f"{tuple(wanted.shape)}"
        )
    cuts = [_check.integer(k, f"ks[{i}]", 1) for i, k in enumerate(ks)]
    if max(cuts, default=0) > found.shape[1]:
        raise ValueError(f"ks asks for {max(cuts)} places, but found has {found.shape[1]}; pad it with -1")
    ranks, count = _ranks(found, wanted)
    _check.none(count == 0, lambda row: f"wanted[{row}] is empty; leave out queries without a wanted item")

    gains = (ranks + 1).log2().reciprocal()
    ideal = torch.arange(2.0, 2 + max(wanted.shape[1], 1), dtype=torch.float64, device=found.device)
    ideal = ideal.log2().reciprocal().cumsum(0)
    metrics = {}
    for k in cuts:
        hit = ranks <= k
        metrics[f"recall@{k}"] = hit.sum(1) / count
        metrics[f"ndcg@{k}"] = torch.where(hit, gains, 0.0).sum(1) / ideal[count.long().clamp(1, k) - 1]
    metrics["mrr"] = ranks.amin(1).reciprocal() if ranks.shape[1] else count
    return metrics


def invalid_share(index: TrieIndex, sids: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The share of each query's generated SIDs that no item has, as an unconstrained search makes them.

    Args:
        index: the catalogue.
        sids: integer codes ``[B, R, L]``. By default a SID ends with its last code that is not -1, and one of nothing
            but -1 is an empty place, which is not counted. A token that is no code is given as any number that is none.
        lengths: integers ``[B, R]`` in ``[0, L]``, the codes of each SID; 0 is an empty place.

    Returns:
        float64 ``[B]`` on the index's device; 0 for a query of empty places only.

    Raises:
        ValueError, TypeError: naming the argument and the value.
    """
    _check.instance(index, "index", TrieIndex)
    _check.instance(sids, "sids", Tensor)
    sids = _check.integer_tensor(sids, "sids", 3)
    queries, places, levels = sids.shape
    if lengths is None:
        ends = torch.where(sids != -1, torch.arange(1, levels + 1, device=sids.device), 0)
        lengths = ends.amax(2) if levels else ends.sum(2)
    else:
        lengths = _check.integer_tensor(lengths, "lengths", 2)
        if lengths.shape != sids.shape[:2]:
            raise ValueError(f"lengths must have shape {(queries, places)}, got {tuple(lengths.shape)}")
    ends = _check.lengths(lengths.flatten(), queries * places, 0, levels).to(index.device)
    invalid = ~index.contains(sids.flatten(0, 1), ends) & (ends > 0)
    shape = (queries, places)
    counted = (ends > 0).view(shape).sum(1)
    return invalid.view(shape).sum(1).double() / counted.clamp(min=1)


def squeezing(before: Tensor, after: Tensor, sessions: SessionBatch) -> dict[str, Tensor]:
    """How far training moved the log-probs of the winners, the further positives and the negatives.

    The drift of a candidate is the sum of its tokens' log-probs after training less that before. Preference training
    squeezes where the further positives fall though nothing speaks against them.

    Args:
        before: float ``[C, L]`` token log-probs, read within the lengths.
        after: the same of the trained model.
        sessions: the candidates.

    Returns:
        ``winner``, ``positives`` (without the winners) and ``negatives``: the mean drift in nats, float64 scalars, 0
        where there is no such candidate. Candidates of length 0 are left out.

    Raises:
        ValueError: also for a log-prob that is not finite (on CUDA this synchronises).
        TypeError: not floating point.
    """
    _check.instance(sessions, "sessions", SessionBatch)
    sums = {name: _summed(value, name, sessions) for name, value in (("before", before), ("after", after))}
    drift = sums["after"] - sums["before"]
    positive = sessions.is_positive()
    first = torch.arange(sessions.num_candidates, device=sessions.device) == sessions.offsets[sessions.owners()]
    groups = {"winner": positive & first, "positives": positive & ~first, "negatives": ~positive}
    counted = sessions.lengths > 0
    return {
        name: torch.where(group & counted, drift, 0.0).sum() / (group & counted).sum().clamp(min=1)
        for name, group in groups.items()
    }


def _places(value: Tensor, name: str) -> Tensor:
    """int64 ``[B, R]`` or ``[B, R, L]``, padded with -1."""
    _check.instance(value, name, Tensor)
    ids = _check.integer_tensor(value, name, 3 if value.dim() == 3 else 2)
    if bool((ids < -1).any()):
        raise ValueError(f"{name} must be >= 0, or -1 for padding, got {int(ids.min())}")
    if ids.dim() == 3:
        inside = ((ids[..., 1:] >= 0) & (ids[..., :-1] < 0)).flatten(1).any(1)
        _check.none(
            inside, lambda row: f"{name}[{row}] holds a SID with -1 before a code; -1 may only follow the codes"
        )
    return ids


def _ranks(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The first place of each wanted one, from 1, infinite where it is not found or a repeat: float64 ``[B, P]``; and
    how many distinct wanted ones there are: float64 ``[B]``."""
    if found.dim() == 2:
        found, wanted = found[..., None], wanted[..., None]
    real = (wanted >= 0).any(2)
    same = (wanted[:, :, None] == wanted[:, None]).all(3)
    real &= ~same.tril(-1).any(2)
    hits = (wanted[:, :, None] == found[:, None]).all(3)
    places = torch.arange(1.0, 1 + found.shape[1], dtype=torch.float64, device=found.device)
    ranks = torch.where(hits & real[..., None], places, math.inf)
    least = ranks.amin(2) if found.shape[1] else ranks.new_full(real.shape, math.inf)
    return least, real.sum(1).double()


def _summed(logps: Tensor, name: str, sessions: SessionBatch) -> Tensor:
    """Each candidate's log-prob: float64 ``[C]``."""
    _check.instance(logps, name, Tensor)
    if not logps.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {logps.dtype}")
    if logps.shape != sessions.tokens.shape or logps.device != sessions.device:
        raise ValueError(
            f"{name} must have the shape and device of sessions.tokens, {tuple(sessions.tokens.shape)} on "
            f"{sessions.device}, got {tuple(logps.shape)} on {logps.device}"
        )
    inside = torch.where(sessions.mask(), logps.detach().double(), 0.0)
    _check.none(~inside.isfinite().all(1), lambda row: f"{name}[{row}] holds a log-prob that is not finite")
    return inside.sum(1)
