"""What the trainer computes inside a model's forward: the loss and its metrics, log-probs, and figures of each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raddpo_ext.data.pack_sessions import PackedSessions
from raddpo_ext.integrations.session_states import SessionStates
from raddpo_ext.losses.rad_dpo_loss import rad_dpo_loss
from raddpo_ext.losses.rad_dpo_module import RADDPOLoss
from raddpo_ext.losses.session_loss import TOTALS
from raddpo_ext.losses.similarity_weighting import SimilarityWeighting

#: The metrics of a training batch, in the order of :meth:`SessionObjective.forward`'s table.
METRICS = (*TOTALS, "truncated_prompts")
#: The metrics of a row, in the order of :meth:`SessionObjective.rows`'s columns.
ROWS = TOTALS[:6]


class SessionObjective(nn.Module):
    """:class:`raddpo_ext.RADDPOLoss` for :func:`accept_sessions`; ``options`` are its options."""

    def __init__(self, similarity_weighting: SimilarityWeighting | None, **options: Any) -> None:
        super().__init__()
        self.loss = RADDPOLoss(similarity_weighting, **options)

    @property
    def similarity_weighting(self) -> SimilarityWeighting | None:
        return self.loss.similarity_weighting

    @property
    def positives(self) -> str:
        return str(self.loss.options.get("positives", "winner"))

    def forward(
        self, states: SessionStates, packed: PackedSessions, *, ref_logps: Tensor | None, normalizer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss, and float64 ``[len(METRICS), 2]``: sums, and what they are divided by to be the metrics.

        That of preference and SFT is 1: they are this batch's share of the whole batch's loss.
        """
        result = self.loss.of_logps(
            self.logps(states, packed),
            packed.sessions,
            embeddings=None if self.similarity_weighting is None else states.embeddings,
            ref_logps=ref_logps,
            normalizer=normalizer,
        )
        totals = result.totals
        losses = torch.stack((result.preference, result.sft)).detach().to(totals.dtype)
        shares = torch.stack((losses, torch.ones_like(losses)), 1)
        truncated = torch.stack([totals.new_full((), n) for n in (packed.num_truncated, packed.sessions.num_sessions)])
        return result.loss, torch.cat((shares, totals[2:], truncated[None]))

    def logps(self, states: SessionStates, packed: PackedSessions) -> Tensor:
        """``[C, L]`` token log-probs."""
        return self.loss.logps(states.hidden, states.weight, packed.sessions, rows=states.rows, bias=states.bias)

    def rows(self, states: SessionStates, packed: PackedSessions, *, ref_logps: Tensor | None) -> Tensor:
        """float64 ``[S, 2 * len(ROWS)]``: of each session the sums of :data:`ROWS` and what they are divided by."""
        weights = None
        if self.similarity_weighting is not None and states.embeddings is not None:
            weights = self.similarity_weighting(states.embeddings, packed.sessions)
        result = rad_dpo_loss(
            self.logps(states, packed),
            packed.sessions,
            ref_logps=ref_logps,
            pair_weights=weights,
            reduction="none",
            **self.loss.options,
        )
        return result.totals[:, : len(ROWS)].flatten(1)
