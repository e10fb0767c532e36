"""rad_dpo_loss: RAD-DPO and its relatives over sessions of ragged candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.losses import loss_arguments, session_loss
from raddpo_ext.losses.session import SessionBatch

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


class SessionLossOutput(NamedTuple):
    """What :func:`rad_dpo_loss` returns, in the type of the log-probs unless another is named. The first three are
    differentiable; with ``reduction="none"`` they are ``[S]``, else of no dimension.

    Attributes:
        loss: ``preference + sft_weight * sft``.
        preference: the preference loss.
        sft: the supervised loss.
        rewards: ``[C]``.
        margins: ``[M]`` ``r_p - r_n`` of every pair, 0 of one that is dropped.
        accuracy: share of the loss's pairs with a margin above 0; 0 where it has none.
        kept: bool ``[M]``: which pairs are in the preference loss.
        totals: float64 ``[9, 2]``, of each session ``[S, 9, 2]`` with ``reduction="none"``: sums, and what they are
            divided by to be means: the preference's terms by the sessions that keep a pair; SFT's by tokens; rewards of
            the positives, then of the negatives, that are not empty; margins, margins above 0 and weights of the loss's
            pairs; the tokens of those pairs' negatives that get no gradient from the preference, by all of them; the
            pairs of equal SIDs or with an empty one, by all pairs.
    """

    loss: Tensor
    preference: Tensor
    sft: Tensor
    rewards: Tensor
    margins: Tensor
    accuracy: Tensor
    kept: Tensor
    totals: Tensor


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
) -> SessionLossOutput:
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
        :class:`SessionLossOutput`. Finite on finite input. A second derivative is an error.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Sources:
        RAD-DPO (arXiv 2602.23964), S-DPO (2406.09215), SimPO (2405.14734).
    """
    loss_arguments.check_input(logps, "logps", sessions, 2)
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
        ref_logps = loss_arguments.constant(ref_logps, "ref_logps", logps, logps.dtype, logps.shape)
    if detach is not None:
        detach = loss_arguments.constant(detach, "detach", logps, torch.bool, logps.shape)
    if check:
        loss_arguments.check_nan(logps, "logps", sessions)
        if ref_logps is not None:
            loss_arguments.check_nan(ref_logps, "ref_logps", sessions)
    results = session_loss.session_loss(
        session_loss.Arguments(
            logps=logps.contiguous(),
            **sessions.layout(),
            ref_logps=ref_logps,
            pair_weights=loss_arguments.pair_weights(pair_weights, logps, sessions, check),
            detach=detach,
            level_weights=loss_arguments.level_weights(level_weights, logps, check),
            reduction=_check.choice(reduction, "reduction", session_loss.REDUCTION),
            **loss_arguments.divisors(normalizer, reduction, logps, check),
            beta=_check.positive(beta, "beta"),
            gamma=_check.number(gamma, "gamma"),
            sft_weight=_check.not_negative(sft_weight, "sft_weight"),
            label_smoothing=smoothing,
            length_normalized=bool(length_normalized),
            protect=_check.choice(protect, "protect", session_loss.PROTECT),
            aggregation=_check.choice(aggregation, "aggregation", session_loss.AGGREGATION),
            weighting=_check.choice(weighting, "weighting", session_loss.WEIGHTING),
            positives=_check.choice(positives, "positives", session_loss.POSITIVES),
            need_gradient=logps.requires_grad and torch.is_grad_enabled(),
        )
    )
    return SessionLossOutput(**{name: getattr(results, name) for name in SessionLossOutput._fields})
