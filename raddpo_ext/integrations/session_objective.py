"""What the trainer computes inside a model's forward: the loss and its metrics, log-probs, and figures of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raddpo_ext.data.pack_sessions import PackedSessions
from raddpo_ext.integrations.session_states import SessionStates
from raddpo_ext.losses.rad_dpo_loss import rad_dpo_loss
from raddpo_ext.losses.rad_dpo_module import RADDPOLoss
from raddpo_ext.losses.session import SessionBatch
from raddpo_ext.losses.similarity_weighting import SimilarityWeighting

#: The metrics of a training batch, in the order of :meth:`SessionObjective.forward`'s table.
METRICS = (
    "preference",
    "sft",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "pair_weights",
    "detached",
    "dropped_pairs",
    "truncated_prompts",
)
#: The sums of a row, in the order of :meth:`SessionObjective.rows`'s columns: what is divided, and by what.
ROWS = (
    ("preference", "sessions"),
    ("sft", "tokens"),
    ("rewards/chosen", "chosen"),
    ("rewards/rejected", "rejected"),
    ("rewards/margins", "pairs"),
    ("rewards/accuracies", "pairs"),
)


class SessionObjective(nn.Module):
    """:class:`raddpo_ext.RADDPOLoss` for :func:`accept_sessions`; ``options`` are its options."""

    def __init__(self, similarity_weighting: SimilarityWeighting | None, **options: Any) -> None:
        super().__init__()
        self.loss = RADDPOLoss(similarity_weighting, **options)
        self.plain = RADDPOLoss(None, **options)

    @property
    def similarity_weighting(self) -> SimilarityWeighting | None:
        return self.loss.similarity_weighting

    @property
    def positives(self) -> str:
        return str(self.loss.options.get("positives", "winner"))

    def forward(
        self, states: SessionStates, packed: PackedSessions, *, ref_logps: Tensor | None, normalizer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss, and float64 ``[len(METRICS), 2]``: each metric and how many it is the mean of.

        That of preference and SFT is 1: they are this batch's share of the whole batch's loss.
        """
        sessions = packed.sessions
        output = self.loss(
            states.hidden,
            states.weight,
            sessions,
            rows=states.rows,
            bias=states.bias,
            embeddings=None if self.similarity_weighting is None else states.embeddings,
            ref_logps=ref_logps,
            normalizer=normalizer,
        )
        with torch.no_grad():
            kept = sessions.kept_pairs(self.positives)
            pairs = kept.sum()
            tokens = torch.where(kept, sessions.lengths[sessions.pairs()[1]], 0).sum()
            dropped = sessions.num_pairs - sessions.kept_pairs("each").sum()
            chosen, rejected = (rows.sum() for rows in _chosen_and_rejected(sessions))
            values = {
                **output.metrics,
                "dropped_pairs": dropped / max(sessions.num_pairs, 1),
                "truncated_prompts": pairs.new_full((), packed.num_truncated) / max(sessions.num_sessions, 1),
            }
            weights = {
                "preference": torch.ones_like(pairs),
                "sft": torch.ones_like(pairs),
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "detached": tokens,
                "dropped_pairs": pairs.new_full((), sessions.num_pairs),
                "truncated_prompts": pairs.new_full((), sessions.num_sessions),
            }
            table = [torch.stack((values[name].double(), weights.get(name, pairs).double())) for name in METRICS]
        return output.loss, torch.stack(table)

    def logps(self, states: SessionStates, packed: PackedSessions) -> Tensor:
        """``[C, L]`` token log-probs."""
        output = self.plain(states.hidden, states.weight, packed.sessions, rows=states.rows, bias=states.bias)
        logps: Tensor = output.logps
        return logps

    def rows(self, states: SessionStates, packed: PackedSessions, *, ref_logps: Tensor | None) -> Tensor:
        """float64 ``[S, 2 * len(ROWS)]``: of each session the sums of :data:`ROWS` and what they are divided by."""
        sessions = packed.sessions
        weights = None
        if self.similarity_weighting is not None and states.embeddings is not None:
            weights = self.similarity_weighting(states.embeddings, sessions)
        logps = self.logps(states, packed)
        result = rad_dpo_loss(
            logps,
            sessions,
            ref_logps=ref_logps,
            pair_weights=None if weights is None else weights.to(logps.dtype),
            reduction="none",
            **self.loss.options,
        )
        kept = sessions.kept_pairs(self.positives)
        chosen, rejected = _chosen_and_rejected(sessions)
        by_candidate, by_pair = sessions.offsets.diff(), sessions.pair_offsets.diff()

        def total(values: Tensor, counts: Tensor) -> Tensor:
            numbers = torch.arange(len(counts), device=values.device)
            owner = torch.repeat_interleave(numbers, counts, output_size=len(values))
            return values.new_zeros(len(counts), dtype=torch.float64).index_add_(0, owner, values.double())

        pairs = total(kept, by_pair)
        columns = [
            (result.preference, pairs > 0),
            (result.sft, total(torch.where(chosen, sessions.lengths, 0), by_candidate)),
            (total(torch.where(chosen, result.rewards, 0), by_candidate), total(chosen, by_candidate)),
            (total(torch.where(rejected, result.rewards, 0), by_candidate), total(rejected, by_candidate)),
            (total(torch.where(kept, result.margins, 0), by_pair), pairs),
            (total(kept & (result.margins > 0), by_pair), pairs),
        ]
        return torch.stack([part.double() for column in columns for part in column], 1)


def _chosen_and_rejected(sessions: SessionBatch) -> tuple[Tensor, Tensor]:
    """Which candidates are positives and which negatives, those of length 0 left out: bool ``[C]`` each."""
    chosen = sessions.is_positive()
    return chosen & (sessions.lengths > 0), ~chosen & (sessions.lengths > 0)
