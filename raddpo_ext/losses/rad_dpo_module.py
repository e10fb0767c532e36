"""RADDPOLoss: computes a loss and its metrics from hidden states, head and sessions."""

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
    """The result of :class:`RADDPOLoss`.

    Attributes:
        loss: a scalar, or ``[S]`` with ``reduction="none"``; differentiable.
        metrics: tensors to log, without gradient. ``loss``, ``preference`` and ``sft`` have the shape of ``loss``; the
            others are scalars: ``rewards/chosen`` and ``rewards/rejected``, the mean rewards of the positives and of
            the negatives; ``rewards/margins``, ``rewards/accuracies`` and ``pair_weights``, means over the kept pairs;
            ``detached``, the fraction of the tokens of these pairs' negatives that get no gradient from the preference;
            ``dropped_pairs``, the fraction of pairs with equal SIDs or an empty SID. Means over nothing are 0.
        logps: ``[C, L]`` token log-probs, 0 beyond the lengths; differentiable.

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2]])  # a positive and two negatives
        >>> sessions = rx.SessionBatch(tokens, torch.tensor([2, 2, 2]), torch.tensor([0, 3]), torch.tensor([1]))
        >>> output = rx.RADDPOLoss()(torch.zeros(3, 2, 4), torch.zeros(5, 4), sessions)  # uniform over 5 tokens
        >>> output.logps[0]
        tensor([-1.6094, -1.6094])
        >>> output.metrics["detached"]  # one of four: the first negative's first token
        tensor(0.2500)
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logps: Tensor


class RADDPOLoss(nn.Module):
    """Combine :func:`linear_token_logps`, :class:`SimilarityWeighting` and :func:`rad_dpo_loss` in one module.

    Args:
        similarity_weighting: computes the pair weights from the candidates' embeddings, or None.
        normalize, vocab, index, temperature, logit_softcap, logits_budget, accumulate_grad: see
            :func:`linear_token_logps`; the level of each token is its position.
        options: arguments of :func:`rad_dpo_loss` (``beta``, ``gamma``, ``protect``, ...), or one of :data:`PRESETS`:
            ``RADDPOLoss(**rx.PRESETS["s_dpo"])``.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Source: RAD-DPO (arXiv 2602.23964).

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2]])  # a positive and two negatives
        >>> sessions = rx.SessionBatch(tokens, torch.tensor([2, 2, 2]), torch.tensor([0, 3]), torch.tensor([1]))
        >>> hidden, weight = torch.zeros(3, 2, 4), torch.zeros(5, 4, requires_grad=True)
        >>> output = rx.RADDPOLoss(beta=2.0, sft_weight=0.0)(hidden, weight, sessions)
        >>> output.loss  # both negatives are as likely as the positive: log(1 + 2)
        tensor(1.0986, grad_fn=<LossBackward>)
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
            raise TypeError(f"options must be among {sorted(_OPTIONS)}, got {sorted(unknown)}")
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
        """Compute the loss of a batch of sessions.

        Args:
            hidden: ``[C, L, H]`` last-layer states that predict ``sessions.tokens``: the state for token ``i`` is at
                the position before it. States beyond the lengths are not read.
            weight: ``[V, H]`` of the head.
            sessions: the candidates.
            bias: ``[V]`` of the head, or None.
            rows: int64 ``[C, L]``, the row of ``hidden`` that predicts each token. ``hidden`` then has the shape
                ``[U, H]``, see :func:`linear_token_logps`.
            embeddings: ``[C, D]`` states at the candidates' last tokens: required with ``similarity_weighting``, else
                None.
            pair_weights: ``[M]``, or None; must be None with ``similarity_weighting``.
            ref_logps, detach, normalizer, check: see :func:`rad_dpo_loss`.

        Raises:
            ValueError, TypeError: naming the argument and the value.
        """
        logps = self.logps(hidden, weight, sessions, bias=bias, rows=rows, check=check)
        result = self.of_logps(
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
        """Compute the candidates' token log-probs, the linear part of :meth:`forward`; also for a reference model.

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
        # Padding has no log-prob, and no part in the gradients.
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
    ) -> SessionLossOutput:
        """Compute pair weights and loss from the log-probs, the rest of :meth:`forward`.

        Args:
            logps: ``[C, L]``, from :meth:`logps` or another source.
            sessions, embeddings, ref_logps, pair_weights, detach, normalizer, check: see :meth:`forward`.

        Returns:
            What :func:`rad_dpo_loss` returns; its ``totals`` are the sums behind the metrics of :meth:`forward`.

        Raises:
            ValueError, TypeError: naming the argument and the value.
        """
        # Pair weights come from the embeddings or from the caller, not from both.
        if (embeddings is None) != (self.similarity_weighting is None):
            required = "be None without" if self.similarity_weighting is None else "be given with"
            raise ValueError(f"embeddings must {required} similarity_weighting, got {type(embeddings).__name__}")
        if self.similarity_weighting is not None:
            if pair_weights is not None:
                raise ValueError("pair_weights must be None with similarity_weighting, which computes them")
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
    # Means over nothing are 0.
    sums, counts = totals.unbind(1)
    means = (sums / counts.clamp(min=1)).to(result.rewards.dtype).unbind()
    losses = {name: getattr(result, name).detach() for name in ("loss", "preference", "sft")}
    return dict(zip(TOTALS, means, strict=True)) | losses
