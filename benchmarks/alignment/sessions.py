"""Preference data: prompts cut inside training sequences, mined negatives, false negatives put among them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.alignment.data import Data
from raddpo_ext.data.negatives import BeamNegatives, PopularityNegatives, SiblingNegatives, sample_negatives

FURTHER = 2  # most positives after the winner
KINDS = {"beam": 2, "siblings": 3, "popularity": 3}  # negatives per session
BEAMS = 20  # of which its own negatives are taken
MINED_AT_ONCE = 256


class Sessions(NamedTuple):
    """``S`` sessions by item; -1 pads.

    Attributes:
        users, cuts: int64 ``[S]``: the prompt is ``train[user][:cut]``.
        positives: int64 ``[S, 1 + FURTHER]``, the winner first.
        negatives: int64 ``[S, N]``.
    """

    users: Tensor
    cuts: Tensor
    positives: Tensor
    negatives: Tensor

    @property
    def prompt_lengths(self) -> np.ndarray:
        """In purchases."""
        lengths: np.ndarray = self.cuts.numpy()
        return lengths

    def rows(self, rows: slice | Tensor) -> Sessions:
        return Sessions(*(field[rows] for field in self))

    def history(self, data: Data, row: int) -> list[int]:
        return data.train[int(self.users[row])][: int(self.cuts[row])]

    def batch(self, data: Data, positives: int, negatives: int) -> tuple[list[list[int]], rx.SessionBatch]:
        """The prompts, and at most so many candidates of either kind a session."""
        items = torch.cat([self.positives[:, :positives], self.negatives[:, :negatives]], 1)
        real = items >= 0
        tokens = data.tokens[items[real]]
        offsets = torch.zeros(len(items) + 1, dtype=torch.int64)
        torch.cumsum(real.sum(1), 0, out=offsets[1:])
        lengths = torch.full((len(tokens),), data.levels)
        sessions = rx.SessionBatch(tokens, lengths, offsets, (self.positives[:, :positives] >= 0).sum(1))
        return data.prompts(self.history(data, row) for row in range(len(items))), sessions


def cut(data: Data, count: int) -> Sessions:
    """Cuts without negatives, evenly drawn from all places that leave a purchase before and two after: the winner, a
    further positive, and one more where it is there. They are the same for every seed of the experiment."""
    places = [(user, at) for user, items in enumerate(data.train) for at in range(1, len(items) - 1)]
    if len(places) < count:
        raise ValueError(f"{count} sessions asked for, but the training sequences have {len(places)} places to cut")
    drawn = np.random.default_rng(0).choice(len(places), count, replace=False)
    users, cuts = np.array(places)[drawn].T
    positives = np.full((count, 1 + FURTHER), -1)
    for row, (user, at) in enumerate(zip(users, cuts, strict=True)):
        following = data.train[user][at : at + 1 + FURTHER]
        positives[row, : len(following)] = following
    empty = torch.empty(count, 0, dtype=torch.int64)
    return Sessions(torch.from_numpy(users), torch.from_numpy(cuts), torch.from_numpy(positives), empty)


def mine(data: Data, model: Any, sessions: Sessions, seed: int) -> Sessions:
    """Adds negatives, each session's in random order."""
    generator = torch.Generator().manual_seed(seed)
    retriever = rx.SIDRetriever(model, data.index, beam_width=BEAMS)
    samplers = [
        (BeamNegatives(retriever), KINDS["beam"]),
        (SiblingNegatives(data.sids, prefix=1), KINDS["siblings"]),
        (PopularityNegatives(data.sids, data.counts), KINDS["popularity"]),
    ]
    found = []
    for at in range(0, len(sessions.users), MINED_AT_ONCE):
        part = sessions.rows(slice(at, at + MINED_AT_ONCE))
        prompts = data.prompts(part.history(data, row) for row in range(len(part.users)))
        positives = [[item for item in row if item >= 0] for row in part.positives.tolist()]
        found.append(sample_negatives(samplers, data.sids, prompts, positives, generator))
    negatives = torch.cat(found)
    order = torch.rand(negatives.shape, generator=generator).masked_fill(negatives < 0, 2).argsort(1)
    return sessions._replace(negatives=negatives.gather(1, order))


def with_false_negatives(data: Data, sessions: Sessions, share: float, seed: int) -> Sessions:
    """Replaces ``share`` of all negatives by items that the user does take later on, after the positives.

    They are spread as evenly as the later purchases allow: as few as possible a session.
    """
    rng = np.random.default_rng([seed, 1])
    negatives = sessions.negatives.clone()
    later = [_later(data, sessions, row) for row in range(len(negatives))]
    wanted = round(share * int((negatives >= 0).sum()))
    room = np.minimum([len(items) for items in later], (negatives >= 0).sum(1).numpy())
    if wanted > room.sum():
        raise ValueError(f"{wanted} false negatives asked for, but users take only {room.sum()} items later")
    quota = np.zeros_like(room)
    while quota.sum() < wanted:
        open_rows = np.flatnonzero(quota < room)
        quota[rng.permutation(open_rows)[: wanted - quota.sum()]] += 1
    for row in np.flatnonzero(quota):
        places = rng.permutation(int((negatives[row] >= 0).sum()))[: quota[row]]
        negatives[row, torch.from_numpy(places)] = torch.from_numpy(rng.permutation(later[row])[: quota[row]])
    return sessions._replace(negatives=negatives)


def _later(data: Data, sessions: Sessions, row: int) -> list[int]:
    """Items taken after the positives, of SIDs that no candidate of the session has."""
    items = data.train[int(sessions.users[row])][int(sessions.cuts[row]) + 1 + FURTHER :]
    taken = {tuple(data.sids[item].tolist()) for field in sessions[2:] for item in field[row].tolist() if item >= 0}
    fresh = {tuple(data.sids[item].tolist()): item for item in items}
    return [item for sid, item in fresh.items() if sid not in taken]


def false_share(data: Data, sessions: Sessions) -> float:
    """Share of the negatives that the user does take later in the training sequence."""
    hits = total = 0
    for row, negatives in enumerate(sessions.negatives.tolist()):
        later = set(data.train[int(sessions.users[row])][int(sessions.cuts[row]) :])
        real = [item for item in negatives if item >= 0]
        hits += sum(item in later for item in real)
        total += len(real)
    return hits / total
