"""The session loss with its gradient, ours and the same in plain torch.

- ``vectorised`` returns what ours does: the loss, the rewards, the margin of every pair and the accuracy. It has every
  row number and every slot of its padded tables prepared: whatever follows from the sessions' sizes is not timed. It
  compares tokens in each call, as ours does.
- ``loss_only`` is the same without rewards, margins and accuracy.
- ``prepared`` is ``loss_only`` with the common prefixes prepared too. No training step has them: its sessions are new.
- ``compiled`` is ``vectorised`` under ``torch.compile``, compiled for this very batch.
- ``loop`` is a Python loop over the sessions, and computes the loss only.

None of these handles different lengths or sessions that keep no pair; neither occurs here.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from raddpo_ext.bench.compare import Missing
from raddpo_ext.bench.session_loss_cases import BETA, Batch, Step
from raddpo_ext.losses.rad_dpo_loss import rad_dpo_loss


class Padding:
    """The places of the entries of ascending groups in a padded table ``[groups, size of the largest group]``."""

    def __init__(self, group: Tensor) -> None:
        counts = torch.bincount(group)
        self.shape = len(counts), int(counts.max())
        places = torch.arange(len(group), device=group.device)
        self.slots = group * self.shape[1] + places - (counts.cumsum(0) - counts)[group]

    def log_sum_exp(self, terms: Tensor) -> Tensor:
        """The log-sum-exp of each group's terms."""
        table = terms.new_full((self.shape[0] * self.shape[1],), -math.inf)
        return table.index_copy(0, self.slots, terms).view(self.shape).logsumexp(1)


class Layout:
    """Everything that depends only on the sessions' sizes."""

    def __init__(self, batch: Batch) -> None:
        sessions = batch.sessions
        session, is_positive = sessions.owners(), sessions.is_positive()  # of each row
        self.is_negative = ~is_positive[:, None]
        self.positives, self.negatives = is_positive.nonzero()[:, 0], (~is_positive).nonzero()[:, 0]
        self.winner_of_row = sessions.offsets[session]
        self.winners = sessions.offsets[:-1]
        self.positive_of_pair, self.negative_of_pair = sessions.pairs()
        self.winner_pairs = torch.isin(self.positive_of_pair, self.winners).nonzero()[:, 0]  # in the negatives' order
        self.by_session = Padding(session[self.negatives])
        self.positives_by_session = Padding(session[self.positives])
        self.by_positive = Padding(self.positive_of_pair.unique_consecutive(return_inverse=True)[1])
        self.share = 1 / (sessions.num_positives[session[self.positives]] * sessions.num_sessions)  # of each positive
        self.sft_share = is_positive[:, None] / (is_positive.sum() * batch.case.levels)


def shared_with_winner(tokens: Tensor, at: Layout) -> Tensor:
    """Each negative's tokens up to the first that differs: bool ``[C, L]``."""
    same = tokens == tokens.index_select(0, at.winner_of_row)
    return same.cumprod(1, dtype=torch.int8).bool() & at.is_negative


def winner_loss(logps: Tensor, shared: Tensor, weights: Tensor, at: Layout) -> Tensor:
    """The loss whose winner is the first positive."""
    rewards = BETA / logps.shape[1] * torch.where(shared, logps.detach(), logps).sum(1)
    terms = rewards.index_select(0, at.negatives) + weights.index_select(0, at.winner_pairs).log()
    terms = terms.masked_fill(shared[:, -1].index_select(0, at.negatives), -math.inf)
    gaps = at.by_session.log_sum_exp(terms) - rewards.index_select(0, at.winners)
    return softplus(gaps).mean() - (logps * at.sft_share).sum()


def shared_by_pair(tokens: Tensor, at: Layout) -> Tensor:
    """Each pair's number of leading tokens in common: ``[M]``."""
    same = tokens.index_select(0, at.positive_of_pair) == tokens.index_select(0, at.negative_of_pair)
    return same.cumprod(1, dtype=torch.int8).sum(1)


def each_loss(logps: Tensor, shared: Tensor, weights: Tensor, at: Layout) -> Tensor:
    """The loss over all positives.

    With the sums of each row's last log-probs, the part of a negative that is not detached is a single number.
    """
    levels = logps.shape[1]
    scaled = BETA / levels * logps
    rewards = scaled.sum(1)
    last = pad(scaled.flip(1).cumsum(1).flip(1), (0, 1)).view(-1)  # [C * (L + 1)]
    free = last.index_select(0, at.negative_of_pair * (levels + 1) + shared)
    terms = free + (rewards.detach().index_select(0, at.negative_of_pair) - free.detach()) + weights.log()
    terms = terms.masked_fill(shared == levels, -math.inf)
    gaps = at.by_positive.log_sum_exp(terms) - rewards.index_select(0, at.positives)
    return (softplus(gaps) * at.share).sum() - (logps * at.sft_share).sum()


def shared_with_any(tokens: Tensor, at: Layout) -> Tensor:
    """The longest prefix that each negative has in common with any positive: bool ``[C, L]``."""
    return longest_with_any(shared_by_pair(tokens, at), tokens, at)


def longest_with_any(by_pair: Tensor, tokens: Tensor, at: Layout) -> Tensor:
    """The longest prefix per negative as a mask ``[C, L]``, from those of its pairs ``[M]``."""
    longest = by_pair.new_zeros(len(tokens)).scatter_reduce(0, at.negative_of_pair, by_pair, "amax")
    return torch.arange(tokens.shape[1], device=tokens.device) < longest[:, None]


def pooled_loss(logps: Tensor, shared: Tensor, weights: Tensor, at: Layout) -> Tensor:
    """The loss whose winner is the sum over all positives."""
    rewards = BETA / logps.shape[1] * torch.where(shared, logps.detach(), logps).sum(1)
    least = torch.ones(len(logps), device=logps.device).scatter_reduce(
        0, at.negative_of_pair, weights, "amin", include_self=False
    )
    terms = (rewards + least.log()).masked_fill(shared[:, -1], -math.inf).index_select(0, at.negatives)
    pool = at.positives_by_session.log_sum_exp(rewards.index_select(0, at.positives))
    return softplus(at.by_session.log_sum_exp(terms) - pool).mean() - (logps * at.sft_share).sum()


EXPERT = {
    "winner": (shared_with_winner, winner_loss),
    "each": (shared_by_pair, each_loss),
    "pooled": (shared_with_any, pooled_loss),
}


def ours(batch: Batch) -> Step:
    loss = partial(rad_dpo_loss, pair_weights=batch.weights, beta=BETA, positives=batch.case.positives)
    return batch.differentiate(lambda logps: loss(logps, batch.sessions).loss)


@torch.no_grad()
def metrics(logps: Tensor, dropped: Tensor, at: Layout, in_loss: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, margins and accuracy."""
    rewards = BETA / logps.shape[1] * logps.sum(1)
    margins = rewards.index_select(0, at.positive_of_pair) - rewards.index_select(0, at.negative_of_pair)
    margins.masked_fill_(dropped, 0)
    return rewards, margins, (margins[in_loss] > 0).sum() / (~dropped[in_loss]).sum()


def _vectorised(batch: Batch) -> Callable[[Tensor], tuple[Tensor, ...]]:
    at, mode, count = Layout(batch), batch.case.positives, batch.case.levels
    in_loss = at.winner_pairs if mode == "winner" else slice(None)
    levels = torch.arange(count, device=batch.tokens.device)

    def run(logps: Tensor) -> tuple[Tensor, ...]:
        by_pair = shared = shared_by_pair(batch.tokens, at)  # the margins need it of every pair
        dropped = by_pair == count
        if mode == "winner":  # the pairs of the winner are the negatives, in order
            shared = torch.zeros_like(batch.tokens, dtype=torch.bool)
            shared[at.negatives] = levels < by_pair.index_select(0, at.winner_pairs)[:, None]
        elif mode == "pooled":
            shared = longest_with_any(by_pair, batch.tokens, at)
            dropped = shared[:, -1].index_select(0, at.negative_of_pair)
        loss = EXPERT[mode][1](logps, shared, batch.weights, at)
        return loss, *metrics(logps, dropped, at, in_loss)

    return run


def vectorised(batch: Batch) -> Step:
    run = _vectorised(batch)
    return batch.differentiate(lambda logps: run(logps)[0])


def loss_only(batch: Batch) -> Step:
    at = Layout(batch)
    prefixes, loss = EXPERT[batch.case.positives]
    return batch.differentiate(lambda logps: loss(logps, prefixes(batch.tokens, at), batch.weights, at))


def prepared(batch: Batch) -> Step:
    at = Layout(batch)
    prefixes, loss = EXPERT[batch.case.positives]
    shared = prefixes(batch.tokens, at)
    return batch.differentiate(lambda logps: loss(logps, shared, batch.weights, at))


def compiled(batch: Batch) -> Step:
    if not shutil.which("g++"):
        raise Missing("torch.compile needs a C++ compiler")
    torch._dynamo.reset()
    run = torch.compile(_vectorised(batch), fullgraph=True, dynamic=False)
    return batch.differentiate(lambda logps: run(logps)[0])


def loop(batch: Batch) -> Step:
    """A Python loop over the sessions."""
    sessions, mode = batch.sessions, batch.case.positives
    offsets, counts = sessions.offsets.tolist(), sessions.num_positives.tolist()
    pairs = sessions.pair_offsets.tolist()

    def term(logps: Tensor, tokens: Tensor, positives: int, weights: Tensor) -> Tensor:
        same = (tokens[:positives, None] == tokens[positives:]).cumprod(2).bool()  # [P, N, L]
        if mode == "pooled":
            same, weights = same.any(0, keepdim=True), weights.amin(0, keepdim=True)
        rows, r = logps[positives:], BETA * logps.mean(1)
        # One loss per positive that acts as the winner.
        losses = []
        for p in range(positives if mode == "each" else 1):
            negatives = BETA * torch.where(same[p], rows.detach(), rows).mean(1) + weights[p].log()
            winner = r[:positives].logsumexp(0) if mode == "pooled" else r[p]
            losses.append(softplus(negatives.masked_fill(same[p, :, -1], -math.inf).logsumexp(0) - winner))
        return torch.stack(losses).mean()

    def loss(logps: Tensor) -> Tensor:
        # The preference per session, and SFT over the positives of all of them.
        preference, likelihood = [], []
        for s, positives in enumerate(counts):
            rows = logps[offsets[s] : offsets[s + 1]]
            weights = batch.weights[pairs[s] : pairs[s + 1]].view(positives, -1)
            preference.append(term(rows, batch.tokens[offsets[s] : offsets[s + 1]], positives, weights))
            likelihood.append(rows[:positives])
        return torch.stack(preference).mean() - torch.cat(likelihood).mean()

    return batch.differentiate(loss)


METHODS: dict[str, Callable[[Batch], Step]] = {
    "ours": ours,
    "vectorised": vectorised,
    "loss_only": loss_only,
    "prepared": prepared,
    "compiled": compiled,
    "loop": loop,
}


def bare_bytes(batch: Batch) -> Callable[[], Tensor]:
    """Copy as many bytes as forward and backward must move.

    They read tokens, lengths, weights, log-probs and the saved gradient, and write rewards, margins, the saved gradient
    and the gradient.
    """
    sessions, gradient = batch.sessions, batch.logps.nbytes
    # In bytes; a copy reads one half of them and writes the other.
    read = sessions.tokens.nbytes + sessions.lengths.nbytes + batch.weights.nbytes + 2 * gradient
    written = 4 * (sessions.num_candidates + sessions.num_pairs) + 2 * gradient
    there, here = torch.zeros(2, (read + written) // 2, dtype=torch.uint8, device=batch.tokens.device)
    return lambda: here.copy_(there)
