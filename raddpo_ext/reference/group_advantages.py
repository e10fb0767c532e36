"""Group advantages in plain Python, one group after another; arguments as in raddpo_ext.group_advantages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from raddpo_ext.losses.session import SessionBatch
from raddpo_ext.policy.group_advantages import Advantages
from raddpo_ext.reference.sessions import Sid, positive_rows, sids_of

Weighted = list[tuple[float, float]]  # values, each with its weight


def group_advantages(
    rewards: Tensor,
    sessions: SessionBatch,
    *,
    credit: str = "sequence",
    scale: str = "group",
    baseline: str | Tensor = "mean",
    weights: Tensor | None = None,
    experts: str = "group",
    targets: SessionBatch | None = None,
    level_weights: Sequence[float] | Tensor | None = None,
    contiguous: bool = True,
    blend: float = 1.0,
    eps: float = 1e-6,
) -> Advantages:
    """See :func:`raddpo_ext.group_advantages`."""
    sids, r = sids_of(sessions), rewards.tolist()
    w = [1.0] * len(r) if weights is None else weights.tolist()
    levels = sessions.tokens.shape[1]
    per_level = [1.0] * levels if level_weights is None else torch.as_tensor(level_weights).tolist()
    rows_of = [_counted_rows(sessions, s, r, w, experts) for s in range(sessions.num_sessions)]
    everything = [(r[i], w[i]) for rows in rows_of for i in rows]
    truths = _truths(sessions, targets)

    values: list[float | list[float]] = [0.0 if credit == "sequence" else [0.0] * levels for _ in r]
    active = []
    for s, rows in enumerate(rows_of):
        group = [(r[i], w[i]) for i in rows]
        active.append(len({reward for reward, _ in group}) > 1)
        if not active[-1]:
            continue
        if credit == "marginal":
            marginals = {i: _marginals(sids[i], truths[s], per_level, contiguous) for i in rows}
            tokens = [_standardised(_at(marginals, level), w, eps) for level in range(levels)]
            for i in rows:
                values[i] = [tokens[level].get(i, 0.0) for level in range(levels)]
            continue
        divisor = 1.0 if scale == "none" else _std(group if scale == "group" else everything) + eps
        for k, i in enumerate(rows):
            if isinstance(baseline, Tensor):
                expected = float(baseline[s])
            else:
                expected = _mean(group if baseline == "mean" else group[:k] + group[k + 1 :])
            sequence = (r[i] - expected) / divisor
            if credit == "sequence":
                values[i] = sequence
            else:
                siblings = _siblings(sids[i], [(sids[j], r[j], w[j]) for j in rows], eps)
                blended = [blend * sibling + (1 - blend) * sequence for sibling in siblings]
                values[i] = blended + [0.0] * (levels - len(blended))

    dtype = torch.promote_types(rewards.dtype, torch.float32)
    gates = None
    if credit == "marginal":
        table = [[0.0] * levels for _ in r]
        for i, s in enumerate(sessions.owners().tolist()):
            for level in range(len(sids[i])):
                hits = _match(sids[i][:level], truths[s], [1.0] * levels, contiguous)
                table[i][level] = hits / level if level else 1.0
        gates = torch.tensor(table, dtype=dtype, device=rewards.device).view(len(r), levels)
    shape = (len(r),) if credit == "sequence" else (len(r), levels)
    return Advantages(
        torch.tensor(values, dtype=dtype, device=rewards.device).view(shape),
        torch.tensor(active, dtype=torch.bool, device=rewards.device),
        gates,
    )


def _counted_rows(sessions: SessionBatch, s: int, r: list[float], w: list[float], experts: str) -> list[int]:
    left_out = positive_rows(sessions, s) if experts == "nll" else []
    rows = range(int(sessions.offsets[s]), int(sessions.offsets[s + 1]))
    return [i for i in rows if sessions.lengths[i] > 0 and not math.isnan(r[i]) and w[i] > 0 and i not in left_out]


def _mean(values: Weighted) -> float:
    if len({value for value, _ in values}) == 1:
        return values[0][0]
    return math.fsum(w * value for value, w in values) / math.fsum(w for _, w in values)


def _std(values: Weighted, unbiased: bool = True) -> float:
    """With weights, the unbiased one divides by ``W - sum w^2 / W``, which is ``n - 1`` for equal weights."""
    mean, total = _mean(values), math.fsum(w for _, w in values)
    freedom = total - math.fsum(w * w for _, w in values) / total if unbiased else total
    return math.sqrt(math.fsum(w * (value - mean) ** 2 for value, w in values) / freedom)


def _standardised(values: dict[int, float], w: list[float], eps: float) -> dict[int, float]:
    """The z-score of each row's value, or nothing where all values are equal."""
    if len(set(values.values())) < 2:
        return {}
    weighted = [(value, w[i]) for i, value in values.items()]
    mean, std = _mean(weighted), _std(weighted)
    return {i: (value - mean) / (std + eps) for i, value in values.items()}


def _siblings(sid: Sid, rows: list[tuple[Sid, float, float]], eps: float) -> list[float]:
    """The advantage of each token of a SID among the tokens that follow the same prefix in rows (SID, reward,
    weight).
    """
    advantages = []
    for level in range(len(sid)):
        through: dict[int, Weighted] = {}
        for other, reward, weight in rows:
            if len(other) > level and other[:level] == sid[:level]:
                through.setdefault(other[level], []).append((reward, weight))
        scores = {token: _mean(group) for token, group in through.items()}
        if len(set(scores.values())) < 2:
            advantages.append(0.0)
            continue
        population = [(score, 1.0) for score in scores.values()]
        std = _std(population, unbiased=False)
        advantages.append((scores[sid[level]] - _mean(population)) / (std + eps))
    return advantages


def _truths(sessions: SessionBatch, targets: SessionBatch | None) -> list[list[Sid]]:
    """The ground truth of each group: all rows of ``targets``, or the group's experts."""
    sids = sids_of(sessions if targets is None else targets)
    if targets is None:
        return [[sids[row] for row in positive_rows(sessions, s)] for s in range(sessions.num_sessions)]
    return [sids[first:last] for first, last in pairwise(targets.offsets.tolist())]


def _match(sid: Sid, truth: list[Sid], per_level: list[float], contiguous: bool) -> float:
    """``R``: the largest weight of the tokens that the SID has in common with a target."""
    most = 0.0
    for target in truth:
        total = 0.0
        for token, other, weight in zip(sid, target, per_level, strict=False):
            if token == other:
                total += weight
            elif contiguous:
                break
        most = max(most, total)
    return most


def _marginals(sid: Sid, truth: list[Sid], per_level: list[float], contiguous: bool) -> list[float]:
    matches = [_match(sid[:length], truth, per_level, contiguous) for length in range(len(sid) + 1)]
    return [after - before for before, after in pairwise(matches)]


def _at(marginals: dict[int, list[float]], level: int) -> dict[int, float]:
    """The rows that reach a level, with what they earn there."""
    return {i: marginal[level] for i, marginal in marginals.items() if level < len(marginal)}
