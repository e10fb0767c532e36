"""RADDPOLoss: from hidden states, head and sessions to a loss and its metrics."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn

from raddpo_ext import _check
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.logps.linear_token_logps import linear_token_logps
from raddpo_ext.losses.rad_dpo_loss import SessionLossOutput, rad_dpo_loss
from raddpo_ext.losses.session import SessionBatch
from raddpo_ext.losses.session_loss import TOTALS
from raddpo_ext.losses.similarity_weighting import SimilarityWeighting

_IGNORED = -100
_GIVEN_BY_CALL = {"logps", "sessions", "ref_logps", "pair_weights", "detach", "normalizer", "check"}
_OPTIONS = set(inspect.signature(rad_dpo_loss).parameters) - _GIVEN_BY_CALL


class RADDPOOutput(NamedTuple):
    """What :class:`RADDPOLoss` returns.

    Attributes:
        loss: of no dimension, or ``[S]`` with ``reduction="none"``; differentiable.
        metrics: tensors without gradient, of no dimension, to log: ``loss``, ``preference``, ``sft`` (as reduced);
            ``rewards/chosen`` and ``rewards/rejected``, the mean rewards of the positives and of the negatives;
            ``rewards/margins``, ``rewards/accuracies`` and ``pair_weights``, means over the loss's pairs; ``detached``,
            the share of those pairs' negative tokens that get no gradient from the preference; ``dropped_pairs``, the
            share of pairs of equal SIDs or with an empty one. A mean of nothing is 0.
        logps: ``[C, L]`` token log-probs, 0 beyond the lengths; differentiable.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logps: Tensor


class RADDPOLoss(nn.Module):
    """:func:`linear_token_logps`, :class:`SimilarityWeighting` and :func:`rad_dpo_loss` in one module.

    Args:
        similarity_weighting: gives the pairs' weights from the candidates' embeddings, or None.
        normalize, vocab, index, temperature, logit_softcap, logits_budget, accumulate_grad: see
            :func:`linear_token_logps`; each token's level is its position.
        options: of :func:`rad_dpo_loss` (``beta``, ``gamma``, ``protect``, ...), or one of :data:`PRESETS`:
            ``RADDPOLoss(**rx.PRESETS["s_dpo"])``.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Source: RAD-DPO (arXiv 2602.23964).
    """

    def __init__(
        self,
        similarity_weighting: SimilarityWeighting | None = None,
        *,
        normalize: str = "vocab",
        vocab: SIDVocab | None = None,
        index: TrieIndex | None = None,
        temperature: float = 1.0,
        logit_softcap: float | None = None,
        logits_budget: int = 2**30,
        accumulate_grad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if similarity_weighting is not None:
            _check.instance(similarity_weighting, "similarity_weighting", SimilarityWeighting)
        unknown = set(options) - _OPTIONS
        if unknown:
            raise TypeError(f"options must be of {sorted(_OPTIONS)}, got {sorted(unknown)}")
        self.similarity_weighting = similarity_weighting
        self.index = index
        self.head_options: dict[str, Any] = {
            "normalize": normalize,
            "vocab": vocab,
            "temperature": temperature,
            "logit_softcap": logit_softcap,
            "logits_budget": logits_budget,
            "accumulate_grad": accumulate_grad,
        }
        self.options = options

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        sessions: SessionBatch,
        *,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        embeddings: Tensor | None = None,
        ref_logps: Tensor | None = None,
        pair_weights: Tensor | None = None,
        detach: Tensor | None = None,
        normalizer: Any = None,
        check: bool = False,
    ) -> RADDPOOutput:
        """The loss of a batch of sessions.

        Args:
            hidden: ``[C, L, H]`` last-layer states that predict ``sessions.tokens``: that of token ``i`` comes from the
                position before it. Not read beyond the lengths.
            weight: ``[V, H]`` of the head.
            sessions: the candidates.
            bias: ``[V]`` of the head, or None.
            rows: int64 ``[C, L]``: which row of ``hidden``, then ``[U, H]``, predicts each token, see
                :func:`linear_token_logps`.
            embeddings: ``[C, D]`` states at the candidates' last tokens, for ``similarity_weighting``, and only for it.
            pair_weights: ``[M]``, where there is no ``similarity_weighting``.
            ref_logps, detach, normalizer, check: see :func:`rad_dpo_loss`.

        Raises:
            ValueError, TypeError: naming the argument and the value.
        """
        logps = self.logps(hidden, weight, sessions, bias=bias, rows=rows, check=check)
        return self.of_logps(
            logps,
            sessions,
            embeddings=embeddings,
            ref_logps=ref_logps,
            pair_weights=pair_weights,
            detach=detach,
            normalizer=normalizer,
            check=check,
        )

    def logps(
        self,
        hidden: Tensor,
        weight: Tensor,
        sessions: SessionBatch,
        *,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        check: bool = False,
    ) -> Tensor:
        """The linear part of :meth:`forward`: each candidate's token log-probs, those of a reference model too.

        Args:
            hidden, weight, sessions, bias, rows, check: see :meth:`forward`.

        Returns:
            ``[C, L]``, 0 beyond the lengths; differentiable.

        Raises:
            ValueError, TypeError: naming the argument and the value.
        """
        _check.instance(sessions, "sessions", SessionBatch)
        _check.instance(hidden, "hidden", Tensor)
        if rows is None and (hidden.dim() != 3 or hidden.shape[:2] != sessions.tokens.shape):
            raise ValueError(
                f"hidden must have shape [C, L, H] with [C, L] = {tuple(sessions.tokens.shape)}, that of "
                f"sessions.tokens, got {tuple(hidden.shape)}"
            )
        mask = sessions.mask()
        if rows is None:
            hidden = hidden.masked_fill(~mask[..., None], 0)  # 0 * NaN would reach the head's gradient
        return linear_token_logps(
            hidden,
            weight,
            sessions.tokens.masked_fill(~mask, _IGNORED),
            bias=bias,
            rows=rows,
            index=self.index,
            nodes=None if self.index is None else self.index.nodes(sessions.tokens),
            ignore_index=_IGNORED,
            check=check,
            **self.head_options,
        )

    def of_logps(
        self,
        logps: Tensor,
        sessions: SessionBatch,
        *,
        embeddings: Tensor | None = None,
        ref_logps: Tensor | None = None,
        pair_weights: Tensor | None = None,
        detach: Tensor | None = None,
        normalizer: Any = None,
        check: bool = False,
    ) -> RADDPOOutput:
        """The rest of :meth:`forward`, from the log-probs on: the pairs' weights, the loss and its metrics.

        Args:
            logps: ``[C, L]``, of :meth:`logps` or from elsewhere.
            sessions, embeddings, ref_logps, pair_weights, detach, normalizer, check: see :meth:`forward`.

        Raises:
            ValueError, TypeError: naming the argument and the value.
        """
        result = self.result(
            logps,
            sessions,
            embeddings=embeddings,
            ref_logps=ref_logps,
            pair_weights=pair_weights,
            detach=detach,
            normalizer=normalizer,
            check=check,
        )
        return RADDPOOutput(result.loss, _metrics(result), logps)

    def result(
        self,
        logps: Tensor,
        sessions: SessionBatch,
        *,
        embeddings: Tensor | None = None,
        ref_logps: Tensor | None = None,
        pair_weights: Tensor | None = None,
        detach: Tensor | None = None,
        normalizer: Any = None,
        check: bool = False,
    ) -> SessionLossOutput:
        """:meth:`of_logps` as :func:`rad_dpo_loss` returns it, with the sums behind the metrics."""
        if (embeddings is None) != (self.similarity_weighting is None):
            wanted = "be None without" if self.similarity_weighting is None else "be given with"
            raise ValueError(f"embeddings must {wanted} similarity_weighting, got {type(embeddings).__name__}")
        if self.similarity_weighting is not None:
            if pair_weights is not None:
                raise ValueError("pair_weights must be None with similarity_weighting, which gives them")
            pair_weights = self.similarity_weighting(embeddings, sessions)
        return rad_dpo_loss(
            logps,
            sessions,
            ref_logps=ref_logps,
            pair_weights=pair_weights,
            detach=detach,
            normalizer=normalizer,
            check=check,
            **self.options,
        )


def _metrics(result: SessionLossOutput) -> dict[str, Tensor]:
    totals = result.totals if result.totals.dim() == 2 else result.totals.sum(0)
    sums, counts = totals.unbind(1)
    means = (sums / counts.clamp(min=1)).to(result.rewards.dtype).unbind()
    losses = {name: getattr(result, name).detach() for name in ("loss", "preference", "sft")}
    return dict(zip(TOTALS, means, strict=True)) | losses
