"""policy_loss: the policy gradient losses over ragged groups of rollouts, forward and gradient in one pass each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.losses import loss_arguments
from raddpo_ext.losses.session import SessionBatch
from raddpo_ext.policy import policy_loss_op as op
from raddpo_ext.policy.group_advantages import EXPERTS

PROTECT = ("none", "positives")

#: Arguments of :func:`policy_loss` per published objective: ``rx.policy_loss(..., **rx.POLICY_PRESETS["dapo"])``. Each
#: leaves the KL out: add ``kl_weight`` and ``ref_logps``. Those that were published over all groups, dead ones too,
#: are so with ``count="all"``; ``grpo_sr`` has it, because the ground truth of a dead group teaches too.
POLICY_PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"clip": (0.2, 0.2)},
    "dr_grpo": {"clip": (0.2, 0.2), "aggregate": "constant"},
    "dapo": {"clip": (0.2, 0.28), "aggregate": "token"},
    "gspo": {"clip": (3e-4, 4e-4), "ratio": "sequence"},
    "cispo": {"clip": (1.0, 4.0), "objective": "cispo", "aggregate": "token"},
    "sapo": {"clip": (1.0, 1.05), "objective": "sapo"},
    "grpo_sr": {"clip": (0.2, 0.2), "experts": "nll", "nll_weight": 0.1, "count": "all"},
    "eg_grpo": {"clip": (0.2, 0.2), "experts": "group"},
    "minionerec": {"objective": "reinforce"},
    "ecpo": {"clip": (0.2, 0.2), "objective": "ecpo", "ratio": "item", "delta": 0.1},
    "gbpo": {"objective": "gbpo", "ratio": "item"},
}


class PolicyLossOutput(NamedTuple):
    """The result of :func:`policy_loss`, in the dtype of the log-probs. Only ``loss`` has a gradient.

    Attributes:
        loss: ``policy + kl_weight * kl + nll_weight * nll``; a scalar, or ``[S]`` with ``reduction="none"``, as the
            next three.
        policy: the policy term.
        kl: the KL to ``ref_logps``; 0 without them.
        nll: the experts' negative log-likelihood.
        ratios: ``[C]`` the mean over a row's tokens of the ratio to ``old_logps``; 1 for a row of length 0.
        clipped: ``[2]`` the share of the policy term's tokens whose ratio the clip holds from below, and from above.
        approx_kl: the mean of ``e^d - 1 - d`` over these tokens, which estimates the KL from the old policy.

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3]])
        >>> groups = rx.SessionBatch(tokens, torch.full((2,), 2), torch.tensor([0, 2]), torch.tensor([0]))
        >>> logps = torch.tensor([[-1.0, -1.0], [-1.0, -2.0]])
        >>> output = rx.policy_loss(logps, groups, torch.tensor([1.0, -1.0]), old_logps=logps - 1)
        >>> output.ratios, output.clipped
        (tensor([2.7183, 2.7183]), tensor([0.0000, 0.5000]))
    """

    loss: Tensor
    policy: Tensor
    kl: Tensor
    nll: Tensor
    ratios: Tensor
    clipped: Tensor
    approx_kl: Tensor


def policy_loss(
    logps: Tensor,
    sessions: SessionBatch,
    advantages: Tensor,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    weights: Tensor | None = None,
    gates: Tensor | None = None,
    objective: str = "clip",
    ratio: str = "token",
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    delta: float = 0.1,
    kl: str = "k3",
    kl_weight: float = 0.0,
    nll_weight: float = 0.0,
    experts: str = "group",
    protect: str = "none",
    aggregate: str = "sequence",
    max_length: float | None = None,
    count: str = "active",
    level_weights: Sequence[float] | Tensor | None = None,
    reduction: str = "mean",
    normalizer: tuple[float | Tensor, float | Tensor] | Tensor | None = None,
    check: bool = False,
) -> PolicyLossOutput:
    r"""Compute a policy gradient loss over groups of rollouts, with a KL and the likelihood of the ground truth.

    A group is a session: its positives are **experts**, its negatives **rollouts**. With ``d = logps - old_logps``,
    ``rho = e^d``, ``A`` the advantage times its gate and ``(lo, hi) = clip``, a token has the term::

        "reinforce":  -(pi / sg pi) A
        "clip":       -min(rho A, clip(rho, 1 - lo, 1 + hi) A); with dual_clip = c, for A < 0: -max(that min, c A)
        "cispo":      -sg(min(rho, 1 + hi)) A logp
        "sapo":       -4/t sigmoid(t (rho - 1)) A,  t = lo for A > 0, else hi
        "ecpo":       "clip" against max(sg pi / (1 + hi + delta), old pi)
        "gbpo":       -(pi / max(old pi, sg pi)) A for A >= 0, else -(pi / max(old pi, 1 - sg pi)) A

    ``d`` is held within +-20 in the exponential; beyond, there is no gradient. ``ratio="sequence"`` takes the mean of
    ``d`` over a row for each of its tokens (GSPO; with an advantage per token GSPO-token), ``"item"`` their sum, the
    log-prob of the whole item (OneRec).

    **Rows of the policy term**: those of positive length in groups that count; under ``experts="nll"`` no experts,
    under ``"group"`` no rollouts that equal an expert of their group, which would count twice. A row's
    ``weights`` multiply its terms. ``protect="positives"``: a token with ``A < 0`` gets no gradient from this term if a
    row of its group with ``A > 0`` at that token has the same tokens up to there.

    **KL** over the same tokens, with ``x = logps - ref_logps``: ``k1 = x``, ``k2 = x^2 / 2``, ``k3 = e^-x + x - 1``
    with ``x`` held above -20. **NLL**: ``-level_weights * logp`` over the experts' tokens.

    **Which groups count**: those with an advantage other than 0, so that leaving the others out by
    :meth:`SessionBatch.select` changes nothing. Another group adds exactly 0, to KL and NLL too. Under ``count="all"``
    (TRL, verl) all do.

    ``aggregate="sequence"``: the mean over a row's tokens, then over rows. ``"token"``: over all tokens.
    ``"constant"``: the sum divided by ``rows * max_length``. ``reduction="sum"`` does not divide by the number of rows
    or tokens, ``"none"`` returns these sums per group. The NLL is divided by the number of its tokens.

    Args:
        logps: float32 or float64 ``[C, L]`` token log-probs. Entries beyond the lengths are not read and get gradient
            0.
        sessions: the groups, on the same device.
        advantages: floating-point ``[C]`` or ``[C, L]``, finite, as :func:`group_advantages` gives them. Here and below
            no gradient flows to them.
        old_logps: ``[C, L]`` of the policy that drew the rollouts, in the dtype of ``logps``; default ``logps``.
        ref_logps: ``[C, L]`` of a reference model, in the dtype of ``logps``.
        weights: floating-point ``[C]``, finite and at least 0; default 1.
        gates: floating-point ``[C, L]``, finite: factors on the advantages; default 1.
        objective: see above.
        ratio: see above; only ``"token"`` with ``"cispo"`` and ``"sapo"``.
        clip: ``(lo, hi)``, finite and at least 0; the two temperatures of ``"sapo"``, positive.
        dual_clip: above 1, with ``"clip"`` only.
        delta: positive, for ``"ecpo"``.
        kl: ``"k1"``, ``"k2"`` or ``"k3"``.
        kl_weight: finite, at least 0; needs ``ref_logps`` if it is not 0.
        nll_weight: finite, at least 0.
        experts: ``"group"`` or ``"nll"``.
        protect: ``"none"`` or ``"positives"``.
        aggregate: see above.
        max_length: positive, for ``"constant"``; default ``L``.
        count: ``"active"`` or ``"all"``.
        level_weights: ``[L]`` numbers, finite and at least 0, of the NLL; default 1.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        normalizer: ``(rows, tokens)``, positive numbers or tensors of one element: replaces the two counts of
            ``"mean"``, of the policy term and KL (rows, or their tokens under ``aggregate="token"``) and of the NLL
            (tokens of experts), so that the losses of ranks and accumulated batches sum to the loss of one big batch:
            see :func:`policy_counts`.
        check: also raise for NaN log-probs, and check values on CUDA (synchronises).

    Returns:
        :class:`PolicyLossOutput`, finite for finite input. The loss is differentiable once.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Sources:
        GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), DAPO (2503.14476), GSPO (2507.18071), CISPO (2506.13585), SAPO
        (2511.20347), GRPO-SR (2604.14878), EG-GRPO (2605.14434), ECPO (2506.13695), GBPO (2508.20900).

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2]])
        >>> groups = rx.SessionBatch(tokens, torch.full((3,), 2), torch.tensor([0, 3]), torch.tensor([0]))
        >>> logps = torch.full((3, 2), -1.0, requires_grad=True)
        >>> advantages = rx.group_advantages(torch.tensor([1.0, 0.0, 0.0]), groups, scale="none").values
        >>> rx.policy_loss(logps, groups, advantages, protect="positives").loss.backward()
        >>> logps.grad  # the second row is not pushed down where it agrees with the first
        tensor([[-0.1111, -0.1111],
                [ 0.0000,  0.0556],
                [ 0.0556,  0.0556]])
    """
    loss_arguments.check_input(logps, "logps", sessions, 2)
    if logps.shape != sessions.tokens.shape:
        raise ValueError(
            f"logps must have the shape of tokens, {tuple(sessions.tokens.shape)}, got {tuple(logps.shape)}"
        )
    options = _options(
        objective,
        ratio,
        tuple(clip) if isinstance(clip, Sequence) else clip,
        dual_clip,
        delta,
        kl,
        kl_weight,
        nll_weight,
        experts,
        protect,
        aggregate,
        max_length,
        count,
        reduction,
        logps.shape[1],
    )
    if kl_weight != 0 and ref_logps is None:
        raise ValueError(f"ref_logps must be given with kl_weight={kl_weight!r}, got None")
    shape = logps.shape if isinstance(advantages, Tensor) and advantages.dim() == 2 else logps.shape[:1]
    groups = sessions.layout()
    divisors = loss_arguments.divisors(normalizer, reduction, logps, check, "rows")
    arguments = op.Arguments(
        logps.contiguous(),
        groups["tokens"],
        groups["lengths"],
        groups["offsets"],
        groups["num_positives"],
        loss_arguments.floats(advantages, "advantages", logps, shape),
        _logps(old_logps, "old_logps", logps),
        _logps(ref_logps, "ref_logps", logps),
        None if weights is None else loss_arguments.floats(weights, "weights", logps, logps.shape[:1]),
        None if gates is None else loss_arguments.floats(gates, "gates", logps, logps.shape),
        loss_arguments.level_weights(level_weights, logps, check),
        divisors.get("divisors"),
        divisors.get("session_divisor", 0.0),
        divisors.get("token_divisor", 0.0),
        *options,
        logps.requires_grad and torch.is_grad_enabled(),
    )
    if check:
        for name in ("logps", "old_logps", "ref_logps"):
            if getattr(arguments, name) is not None:
                loss_arguments.check_nan(getattr(arguments, name), name, sessions)
        op.check_values(arguments)
    results = op.policy_loss(arguments)
    return PolicyLossOutput._make(results[: len(PolicyLossOutput._fields)])


def _options(*values: Any) -> op.Options:
    """:func:`_checked_options`, which a training run calls with the same values at every step."""
    if torch.compiler.is_compiling():
        return _checked_options(*values)
    try:
        return _known_options(*values)
    except TypeError:
        return _checked_options(*values)  # a value that cannot be hashed: its error names the argument


def _checked_options(
    objective: str,
    ratio: str,
    clip: Any,
    dual_clip: float | None,
    delta: float,
    kl: str,
    kl_weight: float,
    nll_weight: float,
    experts: str,
    protect: str,
    aggregate: str,
    max_length: float | None,
    count: str,
    reduction: str,
    levels: int,
) -> op.Options:
    low, high = _clip(clip, objective)
    _check_unused(objective, ratio, clip, dual_clip, delta, aggregate, max_length)
    return op.Options(
        low=low,
        high=high,
        dual_clip=0.0 if dual_clip is None else _above_one(dual_clip, "dual_clip"),
        delta=_check.positive(delta, "delta"),
        kl_weight=_check.not_negative(kl_weight, "kl_weight"),
        nll_weight=_check.not_negative(nll_weight, "nll_weight"),
        max_length=float(levels) if max_length is None else _check.positive(max_length, "max_length"),
        objective=_check.choice(objective, "objective", op.OBJECTIVE),
        ratio=_check.choice(ratio, "ratio", op.RATIO),
        divergence=_check.choice(kl, "kl", op.KL),
        aggregate=_check.choice(aggregate, "aggregate", op.AGGREGATE),
        reduction=_check.choice(reduction, "reduction", op.REDUCTION),
        use_experts=_check.choice(experts, "experts", EXPERTS) == EXPERTS.index("group"),
        protect=_check.choice(protect, "protect", PROTECT) == PROTECT.index("positives"),
        count_all=_check.choice(count, "count", op.COUNT) == op.COUNT.index("all"),
    )


_known_options = lru_cache(maxsize=64, typed=True)(_checked_options)


def _clip(clip: Any, objective: str) -> tuple[float, float]:
    if not isinstance(clip, Sequence) or len(clip) != 2:
        raise ValueError(f"clip must be two numbers, got {clip!r}")
    check = _check.positive if objective == "sapo" else _check.not_negative
    return check(clip[0], "clip[0]"), check(clip[1], "clip[1]")


def _above_one(value: Any, name: str) -> float:
    if _check.number(value, name) <= 1:
        raise ValueError(f"{name} must be above 1, got {value}")
    return float(value)


def _check_unused(
    objective: str,
    ratio: str,
    clip: Any,
    dual_clip: float | None,
    delta: float,
    aggregate: str,
    max_length: float | None,
) -> None:
    """Raise ValueError for an argument that this objective or aggregate would ignore."""
    if objective in ("cispo", "sapo") and ratio != "token":
        raise ValueError(f"ratio must be 'token' with objective={objective!r}, got {ratio!r}")
    if objective in ("reinforce", "gbpo") and tuple(clip) != (0.2, 0.2):
        raise ValueError(f"clip must be (0.2, 0.2), its default, with objective={objective!r}: it clips nothing")
    if objective != "clip" and dual_clip is not None:
        raise ValueError(f"dual_clip must be None with objective={objective!r}, got {dual_clip!r}")
    if objective != "ecpo" and delta != 0.1:
        raise ValueError(f"delta must be 0.1, its default, with objective={objective!r}, got {delta!r}")
    if aggregate != "constant" and max_length is not None:
        raise ValueError(f"max_length must be None with aggregate={aggregate!r}, got {max_length!r}")


def _logps(value: Tensor | None, name: str, logps: Tensor) -> Tensor | None:
    return None if value is None else loss_arguments.constant(value, name, logps, logps.dtype, logps.shape)
