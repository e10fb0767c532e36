"""group_advantages: from the rewards of ragged groups to an advantage per row or per token, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._autograd import refuse_transforms
from raddpo_ext.losses import loss_arguments
from raddpo_ext.losses.session import SessionBatch
from raddpo_ext.losses.session_loss import check_weights

# The operator takes positions in these tuples. Their order is that of the enums in group_advantages.h.
CREDIT = ("sequence", "siblings", "marginal")
SCALE = ("group", "batch", "none")
BASELINE = ("mean", "loo")
EXPERTS = ("group", "nll")
MAX_REWARD = 1e75  # kMaxReward in group_advantages_math.h


class Arguments(NamedTuple):
    """The operator's arguments, in the order of csrc/schema.cpp."""

    rewards: Tensor
    tokens: Tensor
    lengths: Tensor
    offsets: Tensor
    num_positives: Tensor
    weights: Tensor | None
    baselines: Tensor | None
    target_tokens: Tensor | None
    target_lengths: Tensor | None
    target_offsets: Tensor | None
    level_weights: Tensor | None
    blend: float
    eps: float
    credit: int
    scale: int
    baseline: int
    count_experts: bool
    contiguous: bool


class Advantages(NamedTuple):
    """The result of :func:`group_advantages`. Nothing here has a gradient.

    Attributes:
        values: ``[C]`` for each row, or ``[C, L]`` for each token if ``credit`` is ``"siblings"`` or ``"marginal"``:
            0 beyond a row's length. float32, or float64 for float64 rewards.
        active: bool ``[S]``: the groups whose rewards differ. All others have advantages of exactly 0.
        gates: ``[C, L]`` factors on the advantages if ``credit`` is ``"marginal"``, else None.

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2]])
        >>> groups = rx.SessionBatch(tokens, torch.full((3,), 2), torch.tensor([0, 3]), torch.tensor([0]))
        >>> advantages = rx.group_advantages(torch.tensor([1.0, 0.0, 0.0]), groups, scale="none")
        >>> advantages.values, advantages.active
        (tensor([ 0.6667, -0.3333, -0.3333]), tensor([True]))
    """

    values: Tensor
    active: Tensor
    gates: Tensor | None


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
    check: bool = False,
) -> Advantages:
    r"""Compute how much better each row of a group is than the rest of its group.

    A group is a session: its positives are **experts** (the ground truth, put in by hand), its negatives
    **rollouts**. Rows that count: all but those of length 0, of weight 0 or with a NaN reward and, under
    ``experts="nll"``, the experts. The others have advantage 0 and change nobody else's.

    ``credit="sequence"`` gives each row that counts ``c / (std + eps)``::

        baseline="mean":  c_i = r_i - mean of the group              (GRPO)
        baseline="loo":   c_i = r_i - mean of the other rows         (RLOO)
        a tensor b [S]:   c_i = r_i - b_s

    with the unbiased ``std`` of the group (``scale="group"``) or of the whole batch (``"batch"``); ``"none"`` does not
    divide (Dr. GRPO), which an unbiased gradient needs.

    ``credit="siblings"`` gives each token ``(score - mean) / (std + eps)`` among the children of its prefix that rows
    of the group have; a child's score is the mean reward of the rows through it, ``std`` is of that population. It is 0
    where a prefix has one child or all scores are equal. ``blend`` mixes it with the row's advantage:
    ``blend * siblings + (1 - blend) * sequence``.

    ``credit="marginal"`` compares the rows with ``targets`` instead of their rewards, which then only decide which
    groups are active. Token ``l`` earns ``R_l - R_{l - 1}``, standardised over the rows of the group that reach
    ``l`` as under ``"sequence"``::

        R_{i,l} = max over targets t of sum_{k <= l} level_weights[k] * [token k of i = token k of t]
        gates:  g_1 = 1,  g_l = R_{i,l-1} / (l - 1) with weights of 1

    A group with fewer than two rows that count, or whose rewards are all equal as numbers, is not active: its
    advantages are exactly 0, under a tensor ``baseline`` too. Leave it out with :meth:`SessionBatch.select` before the
    model runs. Nothing depends on the order of rows or groups nor, but for ``scale="batch"``, on other groups.

    Args:
        rewards: float32, bfloat16, float16 or float64 ``[C]``; no gradient flows to them.
        sessions: the groups, on the same device.
        credit: see above.
        scale: see above; only ``"group"`` with ``credit="marginal"``.
        baseline: ``"mean"``, ``"loo"`` or a floating-point tensor ``[S]``; only ``"mean"`` with ``credit="marginal"``.
        weights: floating-point ``[C]``, finite and at least 0, for weighted means and standard deviations. Only their
            ratios matter: they say how much a row is worth, not how many rows it stands for.
        experts: ``"group"``, or ``"nll"``: they do not count.
        targets: the ground truth of each group for ``credit="marginal"``, any number of rows. Default: the experts.
        level_weights: ``[L]`` finite and at least 0, for ``credit="marginal"``. Default: 1.
        contiguous: count matches along the common prefix only; otherwise anywhere (TPMA's published code).
        blend: a number in [0, 1]; only 1 unless ``credit="siblings"``.
        eps: positive.
        check: on CUDA, also check values (synchronises). Without it, infinite rewards there give NaN or infinities.

    Raises:
        ValueError, TypeError: naming the argument and the value, such as an infinite reward.

    Source: GRPO (arXiv 2402.03300), RLOO (2402.14740), Dr. GRPO (2503.20783), V-STAR's sibling advantages (2602.10699),
    TPMA of OneSearch-V2 (2603.24422).

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2], [4, 2]])
        >>> groups = rx.SessionBatch(tokens, torch.full((4,), 2), torch.tensor([0, 4]), torch.tensor([0]))
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
        >>> rx.group_advantages(rewards, groups).values
        tensor([ 1.5000, -0.5000, -0.5000, -0.5000])
        >>> rx.group_advantages(rewards, groups, credit="siblings").values
        tensor([[ 1.0000,  1.0000],
                [ 1.0000, -1.0000],
                [-1.0000,  0.0000],
                [-1.0000,  0.0000]])
    """
    _check.float_tensor(rewards, "rewards")
    refuse_transforms("group_advantages", rewards)
    _check.instance(sessions, "sessions", SessionBatch)
    if rewards.shape != (sessions.num_candidates,):
        raise ValueError(f"rewards must have shape {(sessions.num_candidates,)}, got {tuple(rewards.shape)}")
    if rewards.device != sessions.device:
        raise ValueError(f"rewards must be on the device of sessions, {sessions.device}, got {rewards.device}")
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards = rewards.detach().to(dtype).contiguous()
    chosen = _check.choice(credit, "credit", CREDIT)
    _check_unused(credit, scale, baseline, targets, level_weights, blend)
    _check.instance(contiguous, "contiguous", bool)
    truth = _targets(targets, sessions)
    groups = sessions.layout()
    arguments = Arguments(
        rewards=rewards,
        tokens=groups["tokens"],
        lengths=groups["lengths"],
        offsets=groups["offsets"],
        num_positives=groups["num_positives"],
        weights=None if weights is None else loss_arguments.floats(weights, "weights", rewards, rewards.shape),
        baselines=_baselines(baseline, rewards, sessions, check),
        target_tokens=truth.get("tokens"),
        target_lengths=truth.get("lengths"),
        target_offsets=truth.get("offsets"),
        level_weights=None
        if level_weights is None
        else loss_arguments.level_weights(level_weights, rewards.new_empty(sessions.tokens.shape), check),
        blend=_fraction(blend, "blend"),
        eps=_check.positive(eps, "eps"),
        credit=chosen,
        scale=_check.choice(scale, "scale", SCALE),
        baseline=0 if isinstance(baseline, Tensor) else _check.choice(baseline, "baseline", BASELINE),
        count_experts=_check.choice(experts, "experts", EXPERTS) == EXPERTS.index("group"),
        contiguous=contiguous,
    )
    if check:
        _check_values(arguments)
    try:
        values, active, gates = torch.ops.raddpo.group_advantages.default(*arguments)
    except RuntimeError:
        if rewards.device.type == "cpu":
            _check_values(arguments)  # the operator's error does not name the entry
        raise
    return Advantages(values, active, gates if credit == "marginal" else None)


@torch.library.register_fake("raddpo::group_advantages")
def empty_results(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = Arguments(*arguments)
    new, (candidates, levels) = a.rewards.new_empty, a.tokens.shape
    return (
        new(candidates) if CREDIT[a.credit] == "sequence" else new((candidates, levels)),
        new(a.num_positives.shape, dtype=torch.bool),
        new((candidates if CREDIT[a.credit] == "marginal" else 0, levels)),
    )


def _check_unused(
    credit: str,
    scale: str,
    baseline: str | Tensor,
    targets: SessionBatch | None,
    level_weights: Sequence[float] | Tensor | None,
    blend: float,
) -> None:
    """Raise ValueError for an argument that this credit would ignore."""
    if credit == "marginal":
        if scale != "group":
            raise ValueError(f"scale must be 'group' with credit='marginal', got {scale!r}")
        if isinstance(baseline, Tensor) or baseline != "mean":
            raise ValueError(f"baseline must be 'mean' with credit='marginal', got {baseline!r}")
    elif targets is not None or level_weights is not None:
        name = "level_weights" if targets is None else "targets"
        raise ValueError(f"{name} must be None with credit={credit!r}: only credit='marginal' takes it")
    if credit != "siblings" and blend != 1:
        raise ValueError(f"blend must be 1 with credit={credit!r}: only credit='siblings' takes it, got {blend!r}")


def _fraction(value: Any, name: str) -> float:
    if not 0 <= _check.number(value, name) <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def _baselines(baseline: str | Tensor, rewards: Tensor, sessions: SessionBatch, check: bool) -> Tensor | None:
    if not isinstance(baseline, Tensor):
        return None
    baselines = loss_arguments.floats(baseline, "baseline", rewards, (sessions.num_sessions,))
    if _check.reads_values(baselines, check):
        _check.none(~baselines.isfinite(), lambda s: f"baseline[{s}] must be finite, got {float(baselines[s])}")
    return baselines


def _targets(targets: SessionBatch | None, sessions: SessionBatch) -> dict[str, Any]:
    if targets is None:
        return {}
    _check.instance(targets, "targets", SessionBatch)
    if targets.num_sessions != sessions.num_sessions:
        raise ValueError(
            f"targets must have one session per group ({sessions.num_sessions}), got {targets.num_sessions}"
        )
    if targets.device != sessions.device:
        raise ValueError(f"targets must be on the device of sessions, {sessions.device}, got {targets.device}")
    return targets.layout()


def _check_values(a: Arguments) -> None:
    _check.none(
        a.rewards.double().abs() > MAX_REWARD,
        lambda i: f"rewards[{i}] must be NaN or at most {MAX_REWARD:g} in size, got {float(a.rewards[i])}",
    )
    if a.weights is not None:
        check_weights(a.weights, "weights")
        _check.none(
            a.weights.double() > MAX_REWARD,
            lambda i: f"weights[{i}] must be at most {MAX_REWARD:g}, got {float(a.weights[i])}",  # type: ignore[index]
        )
