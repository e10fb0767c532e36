"""rad_dpo_loss: RAD-DPO and related losses over sessions of ragged candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.losses import loss_arguments, session_loss
from raddpo_ext.losses.session import SessionBatch

#: Arguments of :func:`rad_dpo_loss` per objective: ``rx.rad_dpo_loss(logps, sessions, **rx.PRESETS["simpo"])``.
#: ``rad_dpo`` and ``rad_dpo_margins`` are the two readings of the RAD-DPO paper. ``simpo`` takes one negative per
#: session; its ``gamma`` is outside ``beta``, as in TRL. ``dpo`` takes one negative per session and ``s_dpo`` several;
#: both need ``ref_logps``.
PRESETS: dict[str, dict[str, Any]] = {
    "rad_dpo": {"aggregation": "negatives", "weighting": "loss"},
    "rad_dpo_margins": {"aggregation": "margins", "weighting": "reward"},
    "simpo": {"beta": 2.0, "gamma": 1.0, "protect": "none", "sft_weight": 0.0},
    "dpo": {"beta": 0.1, "length_normalized": False, "protect": "none", "sft_weight": 0.0},
    "s_dpo": {"beta": 0.1, "length_normalized": False, "protect": "none", "sft_weight": 0.0},
}


class SessionLossOutput(NamedTuple):
    """The result of :func:`rad_dpo_loss`.

    Tensors have the dtype of the log-probs unless stated otherwise. ``loss``, ``preference`` and ``sft`` are
    differentiable; they are scalars, or ``[S]`` with ``reduction="none"``.

    Attributes:
        loss: ``preference + sft_weight * sft``.
        preference: the preference loss.
        sft: the supervised loss.
        rewards: ``[C]`` of each candidate.
        margins: ``[M]`` ``r_p - r_n`` of each pair, 0 for a dropped pair.
        accuracy: fraction of the kept pairs with a margin above 0; 0 without kept pairs.
        kept: bool ``[M]``: which pairs are in the preference loss.
        totals: float64 ``[9, 2]``, or ``[S, 9, 2]`` per session with ``reduction="none"``. Each row is a sum and the
            count that it is divided by for a mean: preference terms, per session that keeps a pair; SFT terms, per
            token; rewards of the non-empty positives; rewards of the non-empty negatives; margins of the kept pairs;
            number of these margins above 0; weights of the kept pairs; tokens of their negatives that get no gradient
            from the preference, per token of their negatives; pairs with equal SIDs or an empty SID, per pair.

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2]])  # a positive and two negatives
        >>> sessions = rx.SessionBatch(tokens, torch.tensor([2, 2, 2]), torch.tensor([0, 3]), torch.tensor([1]))
        >>> logps = torch.tensor([[-1.0, -1.0], [-1.0, -2.0], [-3.0, -1.0]])
        >>> output = rx.rad_dpo_loss(logps, sessions)
        >>> output.rewards, output.margins
        (tensor([-2., -3., -4.]), tensor([1., 2.]))
        >>> output.kept, output.accuracy
        (tensor([True, True]), tensor(1.))
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
    r"""Compute a list-wise preference loss with token-level gradient detachment, and the SFT loss of the positives.

    **Reward** of candidate ``c`` with ``|c| = lengths[c]``; 0 if the length is 0, reference-free without
    ``ref_logps``::

        r_c = beta / |c|^n * sum_{i < |c|} (logps[c, i] - ref_logps[c, i])        n = 1 if length_normalized else 0

    **Preference** of a winner ``w`` against the session's negatives ``j`` with weights ``w_j`` (default 1)::

        aggregation="negatives":  A =  LSE_j(r_j - r_w + gamma + log w_j)        (S-DPO)
        aggregation="margins":    A = -LSE_j(r_w - r_j - gamma + log w_j)        (as RAD-DPO's readers quote it)
        term = (1 - label_smoothing) * softplus(A) + label_smoothing * softplus(-A)

    ``weighting="reward"`` replaces ``r_j`` by ``w_j r_j`` and leaves out ``log w_j``. Only ``negatives`` with ``loss``
    always damps a similar negative, whose softmax weight is proportional to ``w_j e^{r_j}``; the other combinations can
    push it harder.

    **Detachment** (TLGD). Let ``k`` be the number of leading tokens that negative and winner have in common. The
    negative's reward keeps its value, but its gradient with respect to its first ``k`` log-probs is exactly 0.
    With ``protect="positives"``, ``k`` is the longest prefix in common with any positive of the session; with
    ``"none"`` it is 0.

    The log-probs of a pair's common prefix occur in both rewards, in the same context. With equal ``|c|^n`` and
    unweighted rewards they cancel in a pairwise loss, in value and in gradient. In the list-wise loss, the winner's
    prefix is pushed up by 1 minus the softmax weights of the negatives that have it, which is never negative. (With
    ``n = 1`` a *shorter* negative does push it down.) Detachment turns this cancellation into the full push up. A
    prefix in common with *another* positive is still pushed down, unless ``protect="positives"``.

    **Positives** choose the winner. ``"winner"``: the first positive of the session. ``"each"``: every positive with
    its own ``k``; the session's term is the mean over the positives that keep a pair. ``"pooled"``: all at once::

        A = LSE_n(r_n + gamma + log w_n) - LSE_p(r_p),    w_n = min_p w_pn

    Here ``protect="winner"`` means ``"positives"``, and ``aggregation`` must be ``"negatives"``.

    **Dropped pairs** have a member of length 0, equal SIDs, or weight 0. A pool drops a negative from all its pairs if
    it equals any positive or if ``w_n`` is 0. A session that keeps no pair adds exactly 0 to the loss and its gradient.

    **SFT**: the sum of ``-level_weights[i] * logps[p, i]`` over the tokens of all positives. It is never detached.

    ``reduction="mean"`` divides the preference by the number of sessions that keep a pair, and SFT by its tokens.
    ``"sum"`` does not divide. ``"none"`` returns the terms of ``"sum"`` per session.

    With ``protect="none"``, no weights, no SFT and one negative this is SimPO. With ``length_normalized=False``,
    ``gamma=0`` and ``ref_logps`` as well it is DPO, or S-DPO with several negatives (:data:`PRESETS`).

    Args:
        logps: float32 or float64 ``[C, L]`` token log-probs. Entries beyond the lengths are not read and get gradient
            0.
        sessions: the candidates, on the same device.
        ref_logps: ``[C, L]`` of a reference model, in the dtype of ``logps``; no gradient flows to them.
        pair_weights: ``[M]`` finite and at least 0, in the order of ``sessions.pairs()``; no gradient flows to them.
        beta: finite, above 0.
        gamma: finite; outside ``beta``.
        length_normalized: divide rewards by the length.
        protect: which common prefixes are detached.
        detach: bool ``[C, L]``: log-probs that get no gradient from the preference, of positives too; replaces
            ``protect``.
        aggregation: ``"negatives"`` or ``"margins"``.
        weighting: ``"loss"`` or ``"reward"``.
        positives: ``"winner"``, ``"each"`` or ``"pooled"``.
        sft_weight: finite, at least 0.
        level_weights: ``[L]`` numbers, finite and at least 0; default 1.
        label_smoothing: in ``[0, 0.5)``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        normalizer: ``(sessions, tokens)``, positive numbers or tensors of one element: replaces the two counts of
            ``"mean"``, so that the losses of ranks and accumulated batches sum to the loss of one big batch.
        check: also raise for NaN log-probs, and check values on CUDA (synchronises).

    Returns:
        :class:`SessionLossOutput`, finite for finite input. The loss is differentiable once.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Sources:
        RAD-DPO (arXiv 2602.23964), S-DPO (2406.09215), SimPO (2405.14734).

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2]])  # a positive and two negatives
        >>> sessions = rx.SessionBatch(tokens, torch.tensor([2, 2, 2]), torch.tensor([0, 3]), torch.tensor([1]))
        >>> logps = torch.tensor([[-1.0, -1.0], [-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
        >>> rx.rad_dpo_loss(logps, sessions, sft_weight=0.0).loss.backward()
        >>> logps.grad[1]  # a negative: its first token, in common with the positive, gets no gradient
        tensor([0.0000, 0.2447])
    """
    loss_arguments.check_input(logps, "logps", sessions, 2)
    if logps.shape != sessions.tokens.shape:
        raise ValueError(
            f"logps must have the shape of tokens, {tuple(sessions.tokens.shape)}, got {tuple(logps.shape)}"
        )
    # Options that exclude each other, and constants.
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
    # One call computes the loss and its gradient.
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
