"""Rewards of rollouts, in plain torch on their device: float32 ``[C]``, for :func:`raddpo_ext.group_advantages`.

On a GPU :func:`match` and :func:`tiered` synchronise once per batch of targets, to read how many pairs to compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.losses.session import SessionBatch


def match(
    rollouts: SessionBatch,
    targets: SessionBatch,
    *,
    prefix_credit: Sequence[float] | Tensor | None = None,
    tiers: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """The best match of each row with the targets of its group.

    A match earns ``prefix_credit[k]`` times the target's tier, where ``k`` is the number of leading tokens in common;
    by default 1 if the SIDs are equal and 0 otherwise. Rows of length 0, and rows without a target, earn 0.

    Args:
        rollouts: the groups.
        targets: one session per group, on the same device: all of its candidates are ground truth.
        prefix_credit: ``[L + 1]`` numbers, from 0 tokens in common to all ``L`` of ``rollouts``.
        tiers: a number for each of the targets' candidates, such as 1 for an order and 0.5 for a click.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> groups = rx.SessionBatch(
        ...     torch.tensor([[1, 2], [1, 3], [4, 2]]), torch.full((3,), 2), torch.tensor([0, 3]), torch.tensor([0])
        ... )
        >>> truth = rx.SessionBatch(torch.tensor([[1, 3]]), torch.tensor([2]), torch.tensor([0, 1]), torch.tensor([1]))
        >>> rx.rewards.match(groups, truth)
        tensor([0., 1., 0.])
        >>> rx.rewards.match(groups, truth, prefix_credit=[0, 0.25, 1])
        tensor([0.2500, 1.0000, 0.0000])
    """
    _check_targets(rollouts, targets, "targets")
    row, target = _pairs(rollouts, targets)
    width = min(rollouts.tokens.shape[1], targets.tokens.shape[1])
    lengths, target_lengths = rollouts.lengths[row], targets.lengths[target]
    same = rollouts.tokens[row, :width] == targets.tokens[target, :width]
    same &= torch.arange(width, device=rollouts.device) < torch.minimum(lengths, target_lengths)[:, None]
    shared = same.cumprod(1).sum(1)
    if prefix_credit is None:
        credit = ((shared == lengths) & (shared == target_lengths)).float()
    else:
        credit = _numbers(prefix_credit, "prefix_credit", rollouts.tokens.shape[1] + 1, rollouts.device)[shared]
    if tiers is not None:
        credit = credit * _numbers(tiers, "tiers", targets.num_candidates, rollouts.device)[target]
    best = torch.zeros(rollouts.num_candidates, device=rollouts.device)
    best = best.scatter_reduce(0, row, credit, "amax", include_self=False)
    return torch.where(rollouts.lengths > 0, best, 0.0)


def ranking(hits: Tensor, sessions: SessionBatch) -> Tensor:
    """Penalise the rollouts that are no hit, the better they are ranked, in groups that have a hit (MiniOneRec).

    The rollout at rank ``i`` of its group, counted from 0 in the order of the rows (best first, as a beam search gives
    them), gets ``-a_i / sum a`` with ``a_i = 1 / log2(i + 2)`` and the sum over the group's rollouts. Hits, experts,
    and all rollouts of a group without a hit among them get 0.

    Args:
        hits: bool ``[C]``, for example ``rx.rewards.match(...) > 0``.
        sessions: the groups.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> groups = rx.SessionBatch(
        ...     torch.tensor([[1], [2], [3]]), torch.ones(3, dtype=torch.int64), torch.tensor([0, 3]), torch.tensor([0])
        ... )
        >>> rx.rewards.ranking(torch.tensor([False, True, False]), groups)
        tensor([-0.4693,  0.0000, -0.2346])
    """
    _check.instance(sessions, "sessions", SessionBatch)
    _check_rows(hits, "hits", sessions, torch.bool)
    owners, is_rollout = sessions.owners(), ~sessions.is_positive()
    first = (sessions.offsets[:-1] + sessions.num_positives)[owners]
    rank = (torch.arange(len(owners), device=sessions.device) - first).clamp(min=0)
    weight = torch.where(is_rollout, 1 / torch.log2(rank + 2.0), 0.0)
    hit = hits & is_rollout
    has_hit = _by_group(hit.float(), sessions, owners, "amax") > 0
    total = _by_group(weight, sessions, owners, "sum")
    return torch.where(has_hit & is_rollout & ~hit, -weight / total, 0.0)


def tiered(
    rollouts: SessionBatch,
    targets: SessionBatch,
    exposed: SessionBatch,
    valid: Tensor,
    *,
    rewards: tuple[float, float, float] = (1.0, 0.5, 0.1),
) -> Tensor:
    """The best of three tiers: paid or clicked, shown to the user, an item at all (CQ-SID).

    Args:
        rollouts: the groups.
        targets: what the user of each group paid for or clicked; see :func:`match`.
        exposed: what was shown to the user.
        valid: bool ``[C]``: the rows that are SIDs of the catalogue, as ``index.contains`` tells.
        rewards: of the three tiers. A row of none gets 0.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> def sessions(tokens):
        ...     ones, ends = torch.ones(len(tokens), dtype=torch.int64), torch.tensor([0, len(tokens)])
        ...     return rx.SessionBatch(torch.tensor(tokens), ones, ends, torch.tensor([0]))
        >>> valid = torch.tensor([True, True, True, False])
        >>> rx.rewards.tiered(sessions([[1], [2], [3], [9]]), sessions([[1]]), sessions([[1], [2]]), valid)
        tensor([1.0000, 0.5000, 0.1000, 0.0000])
    """
    _check_targets(rollouts, exposed, "exposed")
    _check_rows(valid, "valid", rollouts, torch.bool)
    best, second, third = (_check.not_negative(reward, f"rewards[{i}]") for i, reward in enumerate(rewards))
    found = torch.maximum(best * match(rollouts, targets), second * match(rollouts, exposed))
    return torch.maximum(found, third * valid)


def gated(preference: Tensor, relevance: Tensor, sessions: SessionBatch, hits: Tensor, tau: float) -> Tensor:
    """The preference of rows that are relevant, and the group's best reward for a logged positive (GenRec).

    A row's reward is its ``preference`` if its ``relevance`` is above ``tau``, else 0. Then each hit gets the largest
    reward of its group. A NaN preference of a relevant row gives NaN, which does not count, unless it is a hit.

    Args:
        preference: floating-point ``[C]``, such as the score of a reward model.
        relevance: floating-point ``[C]``.
        sessions: the groups.
        hits: bool ``[C]``: the rows that are logged positives of their group.
        tau: the gate.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> groups = rx.SessionBatch(
        ...     torch.tensor([[1], [2], [3]]), torch.ones(3, dtype=torch.int64), torch.tensor([0, 3]), torch.tensor([0])
        ... )
        >>> preference, relevance = torch.tensor([0.9, 0.7, 0.2]), torch.tensor([0.1, 0.8, 0.6])
        >>> rx.rewards.gated(preference, relevance, groups, torch.tensor([False, False, True]), tau=0.5)
        tensor([0.0000, 0.7000, 0.7000])
    """
    _check.instance(sessions, "sessions", SessionBatch)
    for value, name in ((preference, "preference"), (relevance, "relevance")):
        _check_rows(value, name, sessions, _check.float_tensor(value, name).dtype)
    _check_rows(hits, "hits", sessions, torch.bool)
    rewards = torch.where(relevance > _check.number(tau, "tau"), preference.detach().float(), 0.0)
    best = _by_group(rewards.nan_to_num(nan=-torch.inf, posinf=None), sessions, sessions.owners(), "amax")
    return torch.where(hits, torch.where(best > -torch.inf, best, rewards), rewards)


def _pairs(rollouts: SessionBatch, targets: SessionBatch) -> tuple[Tensor, Tensor]:
    """Each row with each target of its group: the rows of both."""
    owners = rollouts.owners()
    counts = targets.offsets.diff()[owners]
    row = torch.repeat_interleave(counts)
    number = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    return row, targets.offsets[:-1][owners][row] + number


def _by_group(values: Tensor, sessions: SessionBatch, owners: Tensor, reduce: str) -> Tensor:
    """The sum or maximum of each row's group, given to the row."""
    table = values.new_zeros(sessions.num_sessions).scatter_reduce(0, owners, values, reduce, include_self=False)
    return table[owners]


def _numbers(values: Sequence[float] | Tensor, name: str, size: int, device: torch.device) -> Tensor:
    """``values`` as float32 ``[size]``."""
    if isinstance(values, Tensor):
        given = _check.float_tensor(values, name).detach().to(torch.float32)
        if given.device != device:
            raise ValueError(f"{name} must be on {device}, got {given.device}")
    else:
        given = torch.tensor([_check.number(v, f"{name}[{i}]") for i, v in enumerate(values)], device=device).float()
    if given.shape != (size,):
        raise ValueError(f"{name} must have shape {(size,)}, got {tuple(given.shape)}")
    if _check.reads_values(given, False):
        _check.none(~given.isfinite(), lambda i: f"{name}[{i}] must be finite, got {float(given[i])}")
    return given


def _check_rows(values: Tensor, name: str, sessions: SessionBatch, dtype: torch.dtype) -> None:
    _check.instance(values, name, Tensor)
    if values.dtype != dtype or values.shape != (sessions.num_candidates,):
        raise ValueError(
            f"{name} must be {dtype} of shape {(sessions.num_candidates,)}, got {values.dtype} of shape "
            f"{tuple(values.shape)}"
        )
    if values.device != sessions.device:
        raise ValueError(f"{name} must be on the device of sessions, {sessions.device}, got {values.device}")


def _check_targets(rollouts: SessionBatch, targets: SessionBatch, name: str) -> None:
    _check.instance(rollouts, "rollouts", SessionBatch)
    _check.instance(targets, name, SessionBatch)
    if targets.num_sessions != rollouts.num_sessions:
        raise ValueError(
            f"{name} must have one session per group ({rollouts.num_sessions}), got {targets.num_sessions}"
        )
    if targets.device != rollouts.device:
        raise ValueError(f"{name} must be on the device of rollouts, {rollouts.device}, got {targets.device}")
