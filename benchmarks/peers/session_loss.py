"""The session loss with its gradient, ours and the same in plain torch.

256 sessions of 1 to 4 positives and 3 to 64 negatives, SIDs of 4 codes, half of a session's negatives next to its
winner in the sorted catalogue, a weight per pair.

- ``vectorised`` returns what ours does: the loss, the rewards, the margin of every pair and the accuracy. It has every
  row number and every slot of its padded tables prepared: whatever follows from the sessions' sizes is not timed. It
  compares tokens in each call, as ours does.
- ``loss_only`` is the same without rewards, margins and accuracy.
- ``prepared`` is ``loss_only`` with the common prefixes at hand, too, which no training step has: its sessions are new.
- ``compiled`` is ``vectorised`` under ``torch.compile``, compiled for this very batch.
- ``loop`` goes from session to session, for the loss only.

None of these minds lengths, which are all the same here, nor a session that keeps no pair.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

import raddpo_ext as rx
from benchmarks.harness import catalogues
from raddpo_ext.bench.compare import Missing
from raddpo_ext.bench.session_loss import BETA, Padding

ITEMS, CODES, NEIGHBOURS = 50_000, 256, 40  # of the catalogue; rows of it around the winner
Loss = Callable[[Tensor], Tensor]
Step = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """``positives`` as in :func:`raddpo_ext.rad_dpo_loss`."""

    positives: str
    sessions: int = 256
    most_positives: int = 4
    negatives: tuple[int, int] = (3, 64)
    levels: int = 4

    @property
    def name(self) -> str:
        least, most = self.negatives
        return f"{self.positives} S{self.sessions} P1-{self.most_positives} N{least}-{most} L{self.levels}"


CASES = [Case("winner"), Case("each"), Case("pooled")]


class Batch:
    """A case's sessions, weights and log-probs, a leaf."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(0)
        catalogue = np.unique(catalogues.clustered(ITEMS, CODES, case.levels), axis=0)
        least, most = [1, case.negatives[0]], [case.most_positives, case.negatives[1]]
        counts = rng.integers(least, most, (case.sessions, 2), endpoint=True)
        rows: list[int] = []
        for positives, negatives in counts:
            drawn = rng.integers(len(catalogue), size=positives + negatives)
            near = drawn[0] + rng.integers(1, NEIGHBOURS, negatives // 2)
            rows += [*drawn[: len(drawn) - len(near)], *near % len(catalogue)]
        self.case = case
        self.tokens = torch.from_numpy(catalogue[rows]).long()
        self.sessions = rx.SessionBatch(
            self.tokens,
            torch.full((len(rows),), case.levels),
            torch.tensor([0, *accumulate(counts.sum(1).tolist())]),
            torch.from_numpy(counts[:, 0].copy()),
        )
        generator = torch.Generator().manual_seed(0)
        self.logps = (-3 * torch.rand(len(rows), case.levels, generator=generator)).requires_grad_()
        self.weights = 0.5 + 0.5 * torch.rand(self.sessions.num_pairs, generator=generator)

    def differentiate(self, loss: Loss) -> Step:
        def step() -> tuple[Tensor, Tensor]:
            value = loss(self.logps)
            return value, torch.autograd.grad(value, self.logps)[0]

        return step


class Layout:
    """All that follows from the sessions' sizes."""

    def __init__(self, batch: Batch) -> None:
        sessions = batch.sessions
        session = torch.repeat_interleave(sessions.offsets.diff())  # of each row
        is_positive = torch.arange(len(session)) - sessions.offsets[session] < sessions.num_positives[session]
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
    """With the sums of each row's last log-probs at hand, the part of a negative that is not detached is one number."""
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
    longest = by_pair.new_zeros(len(tokens)).scatter_reduce(0, at.negative_of_pair, by_pair, "amax")
    return torch.arange(tokens.shape[1]) < longest[:, None]


def pooled_loss(logps: Tensor, shared: Tensor, weights: Tensor, at: Layout) -> Tensor:
    rewards = BETA / logps.shape[1] * torch.where(shared, logps.detach(), logps).sum(1)
    least = torch.ones(len(logps)).scatter_reduce(0, at.negative_of_pair, weights, "amin", include_self=False)
    terms = (rewards + least.log()).masked_fill(shared[:, -1], -math.inf).index_select(0, at.negatives)
    pool = at.positives_by_session.log_sum_exp(rewards.index_select(0, at.positives))
    return softplus(at.by_session.log_sum_exp(terms) - pool).mean() - (logps * at.sft_share).sum()


EXPERT = {
    "winner": (shared_with_winner, winner_loss),
    "each": (shared_by_pair, each_loss),
    "pooled": (shared_with_any, pooled_loss),
}


def ours(batch: Batch) -> Step:
    loss = partial(rx.rad_dpo_loss, pair_weights=batch.weights, beta=BETA, positives=batch.case.positives)
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
    levels = torch.arange(count)

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
    sessions, mode = batch.sessions, batch.case.positives
    offsets, counts = sessions.offsets.tolist(), sessions.num_positives.tolist()
    pairs = sessions.pair_offsets.tolist()

    def term(logps: Tensor, tokens: Tensor, positives: int, weights: Tensor) -> Tensor:
        same = (tokens[:positives, None] == tokens[positives:]).cumprod(2).bool()  # [P, N, L]
        if mode == "pooled":
            same, weights = same.any(0, keepdim=True), weights.amin(0, keepdim=True)
        rows, r = logps[positives:], BETA * logps.mean(1)
        losses = []
        for p in range(positives if mode == "each" else 1):
            negatives = BETA * torch.where(same[p], rows.detach(), rows).mean(1) + weights[p].log()
            winner = r[:positives].logsumexp(0) if mode == "pooled" else r[p]
            losses.append(softplus(negatives.masked_fill(same[p, :, -1], -math.inf).logsumexp(0) - winner))
        return torch.stack(losses).mean()

    def loss(logps: Tensor) -> Tensor:
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
