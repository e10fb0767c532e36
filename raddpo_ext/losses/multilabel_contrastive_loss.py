"""multilabel_contrastive_loss: all of a session's positives against its negatives, by any scores."""

from __future__ import annotations

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.losses import loss_arguments, session_loss
from raddpo_ext.losses.session import SessionBatch


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
    loss_arguments.check_input(scores, "scores", sessions, 1)
    if len(scores) != sessions.num_candidates:
        raise ValueError(f"scores must have one entry a candidate ({sessions.num_candidates}), got {len(scores)}")
    if check:
        _check.none(scores.isnan(), lambda i: f"scores[{i}] is NaN")
    divisors = None if normalizer is None else (normalizer, 1.0)
    # A score is the log-prob of a candidate's only token: the length and the common prefixes have no part in it.
    results = session_loss.session_loss(
        session_loss.Arguments(
            logps=scores[:, None].contiguous(),
            **sessions.layout(),
            pair_weights=loss_arguments.pair_weights(pair_weights, scores, sessions, check),
            reduction=_check.choice(reduction, "reduction", session_loss.REDUCTION),
            **loss_arguments.divisors(divisors, reduction, scores, check),
            beta=1 / _check.positive(temperature, "temperature"),
            positives=session_loss.POSITIVES.index("pooled"),
            need_gradient=scores.requires_grad and torch.is_grad_enabled(),
        )
    )
    return results.loss
