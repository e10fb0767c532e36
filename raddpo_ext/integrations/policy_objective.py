"""The policy loss of packed groups, and its metrics as sums that add up over batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raddpo_ext.data.pack_sessions import PackedSessions
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.integrations.rollouts import Groups
from raddpo_ext.integrations.session_states import SessionStates
from raddpo_ext.losses.rad_dpo_module import RADDPOLoss
from raddpo_ext.losses.session import SessionBatch
from raddpo_ext.policy.policy_counts import policy_counts
from raddpo_ext.policy.policy_loss import policy_loss

#: The metrics of a batch of rollouts, in the order of :func:`rollout_sums`.
OF_ROLLOUTS = ("reward", "reward_std", "active", "distinct", "entropy", "truncated_prompts")
#: The metrics of an update, in the order of the rows that :meth:`PolicyObjective.forward` returns.
OF_UPDATE = ("policy", "kl", "nll", "approx_kl", "clipped/low", "clipped/high", "legal_mass", "invalid")
METRICS = (*OF_ROLLOUTS, *OF_UPDATE)


class PolicyObjective(nn.Module):
    """Applies :func:`raddpo_ext.policy_loss` to session states, as a ``compute`` of :func:`accept_sessions`.

    Args:
        index: the catalogue.
        normalize: ``"trie"`` or ``"vocab"``, the support of the log-probs.
        head: ``temperature`` and ``logit_softcap`` of the log-probs, see :func:`raddpo_ext.linear_token_logps`.
        options: arguments of :func:`raddpo_ext.policy_loss`.
    """

    def __init__(self, index: TrieIndex, normalize: str, head: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__()
        supports = {
            "trie": RADDPOLoss(normalize="trie", index=index, **head),
            "vocab": RADDPOLoss(normalize="vocab", **head),
        }
        self.head = supports.pop(normalize)  # only its log-probs are used
        (self.other_head,) = supports.values()
        self.normalize, self.options = normalize, options
        # An empty batch makes the loss check these options here, and not at the first step.
        none = SessionBatch(*(torch.zeros(shape, dtype=torch.int64) for shape in ((0, 1), (0,), (1,), (0,))))
        levels = len(options.get("level_weights", ())) or 1
        none.tokens = none.tokens.expand(0, levels)
        empty = torch.zeros(0, levels)
        policy_loss(empty, none, empty[:, 0], ref_logps=empty, **options)

    def accumulate_grad(self, on: bool) -> None:
        """Set whether the gradient of the head's weight is added to ``weight.grad`` directly."""
        self.head.head_options["accumulate_grad"] = on

    def forward(
        self,
        states: SessionStates,
        packed: PackedSessions,
        *,
        advantages: Tensor,
        normalizer: Tensor,
        probe: bool,
        old_logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        weights: Tensor | None = None,
        gates: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss and the sums behind the metrics.

        Args:
            states, packed: the groups.
            probe: also compute ``legal_mass`` and ``invalid``, at the cost of a product with the whole head.
            other arguments: see :func:`raddpo_ext.policy_loss`.

        Returns:
            The loss; float64 ``[len(OF_UPDATE), 2]``, a sum and its divisor per metric; and the log-probs ``[C, L]``,
            without gradient. The divisors of the loss's parts are 1, because these are already shares of the whole
            batch's loss.
        """
        logps = self.logps(states, packed)
        sessions = packed.sessions
        output = policy_loss(
            logps,
            sessions,
            advantages,
            old_logps=old_logps,
            ref_logps=ref_logps,
            weights=weights,
            gates=gates,
            normalizer=normalizer,
            **self.options,
        )
        tokens = counts(sessions, advantages, self.options, aggregate="token")[0]
        sums = torch.zeros(len(OF_UPDATE), 2, dtype=torch.float64, device=logps.device)
        sums[:3, 0] = torch.stack((output.policy, output.kl, output.nll)).detach()
        sums[:3, 1] = torch.tensor([1, ref_logps is not None, self.options.get("nll_weight", 0) > 0])
        sums[3:6, 0] = torch.cat((output.approx_kl[None], output.clipped)).detach() * tokens
        sums[3:6, 1] = tokens
        if probe:
            sums[6:] = self._legal(states, packed, logps.detach(), weights)
        return output.loss, sums, logps.detach()

    def logps(self, states: SessionStates, packed: PackedSessions) -> Tensor:
        """The candidates' token log-probs, ``[C, L]``."""
        return self._logps(self.head, states, packed)

    @staticmethod
    def _logps(head: RADDPOLoss, states: SessionStates, packed: PackedSessions) -> Tensor:
        return head.logps(states.hidden, states.weight, packed.sessions, rows=states.rows, bias=states.bias)

    @torch.no_grad()
    def _legal(self, states: SessionStates, packed: PackedSessions, logps: Tensor, weights: Tensor | None) -> Tensor:
        """Sums and divisors of ``legal_mass`` and ``invalid``, over the rollouts: float64 ``[2, 2]``.

        With ``M`` the mass of the legal tokens, ``log p_vocab = log p_trie + log M``. The probability that a draw
        without a constraint ends in an item is the sum over items of ``p_vocab``, so the mean of the product of a SID's
        ``M`` over SIDs drawn from ``p_trie``.
        """
        sessions = packed.sessions
        other = self._logps(self.other_head, states, packed)
        log_mass = (other - logps if self.normalize == "trie" else logps - other).double().clamp(max=0)
        rollouts = ~sessions.is_positive()
        mask = sessions.mask() & rollouts[:, None]
        log_mass = log_mass.masked_fill(~mask, 0)
        weight = (torch.ones_like(sessions.lengths) if weights is None else weights).double() * rollouts
        legal = group_means(log_mass.sum(1).exp(), weight, sessions)
        total = (log_mass.exp() * mask).sum()
        return torch.stack(
            (torch.stack((total, mask.sum())), torch.stack((((1 - legal[0]) * legal[1]).sum(), legal[1].sum())))
        )


def counts(sessions: SessionBatch, advantages: Tensor, options: dict[str, Any], **others: str) -> Tensor:
    """:func:`raddpo_ext.policy_counts` for these options of the loss, or for others."""
    chosen = {name: options[name] for name in ("experts", "aggregate", "count") if name in options}
    return policy_counts(sessions, advantages, **{**chosen, **others})


def rollout_sums(groups: Groups, rewards: Tensor, active: Tensor, truncated: int) -> Tensor:
    """The sum and the divisor of each metric of :data:`OF_ROLLOUTS`: float64 ``[len(OF_ROLLOUTS), 2]``."""
    sessions = groups.sessions
    owners, count = sessions.owners(), sessions.num_sessions
    rollouts = (~sessions.is_positive()).double()
    weights = rollouts if groups.weights is None else groups.weights * rollouts
    size = _sums(rollouts, sessions)
    center = rewards.double() - (_sums(rewards * rollouts, sessions) / size)[owners]
    several = size > 1
    stds = (_sums(center**2 * rollouts, sessions)[several] / (size[several] - 1)).sqrt()
    means = [group_means(values, weights, sessions) for values in (rewards.double(), -groups.logps.nan_to_num())]
    named = torch.cat((owners[:, None], groups.codes), 1)[rollouts > 0]
    pairs: list[tuple[Any, Any]] = [
        ((means[0][0] * means[0][1]).sum(), means[0][1].sum()),
        (stds.sum(), several.sum()),
        (active.sum(), count),
        (len(named.unique(dim=0)), count),
        ((means[1][0] * means[1][1]).sum(), means[1][1].sum()),
        (truncated, count),
    ]
    return torch.tensor([[float(total), float(divisor)] for total, divisor in pairs], dtype=torch.float64)


def group_means(values: Tensor, weights: Tensor, sessions: SessionBatch) -> tuple[Tensor, Tensor]:
    """The weighted mean of each group, and 1 where it has a weight: float64 ``[S]`` each."""
    total = _sums(weights, sessions)
    return _sums(weights * values, sessions) / torch.where(total > 0, total, 1), (total > 0).double()


def _sums(values: Tensor, sessions: SessionBatch) -> Tensor:
    """The sum of each group's rows, float64 ``[S]``."""
    totals = torch.zeros(sessions.num_sessions, dtype=torch.float64, device=values.device)
    return totals.index_add(0, sessions.owners(), values.double())
