"""The session loss with its gradient, beside vectorised torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import softplus

from raddpo_ext.bench.compare import Comparison, Run
from raddpo_ext.losses.rad_dpo_loss import rad_dpo_loss
from raddpo_ext.losses.session import SessionBatch

BETA = 2.0
CODES = 8  # of a level: few, so that candidates share prefixes


class Problem:
    """Ragged sessions with from ``positives[0]`` to ``positives[1]`` positives, ``negatives`` likewise, SIDs of
    ``levels`` codes, a weight a pair, and log-probs, a leaf."""

    def __init__(
        self,
        sessions: int,
        positives: tuple[int, int],
        negatives: tuple[int, int],
        levels: int,
        device: torch.device | None = None,
    ) -> None:
        torch.manual_seed(0)
        counts = torch.stack([torch.randint(least, most + 1, (sessions,)) for least, most in (positives, negatives)], 1)
        candidates = int(counts.sum())
        self.sessions = SessionBatch(
            torch.randint(CODES, (candidates, levels)),
            torch.full((candidates,), levels),
            torch.tensor([0, *accumulate(counts.sum(1).tolist())]),
            counts[:, 0].clone(),
        ).to(device or "cpu")
        self.weights = (0.5 + 0.5 * torch.rand(self.sessions.num_pairs)).to(device)
        self.logps = (-3 * torch.rand(candidates, levels)).to(device).requires_grad_()

    def differentiated(self, loss: Callable[[], Tensor]) -> Run:
        def run() -> tuple[Tensor, Tensor]:
            value = loss()
            return value.detach(), torch.autograd.grad(value, self.logps)[0]

        return run

    def ours(self) -> Run:
        options = {"pair_weights": self.weights, "beta": BETA}
        return self.differentiated(lambda: rad_dpo_loss(self.logps, self.sessions, **options).loss)  # type: ignore[arg-type]

    def vectorised(self) -> Run:
        """As an expert would write it, returning what ours does: the loss, rewards, every pair's margin and accuracy.

        What follows from the sessions' sizes is worked out beforehand; the tokens are compared in each call, as ours
        does. It minds no lengths, which are all the same here, nor a session that keeps no pair.
        """
        sessions, levels = self.sessions, self.sessions.tokens.shape[1]
        session, is_positive = sessions.owners(), sessions.is_positive()
        negatives, winners = (~is_positive).nonzero()[:, 0], sessions.offsets[:-1]
        positive_of_pair, negative_of_pair = sessions.pairs()
        winner_pairs = torch.isin(positive_of_pair, winners).nonzero()[:, 0]  # in the negatives' order
        by_session = Padding(session[negatives])
        sft_share = is_positive[:, None] / (is_positive.sum() * levels)
        level = torch.arange(levels, device=sessions.device)

        def loss_and_metrics() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            logps, tokens = self.logps, sessions.tokens
            same = tokens.index_select(0, positive_of_pair) == tokens.index_select(0, negative_of_pair)
            shared = same.cumprod(1, dtype=torch.int8).sum(1)  # leading tokens of each pair
            detached = torch.zeros_like(tokens, dtype=torch.bool)
            detached[negatives] = level < shared.index_select(0, winner_pairs)[:, None]
            rewards = BETA / levels * torch.where(detached, logps.detach(), logps).sum(1)
            terms = rewards.index_select(0, negatives) + self.weights.index_select(0, winner_pairs).log()
            terms = terms.masked_fill(detached[:, -1].index_select(0, negatives), -math.inf)
            gaps = by_session.log_sum_exp(terms) - rewards.index_select(0, winners)
            loss = softplus(gaps).mean() - (logps * sft_share).sum()
            with torch.no_grad():
                dropped = shared == levels
                margins = rewards.index_select(0, positive_of_pair) - rewards.index_select(0, negative_of_pair)
                margins.masked_fill_(dropped, 0)
                accuracy = (margins[winner_pairs] > 0).sum() / (~dropped[winner_pairs]).sum()
            return loss, rewards.detach(), margins, accuracy

        return self.differentiated(lambda: loss_and_metrics()[0])

    def bytes_moved(self) -> Run:
        """Copies as many bytes as forward and backward must move: tokens, lengths, weights and log-probs are read,
        rewards, margins, the saved gradient and the gradient written, and the saved one read."""
        sessions, gradient = self.sessions, self.logps.nbytes
        read = sessions.tokens.nbytes + sessions.lengths.nbytes + self.weights.nbytes + 2 * gradient
        written = 4 * (sessions.num_candidates + sessions.num_pairs) + 2 * gradient
        there, here = torch.zeros(2, (read + written) // 2, dtype=torch.uint8, device=sessions.device)
        return lambda: here.copy_(there)


class Padding:
    """Where the entries of ascending groups stand in a table ``[groups, most]``."""

    def __init__(self, group: Tensor) -> None:
        counts = torch.bincount(group)
        self.shape = len(counts), int(counts.max())
        places = torch.arange(len(group), device=group.device)
        self.slots = group * self.shape[1] + places - (counts.cumsum(0) - counts)[group]

    def log_sum_exp(self, terms: Tensor) -> Tensor:
        table = terms.new_full((self.shape[0] * self.shape[1],), -math.inf)
        return table.index_copy(0, self.slots, terms).view(self.shape).logsumexp(1)


def comparison(
    device: torch.device, *, sessions: int, positives: tuple[int, int], negatives: tuple[int, int], levels: int
) -> Comparison:
    problem = Problem(sessions, positives, negatives, levels, device)
    sizes = f"{sessions} sessions, {len(problem.logps):,} candidates, {len(problem.weights):,} pairs"
    return Comparison(
        f"rad_dpo_loss and gradient, {sizes}",
        {"ours": problem.ours(), "vectorised torch": problem.vectorised()},
        {"its bytes, copied": problem.bytes_moved()},
    )
