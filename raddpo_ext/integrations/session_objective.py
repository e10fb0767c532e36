"""What the trainer computes inside a model's forward: the loss with its metrics, log-probs, or metrics per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raddpo_ext.data.pack_sessions import PackedSessions
from raddpo_ext.integrations.session_states import SessionStates
from raddpo_ext.logps.linear_token_logps import linear_token_logps
from raddpo_ext.losses.rad_dpo_loss import rad_dpo_loss
from raddpo_ext.losses.rad_dpo_module import RADDPOLoss
from raddpo_ext.losses.session_loss import TOTALS
from raddpo_ext.losses.similarity_weighting import SimilarityWeighting

#: The metrics of a training batch, in the order of the rows that :meth:`SessionObjective.forward` returns.
METRICS = (*TOTALS, "truncated_prompts")
#: The metrics of a data row, in the order of the columns that :meth:`SessionObjective.rows` returns.
ROWS = TOTALS[:6]


class SessionObjective(nn.Module):
    """Applies :class:`raddpo_ext.RADDPOLoss` to session states, as a ``compute`` of :func:`accept_sessions`.

    Args:
        similarity_weighting, options: see :class:`raddpo_ext.RADDPOLoss`.
    """

    def __init__(self, similarity_weighting: SimilarityWeighting | None, **options: Any) -> None:
        super().__init__()
        self.loss = RADDPOLoss(similarity_weighting, **options)

    @property
    def similarity_weighting(self) -> SimilarityWeighting | None:
        return self.loss.similarity_weighting

    @property
    def positives(self) -> str:
        return str(self.loss.options.get("positives", "winner"))

    def accumulate_grad(self, on: bool) -> None:
        """Set whether the gradient of the head's weight is added to ``weight.grad`` directly."""
        self.loss.head_options["accumulate_grad"] = on

    def forward(
        self,
        states: SessionStates,
        packed: PackedSessions,
        *,
        ref_logps: Tensor | None,
        normalizer: Tensor,
        page: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss and the sums behind the metrics.

        Args:
            states, packed: the sessions.
            ref_logps, normalizer: see :func:`raddpo_ext.rad_dpo_loss`.
            page: what a :class:`SessionCollator` with pages gives, for the loss of next-token prediction; or None.

        Returns:
            The loss; and float64 ``[len(METRICS), 2]``, a sum and its divisor per metric. The divisors of preference
            and SFT are 1, because these two are already shares of the whole batch's loss.
        """
        counts = (packed.num_truncated, packed.sessions.num_sessions)
        truncated = torch.stack([states.hidden.new_full((), n, dtype=torch.float64) for n in counts])
        if page is not None:
            sft = self._page_losses(states, packed, page).sum() / normalizer[1]
            sums = truncated.new_zeros((len(METRICS), 2))
            sums[:2, 1], sums[1, 0], sums[-1] = 1, sft.detach(), truncated
            return self.loss.options.get("sft_weight", 1.0) * sft, sums
        result = self.loss.of_logps(
            self.logps(states, packed),
            packed.sessions,
            embeddings=None if self.similarity_weighting is None else states.embeddings,
            ref_logps=ref_logps,
            normalizer=normalizer,
        )
        # The loss parts replace the first two rows of the totals, which are sums over this batch alone.
        totals = result.totals
        losses = torch.stack((result.preference, result.sft)).detach().to(totals.dtype)
        shares = torch.stack((losses, torch.ones_like(losses)), 1)
        return result.loss, torch.cat((shares, totals[2:], truncated[None]))

    def logps(self, states: SessionStates, packed: PackedSessions) -> Tensor:
        """The candidates' token log-probs, ``[C, L]``."""
        return self.loss.logps(states.hidden, states.weight, packed.sessions, rows=states.rows, bias=states.bias)

    def rows(
        self,
        states: SessionStates,
        packed: PackedSessions,
        *,
        ref_logps: Tensor | None,
        page: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The sum and the divisor of each metric of :data:`ROWS`, per session: float64 ``[S, 2 * len(ROWS)]``."""
        if page is not None:
            terms = torch.stack((self._page_losses(states, packed, page), page["weights"].sum(1)), 1).double()
            sums = terms.new_zeros((packed.sessions.num_sessions, len(ROWS), 2))
            sums[:, 1] = sums[:, 1].index_add(0, packed.sessions.owners(), terms)
            return sums.flatten(1)
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

    def _page_losses(self, states: SessionStates, packed: PackedSessions, page: dict[str, Tensor]) -> Tensor:
        """The weighted negative log-probs of each item of the pages, with the separator behind it: ``[C]``."""
        index = self.loss.index
        logps = linear_token_logps(
            states.hidden,
            states.weight,
            page["tokens"],
            bias=states.bias,
            rows=None if states.rows is None else page["rows"],
            index=index,
            # Of whole items: a token that has no weight is left out of the page, and the walk would end there.
            nodes=None if index is None else index.nodes(packed.sessions.tokens),
            **self.loss.head_options,
        )
        return -(page["weights"] * logps).sum(1)
