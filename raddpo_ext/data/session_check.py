"""The figures of a session log that say what training on it can do, and what is wrong with it."""

from __future__ import annotations

import os
from array import array
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from raddpo_ext import _check
from raddpo_ext.data.session_rows import ITEMS, SHOWN, no_session, place_kind, session_chunks
from raddpo_ext.data.session_sids import contained
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.trie_items import places_of

_CHUNK = 8192  # candidates per lookup
_TOKENS = 2**31  # all token ids are smaller


@dataclass(frozen=True)
class Distribution:
    """A number per session: its range, and how many sessions have each value."""

    min: int
    median: float
    mean: float
    max: int
    histogram: dict[int, int]


@dataclass(frozen=True)
class Tally:
    """How many there are, and how many different ones."""

    count: int
    distinct: int


@dataclass(frozen=True)
class Found:
    """A fault: ``count`` of ``total`` have it, in so many sessions, of which ``places`` are the first.

    Places are lines of jsonl, counted from 1, or rows of parquet, from 0.
    """

    count: int
    total: int
    sessions: int
    places: list[int]

    @property
    def share(self) -> float:
        return self.count / max(self.total, 1)


@dataclass(frozen=True)
class SessionCheck:
    """What :func:`check_sessions` found in a log."""

    path: str
    place: str  # what ``Found.places`` count: "line" or "row"
    rows: int
    skipped: dict[str, Found]  # rows that are not sessions, by reason
    # What there is.
    sessions: int
    prompt_lengths: Distribution
    positives_per_session: Distribution
    negatives_per_session: Distribution
    prompts: Tally
    positives: Tally
    negatives: Tally
    popular: float  # share of the negatives that the most frequent 1 % of the different negatives make up
    # Prefixes that negatives share with their session's winner; the list's places stand for the first 1, 2, ... tokens.
    compared: int  # negatives of sessions with a winner
    shared: list[int]  # how many of these share at least that many first tokens
    shared_by_chance: list[float]  # the share that would, had sessions swapped their negatives at random
    # Tokens that a model reads.
    tokens_replicated: int  # one row per candidate
    tokens_packed: int  # each session's prompt once
    tokens_trie: int  # and each distinct prefix of its candidates once
    # Faults.
    repeated_candidates: Found  # candidates that their session already holds
    repeated_sessions: Found  # sessions that the log already holds
    several_winners: Found  # prompts whose sessions have different winners
    false_negatives: Found  # negatives that are positives of another session with the same prompt
    unknown_candidates: Found | None  # candidates that are not in the index, if there is one
    unknown_items: Found | None  # ids in ``items`` that are not


class _Log(NamedTuple):
    """The sessions of a log as flat arrays, int64 but for the tokens: ``[S]`` sessions, ``[C]`` candidates."""

    place: np.ndarray  # [S] line or row
    prompt: np.ndarray  # [S] hash
    session: np.ndarray  # [S] hash of prompt, positives and negatives
    prompt_lengths: np.ndarray  # [S]
    num_positives: np.ndarray  # [S]
    num_candidates: np.ndarray  # [S]
    num_items: np.ndarray  # [S]
    items: np.ndarray
    lengths: np.ndarray  # [C]
    tokens: np.ndarray  # int32, those of all candidates one after another

    def owner(self) -> np.ndarray:
        """Each candidate's session: ``[C]``."""
        return np.repeat(np.arange(len(self.place)), self.num_candidates)

    def firsts(self) -> np.ndarray:
        """Each session's first candidate: ``[S]``."""
        return np.cumsum(self.num_candidates) - self.num_candidates

    def positive(self) -> np.ndarray:
        """Which candidates are positives: bool ``[C]``."""
        owner = self.owner()
        return np.arange(len(owner)) - self.firsts()[owner] < self.num_positives[owner]


class _Prefixes(NamedTuple):
    """The log's own prefix tree."""

    ids: np.ndarray  # [C] equal for equal candidates
    size: int  # ids are smaller
    per_session: int  # distinct prefixes of each session, over all sessions
    shared: list[int]
    shared_by_chance: list[float]


def check_sessions(path: str | os.PathLike[str], *, index: TrieIndex | None = None) -> SessionCheck:
    """Count what a session log holds, and what in it is wrong or suspicious.

    Rows that :func:`read_sessions <raddpo_ext.data.session_log.read_sessions>` refuses without ``vocab`` and ``index``
    are counted by reason and left out of all other figures. Prompts and sessions are compared by 64-bit hashes.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        index: also look up every candidate, and the ids in the column ``items``.

    Raises:
        ValueError: the path is a folder, or the file is damaged, lacks a column or has no session.
        TypeError: ``index`` is not a TrieIndex.
        ImportError: ``pyarrow`` is not installed, for parquet.
        OSError: the file cannot be opened.

    Example:
        >>> from raddpo_ext.data.session_check import check_sessions
        >>> rx.write_sessions("log.jsonl", [{"prompt_ids": [1], "positives": [[3, 7]], "negatives": [[3, 8], [4, 7]]}])
        >>> check_sessions("log.jsonl").shared  # one of the two negatives has the winner's first token
        [1]
    """
    if index is not None:
        _check.instance(index, "index", TrieIndex)
    path = Path(path)
    log, skipped = _read(path)
    owner, positive, has_winner = log.owner(), log.positive(), log.num_positives > 0
    prefixes = _prefixes(log, owner, positive)
    prompts = np.unique(log.prompt, return_inverse=True)[1]
    # An answer is a candidate to a prompt, whichever session has it.
    answers = prompts[owner] * prefixes.size + prefixes.ids
    winners = np.unique(answers[log.firsts()[has_winner]])
    several = np.bincount(winners // prefixes.size, minlength=len(prompts)) > 1
    disputed = has_winner & several[prompts]
    frequencies = np.sort(np.unique(prefixes.ids[~positive], return_counts=True)[1])[::-1]
    replicated = int((log.prompt_lengths * log.num_candidates).sum()) + len(log.tokens)
    rows = len(log.place) + sum(map(len, skipped.values()))

    def found(which: np.ndarray, owner: np.ndarray) -> Found:
        sessions = np.unique(owner[which])
        return Found(int(which.sum()), len(which), len(sessions), log.place[sessions[:SHOWN]].tolist())

    def tally(ids: np.ndarray) -> Tally:
        return Tally(len(ids), len(np.unique(ids)))

    return SessionCheck(
        path=str(path),
        place=place_kind(path),
        rows=rows,
        skipped={
            reason: Found(len(places), rows, len(places), places[:SHOWN]) for reason, places in sorted(skipped.items())
        },
        sessions=len(log.place),
        prompt_lengths=_distribution(log.prompt_lengths),
        positives_per_session=_distribution(log.num_positives),
        negatives_per_session=_distribution(log.num_candidates - log.num_positives),
        prompts=tally(prompts),
        positives=tally(prefixes.ids[positive]),
        negatives=tally(prefixes.ids[~positive]),
        popular=float(frequencies[: -(-len(frequencies) // 100)].sum() / max(frequencies.sum(), 1)),
        compared=int((has_winner * (log.num_candidates - log.num_positives)).sum()),
        shared=prefixes.shared,
        shared_by_chance=prefixes.shared_by_chance,
        tokens_replicated=replicated,
        tokens_packed=int(log.prompt_lengths.sum()) + len(log.tokens),
        tokens_trie=int(log.prompt_lengths.sum()) + prefixes.per_session,
        repeated_candidates=found(_repeats(owner * prefixes.size + prefixes.ids), owner),
        repeated_sessions=found(_repeats(log.session), np.arange(len(log.place))),
        several_winners=Found(
            int(several.sum()), int(prompts.max()) + 1, int(disputed.sum()), log.place[disputed][:SHOWN].tolist()
        ),
        false_negatives=found(np.isin(answers[~positive], answers[positive]), owner[~positive]),
        unknown_candidates=None if index is None else found(~_known(log, prefixes.ids, index), owner),
        unknown_items=None if index is None else _unknown_items(log, index, found),
    )


def _read(path: Path) -> tuple[_Log, dict[str, list[int]]]:
    """The sessions of a log, and by reason the places of the rows that are not sessions."""
    columns: Any = {name: array("i" if name == "tokens" else "q") for name in _Log._fields}
    skipped = defaultdict[str, list[int]](list)
    for sessions, bad in session_chunks(path):
        for place, error in sorted(bad.items()):
            skipped[error.reason].append(place)
        for place, session in sessions.items():
            prompt, positives, negatives = tuple(session["prompt_ids"]), session["positives"], session["negatives"]
            candidates = [tuple(sid) for sid in chain(positives, negatives)]
            items = session.get(ITEMS, ())
            columns["place"].append(place)
            columns["prompt"].append(hash(prompt))
            columns["session"].append(hash((prompt, len(positives), *candidates)))
            columns["prompt_lengths"].append(len(prompt))
            columns["num_positives"].append(len(positives))
            columns["num_candidates"].append(len(candidates))
            columns["num_items"].append(len(items))
            columns["items"].extend(items)
            columns["lengths"].extend(map(len, candidates))
            columns["tokens"].extend(chain.from_iterable(candidates))
    if not columns["place"]:
        raise no_session(path, skipped)
    return _Log(**{name: np.frombuffer(values, values.typecode) for name, values in columns.items()}), skipped


def _prefixes(log: _Log, owner: np.ndarray, positive: np.ndarray) -> _Prefixes:
    """Number every distinct prefix, level by level: a prefix is its parent's number and a token."""
    ids, size, per_session = np.zeros(len(owner), np.int64), 1, 0
    shared, by_chance = [], []
    begins = np.cumsum(log.lengths) - log.lengths
    negatives = np.flatnonzero(~positive & (log.num_positives > 0)[owner])
    winners = log.firsts()[owner[negatives]]
    for level in range(int(log.lengths.max(initial=0))):
        alive = np.flatnonzero(log.lengths > level)
        keys = ids[alive] * _TOKENS + log.tokens[begins[alive] + level]
        distinct, numbers = np.unique(keys, return_inverse=True)
        ids[alive] = size + numbers
        per_session += len(np.unique(owner[alive] * len(distinct) + numbers))
        # The negatives that have their winner's prefix, and the chance of that for a negative of any session.
        mine = np.where(log.lengths[negatives] > level, ids[negatives] - size, -1)
        its = np.where(log.lengths[winners] > level, ids[winners] - size, -1)
        shared.append(int(((mine == its) & (mine >= 0)).sum()))
        counts = [np.bincount(side[side >= 0], minlength=len(distinct)) / max(len(side), 1) for side in (mine, its)]
        by_chance.append(float(counts[0] @ counts[1]))
        size += len(distinct)
    # A whole SID is never shared: no negative equals a positive.
    return _Prefixes(ids, size, per_session, shared[:-1], by_chance[:-1])


def _distribution(values: np.ndarray) -> Distribution:
    numbers, counts = np.unique(values, return_counts=True)
    return Distribution(
        min=int(numbers[0]),
        median=float(np.median(values)),
        mean=float(values.mean()),
        max=int(numbers[-1]),
        histogram=dict(zip(numbers.tolist(), counts.tolist(), strict=True)),
    )


def _repeats(keys: np.ndarray) -> np.ndarray:
    """Which keys have occurred before."""
    repeats = np.ones(len(keys), bool)
    repeats[np.unique(keys, return_index=True)[1]] = False
    return repeats


def _known(log: _Log, ids: np.ndarray, index: TrieIndex) -> np.ndarray:
    """Which candidates are SIDs of the index. Each distinct one is looked up once."""
    firsts, numbers = np.unique(ids, return_index=True, return_inverse=True)[1:]
    ends = np.cumsum(log.lengths)
    known: list[bool] = []
    for begin in range(0, len(firsts), _CHUNK):
        chunk = firsts[begin : begin + _CHUNK]
        spans = zip((ends[chunk] - log.lengths[chunk]).tolist(), ends[chunk].tolist(), strict=True)
        known += contained(index, [log.tokens[start:end].tolist() for start, end in spans])
    return np.array(known, bool)[numbers]


def _unknown_items(log: _Log, index: TrieIndex, found: Any) -> Found:
    known: np.ndarray = np.ones(0, bool)
    if len(log.items):
        known = places_of(torch.from_numpy(log.items.copy()), index.items).cpu().numpy() >= 0
    return found(~known, np.repeat(np.arange(len(log.place)), log.num_items))
