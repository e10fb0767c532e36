"""RADDPOLoss: from hidden states, head and sessions to a loss and its metrics."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raddpo_ext import _check
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.logps.linear_token_logps import linear_token_logps
from raddpo_ext.losses.rad_dpo_loss import rad_dpo_loss
from raddpo_ext.losses.session import SessionBatch
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
            the share of those pairs' negative tokens that get no gradient from the preference. A mean of nothing is 0.
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
        _check.instance(sessions, "sessions", SessionBatch)
        _check.instance(hidden, "hidden", Tensor)
        if rows is None and (hidden.dim() != 3 or hidden.shape[:2] != sessions.tokens.shape):
            raise ValueError(
                f"hidden must have shape [C, L, H] with [C, L] = {tuple(sessions.tokens.shape)}, that of "
                f"sessions.tokens, got {tuple(hidden.shape)}"
            )
        if (embeddings is None) != (self.similarity_weighting is None):
            wanted = "be None without" if self.similarity_weighting is None else "be given with"
            raise ValueError(f"embeddings must {wanted} similarity_weighting, got {type(embeddings).__name__}")
        if self.similarity_weighting is not None:
            if pair_weights is not None:
                raise ValueError("pair_weights must be None with similarity_weighting, which gives them")
            pair_weights = self.similarity_weighting(embeddings, sessions)
        targets = sessions.tokens.masked_fill(~sessions.mask(), _IGNORED)
        nodes = None if self.index is None else self.index.nodes(sessions.tokens)
        if rows is None:
            hidden = hidden.masked_fill(~sessions.mask()[..., None], 0)  # 0 * NaN would reach the head's gradient
        logps = linear_token_logps(
            hidden,
            weight,
            targets,
            bias=bias,
            rows=rows,
            index=self.index,
            nodes=nodes,
            ignore_index=_IGNORED,
            check=check,
            **self.head_options,
        )
        result = rad_dpo_loss(
            logps,
            sessions,
            ref_logps=ref_logps,
            pair_weights=pair_weights,
            detach=detach,
            normalizer=normalizer,
            check=check,
            **self.options,
        )
        metrics = {name: getattr(result, name).detach() for name in ("loss", "preference", "sft")}
        with torch.no_grad():
            metrics |= self._metrics(sessions, result.rewards, result.margins, pair_weights, detach)
        metrics["rewards/accuracies"] = result.accuracy
        return RADDPOOutput(result.loss, metrics, logps)

    def _metrics(
        self,
        sessions: SessionBatch,
        rewards: Tensor,
        margins: Tensor,
        pair_weights: Tensor | None,
        detach: Tensor | None,
    ) -> dict[str, Tensor]:
        lengths = sessions.lengths
        chosen = sessions.is_positive()
        positive, negative = sessions.pairs()
        mask = sessions.mask()
        same = (sessions.tokens[positive] == sessions.tokens[negative]) & mask[positive] & mask[negative]
        prefix = same.to(torch.int64).cumprod(1).sum(1)
        weights = torch.ones_like(margins) if pair_weights is None else pair_weights.to(margins.dtype)
        positives = self.options.get("positives", "winner")
        kept = sessions.kept_pairs(positives, weights)

        protect = self.options.get("protect", "winner")
        if detach is not None:
            detached = (detach & mask).sum(1)[negative]
        elif protect == "none":
            detached = torch.zeros_like(prefix)
        elif protect == "positives" or positives == "pooled":
            longest = torch.zeros_like(lengths).scatter_reduce_(0, negative, prefix, "amax")
            detached = longest[negative]
        else:
            detached = prefix
        shielded, tokens = (torch.where(kept, count, 0).sum() for count in (detached, lengths[negative]))
        return {
            "rewards/chosen": _mean(rewards, chosen & (lengths > 0)),
            "rewards/rejected": _mean(rewards, ~chosen & (lengths > 0)),
            "rewards/margins": _mean(margins, kept),
            "pair_weights": _mean(weights, kept),
            "detached": shielded.to(margins.dtype) / tokens.clamp(min=1),
        }


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen, values, 0).sum() / chosen.sum().clamp(min=1)
