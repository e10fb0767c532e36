"""The losses over sessions of ragged candidates: RAD-DPO with its relatives, and the multi-label contrast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.losses import session_loss_op as op
from raddpo_ext.losses.session import POSITIVES, SessionBatch

_PROTECT = ("winner", "positives", "none")
_AGGREGATION = ("negatives", "margins")
_WEIGHTING = ("loss", "reward")

#: Arguments of :func:`rad_dpo_loss` by name of the objective. ``rad_dpo`` and ``rad_dpo_margins`` are the two readings
#: of the RAD-DPO paper; ``simpo`` has one negative a session (``gamma`` outside ``beta``, as in TRL), ``dpo`` one and
#: ``s_dpo`` several, both with ``ref_logps``.
PRESETS: dict[str, dict[str, Any]] = {
    "rad_dpo": {"aggregation": "negatives", "weighting": "loss"},
    "rad_dpo_margins": {"aggregation": "margins", "weighting": "reward"},
    "simpo": {"beta": 2.0, "gamma": 1.0, "protect": "none", "sft_weight": 0.0},
    "dpo": {"beta": 0.1, "length_normalized": False, "protect": "none", "sft_weight": 0.0},
    "s_dpo": {"beta": 0.1, "length_normalized": False, "protect": "none", "sft_weight": 0.0},
}


class SessionLoss(NamedTuple):
    """What :func:`rad_dpo_loss` returns, in the type of the log-probs. The first three are differentiable; with
    ``reduction="none"`` they are ``[S]``, else of no dimension.

    Attributes:
        loss: ``preference + sft_weight * sft``.
        preference: the preference loss.
        sft: the supervised loss.
        rewards: ``[C]``.
        margins: ``[M]`` ``r_p - r_n`` of every pair, 0 of one that is dropped.
        accuracy: share of the loss's pairs with a margin above 0; 0 where it has none.
    """

    loss: Tensor
    preference: Tensor
    sft: Tensor
    rewards: Tensor
    margins: Tensor
    accuracy: Tensor


def rad_dpo_loss(
    logps: Tensor,
    sessions: SessionBatch,
    *,
    ref_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    beta: float = 2.0,
    gamma: float = 0.0,
    length_normalized: bool = True,
    protect: str = "winner",
    detach: Tensor | None = None,
    aggregation: str = "negatives",
    weighting: str = "loss",
    positives: str = "winner",
    sft_weight: float = 1.0,
    level_weights: Sequence[float] | Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: tuple[float | Tensor, float | Tensor] | Tensor | None = None,
    check: bool = False,
) -> SessionLoss:
    r"""List-wise preference loss with token-level gradient detachment, and the SFT loss of the positives, in one op.

    **Reward** of candidate ``c``, ``|c| = lengths[c]`` (0 if that is 0), reference-free unless ``ref_logps`` is given::

        r_c = beta / |c|^n * sum_{i < |c|} (logps[c, i] - ref_logps[c, i])        n = 1 if length_normalized else 0

    **Preference** of a winner ``w`` against the session's negatives ``j`` with weights ``w_j`` (default 1)::

        aggregation="negatives":  A =  LSE_j(r_j - r_w + gamma + log w_j)        (S-DPO)
        aggregation="margins":    A = -LSE_j(r_w - r_j - gamma + log w_j)        (as RAD-DPO's readers quote it)
        term = (1 - label_smoothing) * softplus(A) + label_smoothing * softplus(-A)

    ``weighting="reward"`` has ``w_j r_j`` for ``r_j`` instead of ``log w_j``. Only ``negatives`` with ``loss`` always
    damps a similar negative (its share of the gradient is ``~ w_j e^{r_j}``); the others can push it harder.

    **Detachment** (TLGD). Let ``k`` be the number of leading tokens that negative and winner have in common. The
    negative's reward keeps its value, but its gradient with respect to its first ``k`` log-probs is exactly 0.
    ``protect="positives"`` takes the longest prefix in common with any positive of the session, ``"none"`` 0.
    A pair has the log-probs of its common prefix twice, in the same context. With equal ``|c|^n`` and unweighted
    rewards they cancel in a pairwise loss, in value and in gradient; in the list-wise loss the net push on the winner's
    prefix is ``1 -`` the shares of the negatives that have it, never below 0. (With ``n = 1`` a *shorter* negative does
    push it down.) So what detachment does is to turn that cancellation into the full push up. A prefix shared with
    *another* positive is pushed down nonetheless, unless ``protect="positives"``.

    **Positives** that act as the winner: ``"winner"`` the session's first; ``"each"`` every one, each with its own
    ``k``, the session's term being the mean over those that keep a pair; ``"pooled"`` all at once::

        A = LSE_n(r_n + gamma + log w_n) - LSE_p(r_p),    w_n = min_p w_pn

    with ``protect="winner"`` acting as ``"positives"`` and ``aggregation="negatives"`` required.

    **Dropped pairs** have a member of length 0, equal SIDs, or weight 0; a pool drops a negative altogether if it
    equals any positive or if ``w_n`` is 0. A session that keeps no pair adds exactly 0, and so does its gradient.

    **SFT**: ``-level_weights[i] * logps[p, i]`` over all positives' tokens. It is never detached.

    ``reduction="mean"`` divides the preference by the number of sessions that keep a pair and SFT by its tokens,
    ``"sum"`` divides neither, ``"none"`` returns the terms of ``"sum"`` of each session.

    With ``protect="none"``, no weights, no SFT and one negative this is SimPO; also with ``length_normalized=False``,
    ``gamma=0`` and ``ref_logps`` DPO, and S-DPO with several negatives (:data:`PRESETS`).

    Args:
        logps: float32 or float64 ``[C, L]`` token log-probs; not read, and without gradient, beyond the lengths.
        sessions: the candidates, on the same device.
        ref_logps: ``[C, L]`` of a reference model, of the type of ``logps``; a constant.
        pair_weights: ``[M]`` finite and at least 0, by :class:`SessionBatch`'s numbering of pairs; constants.
        beta: finite, above 0.
        gamma: finite; outside ``beta``.
        length_normalized: divide rewards by the length.
        protect: which common prefixes are detached.
        detach: bool ``[C, L]``: these log-probs get no gradient from the preference, those of positives included;
            replaces ``protect``.
        aggregation: ``"negatives"`` or ``"margins"``.
        weighting: ``"loss"`` or ``"reward"``.
        positives: ``"winner"``, ``"each"`` or ``"pooled"``.
        sft_weight: finite, at least 0.
        level_weights: ``[L]`` numbers, finite and at least 0; default 1.
        label_smoothing: in ``[0, 0.5)``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        normalizer: ``(sessions, tokens)``, numbers or tensors of one element above 0: replaces the two counts of
            ``"mean"``, so that ranks and accumulated batches sum to the loss of one big batch.
        check: also raise for NaN log-probs, and check values on CUDA (synchronises).

    Returns:
        :class:`SessionLoss`. Finite on finite input. A second derivative is an error.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Sources:
        RAD-DPO (arXiv 2602.23964), S-DPO (2406.09215), SimPO (2405.14734).
    """
    op.check_input(logps, "logps", sessions, 2)
    if logps.shape != sessions.tokens.shape:
        raise ValueError(
            f"logps must have the shape of tokens, {tuple(sessions.tokens.shape)}, got {tuple(logps.shape)}"
        )
    if positives == "pooled" and aggregation == "margins":
        raise ValueError("aggregation must be 'negatives' with positives='pooled', got 'margins'")
    smoothing = _check.number(label_smoothing, "label_smoothing")
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if ref_logps is not None:
        ref_logps = op.constant(ref_logps, "ref_logps", logps, logps.dtype, logps.shape)
    if detach is not None:
        detach = op.constant(detach, "detach", logps, torch.bool, logps.shape)
    if check:
        op.check_nan(logps, "logps", sessions)
        if ref_logps is not None:
            op.check_nan(ref_logps, "ref_logps", sessions)
    reduced = _check.choice(reduction, "reduction", op.REDUCTION)
    outputs = op.call(
        logps,
        sessions,
        ref_logps,
        op.pair_weights(pair_weights, logps, sessions, check),
        detach,
        op.level_weights(level_weights, logps, check),
        *op.divisors(normalizer, reduction, logps, check),
        op.positive(beta, "beta"),
        _check.number(gamma, "gamma"),
        op.not_negative(sft_weight, "sft_weight"),
        smoothing,
        bool(length_normalized),
        _check.choice(protect, "protect", _PROTECT),
        _check.choice(aggregation, "aggregation", _AGGREGATION),
        _check.choice(weighting, "weighting", _WEIGHTING),
        _check.choice(positives, "positives", POSITIVES),
        reduced,
        logps.requires_grad and torch.is_grad_enabled(),
    )
    return SessionLoss(*outputs[:6])


def multilabel_contrastive_loss(
    scores: Tensor,
    sessions: SessionBatch,
    *,
    pair_weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    check: bool = False,
) -> Tensor:
    """Contrast of all of a session's positives ``P`` with its negatives ``N``, of any scores::

        term = LSE_{P and N}(r) - LSE_P(r) = -log( sum_p e^{r_p} / (sum_p e^{r_p} + sum_n w_n e^{r_n}) )
        r = scores / temperature,    w_n = min_p w_pn

    It is the preference of :func:`rad_dpo_loss` with ``positives="pooled"`` for given rewards. Candidates of length 0
    and negatives of weight 0 or equal, as SIDs, to any of the session's positives are left out; a session without
    positives or negatives then adds exactly 0.

    Args:
        scores: float32 or float64 ``[C]``.
        sessions: the candidates, on the same device.
        pair_weights: ``[M]`` finite and at least 0, by :class:`SessionBatch`'s numbering of pairs; constants.
        temperature: finite, above 0.
        reduction: ``"mean"`` over the sessions that keep a pair, ``"sum"``, or ``"none"`` for the terms ``[S]``.
        normalizer: a number, or tensor of one element, above 0, to divide by under ``"mean"`` instead.
        check: also raise for NaN scores, and check values on CUDA (synchronises).

    Returns:
        The loss, in the type of ``scores``. Finite on finite input. A second derivative is an error.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Source:
        The multi-label form of S-DPO's softmax (arXiv 2406.09215).
    """
    op.check_input(scores, "scores", sessions, 1)
    if len(scores) != sessions.num_candidates:
        raise ValueError(f"scores must have one entry a candidate ({sessions.num_candidates}), got {len(scores)}")
    if check:
        _check.none(scores.isnan(), lambda i: f"scores[{i}] is NaN")
    reduced = _check.choice(reduction, "reduction", op.REDUCTION)
    divisors = None if normalizer is None else (normalizer, 1.0)
    # A score is the log-prob of a candidate's only token: the length and the common prefixes have no part in it.
    outputs = op.call(
        scores[:, None],
        sessions,
        None,
        op.pair_weights(pair_weights, scores, sessions, check),
        None,
        None,
        *op.divisors(divisors, reduction, scores, check),
        1 / op.positive(temperature, "temperature"),
        0.0,
        0.0,
        0.0,
        False,
        _PROTECT.index("none"),
        _AGGREGATION.index("negatives"),
        _WEIGHTING.index("loss"),
        POSITIVES.index("pooled"),
        reduced,
        scores.requires_grad and torch.is_grad_enabled(),
    )
    return outputs[0]
