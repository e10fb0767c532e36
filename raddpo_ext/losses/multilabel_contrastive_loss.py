"""multilabel_contrastive_loss: contrasts all positives of a session with its negatives, given any scores."""

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
    """Contrast all positives ``P`` of a session with its negatives ``N``, given any scores::

        term = LSE_{P and N}(r) - LSE_P(r) = -log( sum_p e^{r_p} / (sum_p e^{r_p} + sum_n w_n e^{r_n}) )
        r = scores / temperature,    w_n = min_p w_pn

    This is the preference of :func:`rad_dpo_loss` with ``positives="pooled"`` and the scores as rewards. Candidates of
    length 0 are skipped. Negatives of weight 0, and negatives whose SID equals that of a positive of the session, are
    skipped too. A session that has no positives or no negatives left adds exactly 0.

    Args:
        scores: float32 or float64 ``[C]``.
        sessions: the candidates, on the same device.
        pair_weights: ``[M]`` finite and at least 0, in the order of ``sessions.pairs()``; no gradient flows to them.
        temperature: finite, above 0.
        reduction: ``"mean"`` over the sessions that keep a pair, ``"sum"``, or ``"none"`` for the terms ``[S]``.
        normalizer: a positive number or tensor of one element: the divisor of ``"mean"`` instead of that number.
        check: also raise for NaN scores, and check values on CUDA (synchronises).

    Returns:
        The loss, in the dtype of ``scores``, finite for finite input and differentiable once.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Source:
        The multi-label form of S-DPO's softmax (arXiv 2406.09215).

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2]])  # a positive and two negatives
        >>> sessions = rx.SessionBatch(tokens, torch.tensor([2, 2, 2]), torch.tensor([0, 3]), torch.tensor([1]))
        >>> rx.multilabel_contrastive_loss(torch.tensor([2.0, 0.0, 1.0]), sessions)
        tensor(0.4076)
    """
    loss_arguments.check_input(scores, "scores", sessions, 1)
    if len(scores) != sessions.num_candidates:
        raise ValueError(f"scores must have one entry per candidate ({sessions.num_candidates}), got {len(scores)}")
    if check:
        _check.none(scores.isnan(), lambda i: f"scores[{i}] is NaN")
    divisors = None if normalizer is None else (normalizer, 1.0)
    # Each score is passed as the log-prob of a single token. Lengths are not divided by, and no prefix is detached.
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
