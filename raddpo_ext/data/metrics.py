"""Metrics of retrieval and of alignment: one value per query, so that two models can be compared query by query."""

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

    ``W`` is the set of a query's wanted items and ``rank(w)`` the first position of ``w`` in ``found``, counted from 1:

    - ``recall@k = |{w in W: rank(w) <= k}| / |W|``: the multi-label recall; with one wanted item, the hit rate.
    - ``ndcg@k = sum_{w: rank(w) <= k} 1 / log2(1 + rank(w)) / sum_{r = 1}^{min(k, |W|)} 1 / log2(1 + r)``.
    - ``mrr = 1 / min_w rank(w)``, 0 if no wanted item is found.

    An item that is found twice counts at its first position. The repeat keeps its position but gains nothing.

    Args:
        found: integers, best first: items ``[B, R]`` or SIDs' codes ``[B, R, L]``. -1 is padding:
            an item of -1 and a SID of only -1 are empty positions, and a shorter SID ends in -1.
        wanted: integers ``[B, P]``, or ``[B, P, L]`` where ``found`` holds SIDs; padded in the same way, in any order.
        ks: cut-offs from 1 to ``R``. If a search finds fewer items than that, pad ``found`` with -1.

    Returns:
        ``recall@k`` and ``ndcg@k`` for every ``k``, and ``mrr``: float64 ``[B]`` each.

    Raises:
        ValueError: shapes or values are wrong, or a query has no wanted item: its recall is undefined, leave it out.
            Values are checked on every device, which synchronises on CUDA.
        TypeError: the arguments are not tensors of integers.

    Example:
        >>> found = torch.tensor([[4, 7, 9]])
        >>> metrics = rx.metrics.retrieval_metrics(found, torch.tensor([[7]]), ks=[1, 3])
        >>> {name: round(float(value), 3) for name, value in metrics.items()}
        {'recall@1': 0.0, 'ndcg@1': 0.0, 'recall@3': 1.0, 'ndcg@3': 0.631, 'mrr': 0.5}
    """
    found, wanted = _places(found, "found"), _places(wanted, "wanted")
    # Shapes and cut-offs.
    if found.device != wanted.device:
        raise ValueError(f"wanted must be on the device of found, {found.device}, got {wanted.device}")
    if len(found) != len(wanted) or found.shape[2:] != wanted.shape[2:]:
        raise ValueError(
            f"found and wanted must be [B, R] and [B, P], or [B, R, L] and [B, P, L], got {tuple(found.shape)} and "
            f"{tuple(wanted.shape)}"
        )
    cuts = [_check.integer(k, f"ks[{i}]", 1) for i, k in enumerate(ks)]
    if max(cuts, default=0) > found.shape[1]:
        raise ValueError(
            f"ks must be at most {found.shape[1]}, the columns of found, got {max(cuts)}; pad found with -1"
        )
    ranks, count = _ranks(found, wanted)
    _check.none(count == 0, lambda row: f"wanted[{row}] is empty; leave out queries without a wanted item")

    # A rank of infinity gains 0. The ideal gain has the wanted items at the first positions.
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
    """The share of each query's SIDs that no item has. An unconstrained search generates such SIDs.

    Args:
        index: the catalogue.
        sids: integer codes ``[B, R, L]``. By default a SID ends with its last code that is not -1, and a SID of only
            -1 is an empty position, which is not counted. For a token that is not a code, give any number that is not
            a code.
        lengths: integers ``[B, R]`` in ``[0, L]``, the number of codes of each SID; 0 for an empty position.

    Returns:
        float64 ``[B]`` on the index's device; 0 for a query of empty positions only.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [2, 3]])
        >>> rx.metrics.invalid_share(index, torch.tensor([[[0, 1], [0, 3]]]))
        tensor([0.5000], dtype=torch.float64)
    """
    _check.instance(index, "index", TrieIndex)
    _check.instance(sids, "sids", Tensor)
    sids = _check.integer_tensor(sids, "sids", 3)
    queries, places, levels = sids.shape
    # The length of each SID: as given, or up to its last code that is not -1.
    if lengths is None:
        ends = torch.where(sids != -1, torch.arange(1, levels + 1, device=sids.device), 0)
        lengths = ends.amax(2) if levels else ends.sum(2)
    else:
        lengths = _check.integer_tensor(lengths, "lengths", 2)
        if lengths.shape != sids.shape[:2]:
            raise ValueError(f"lengths must have shape {(queries, places)}, got {tuple(lengths.shape)}")
    # Empty positions are neither invalid nor counted.
    ends = _check.lengths(lengths.flatten(), queries * places, 0, levels).to(index.device)
    invalid = ~index.contains(sids.flatten(0, 1), ends) & (ends > 0)
    shape = (queries, places)
    counted = (ends > 0).view(shape).sum(1)
    return invalid.view(shape).sum(1).double() / counted.clamp(min=1)


def squeezing(before: Tensor, after: Tensor, sessions: SessionBatch) -> dict[str, Tensor]:
    """How far training moved the log-probs of the winners, the further positives and the negatives.

    The drift of a candidate is the sum of its tokens' log-probs after training minus the sum before. Preference
    training squeezes if the further positives drift down, although the data do not prefer anything to them.

    Args:
        before: token log-probs of the model before training, float ``[C, L]``. Values beyond the lengths are ignored.
        after: token log-probs of the trained model, float ``[C, L]``.
        sessions: the candidates.

    Returns:
        ``winner``, ``positives`` (without the winners) and ``negatives``: the mean drift in nats, float64 scalars, 0
        if there is no such candidate. Candidates of length 0 are skipped.

    Raises:
        ValueError: a shape or device is wrong, or a log-prob is not finite (this check synchronises on CUDA).
        TypeError: the log-probs are not floating point.

    Example:
        >>> tokens = torch.tensor([[3, 7], [3, 8], [4, 7]])  # a winner, a further positive and a negative
        >>> sessions = rx.SessionBatch(tokens, torch.tensor([2, 2, 2]), torch.tensor([0, 3]), torch.tensor([2]))
        >>> after = torch.tensor([[0.5, 0.5], [-1.0, 0.0], [-1.0, -2.0]])
        >>> {group: float(drift) for group, drift in rx.metrics.squeezing(torch.zeros(3, 2), after, sessions).items()}
        {'winner': 1.0, 'positives': -1.0, 'negatives': -3.0}
    """
    _check.instance(sessions, "sessions", SessionBatch)
    sums = {name: _summed(value, name, sessions) for name, value in (("before", before), ("after", after))}
    drift = sums["after"] - sums["before"]
    # Three groups of candidates: the first positive of each session is its winner.
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
    """The first position of each wanted item and the number of distinct wanted items: float64 ``[B, P]`` and ``[B]``.

    Positions are counted from 1, and infinite for an item that is not found or repeats an earlier one.
    """
    if found.dim() == 2:
        found, wanted = found[..., None], wanted[..., None]
    # Of repeated wanted items, only the first counts.
    real = (wanted >= 0).any(2)
    same = (wanted[:, :, None] == wanted[:, None]).all(3)
    real &= ~same.tril(-1).any(2)
    # The first position of each, or infinity.
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
