"""The rewards of rollouts, each against a loop over rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.session_cases import build, common_prefix
from torch import Tensor

import raddpo_ext as rx

COUNTS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=4)
Sid = tuple[int, ...]


def sids_of(sessions: rx.SessionBatch) -> list[Sid]:
    rows = zip(sessions.tokens.tolist(), sessions.lengths.tolist(), strict=True)
    return [tuple(row[:length]) for row, length in rows]


def rows_of(sessions: rx.SessionBatch, s: int) -> range:
    return range(int(sessions.offsets[s]), int(sessions.offsets[s + 1]))


def draw(counts: list[tuple[int, int]], seed: int, levels: int = 3) -> tuple[rx.SessionBatch, rx.SessionBatch, Tensor]:
    """Groups, ground truth of which some is among them, and random numbers for each row."""
    groups = build(counts, levels, seed).sessions
    truth = build([(1 + seed % 2, seed % 3)] * len(counts), levels, seed + 1).sessions
    return groups, truth, torch.rand(groups.num_candidates, generator=torch.Generator().manual_seed(seed))


def best_match(groups: rx.SessionBatch, truth: rx.SessionBatch, earn: Callable[[Sid, Sid, int], float]) -> list[float]:
    """The most that a row earns with a target (SID, target, the target's row)."""
    sids, targets = sids_of(groups), sids_of(truth)
    return [
        max((earn(sids[i], targets[t], t) for t in rows_of(truth, s)), default=0.0) if sids[i] else 0.0
        for s in range(groups.num_sessions)
        for i in rows_of(groups, s)
    ]


@settings(max_examples=40)
@given(COUNTS, st.integers(0, 2**16))
def test_match(counts: list[tuple[int, int]], seed: int) -> None:
    groups, truth, _ = draw(counts, seed)
    tiers = torch.rand(truth.num_candidates, generator=torch.Generator().manual_seed(seed))
    exact = best_match(groups, truth, lambda sid, target, t: float(sid == target))
    assert rx.rewards.match(groups, truth).tolist() == exact
    weighted = best_match(groups, truth, lambda sid, target, t: (sid == target) * float(tiers[t]))
    assert rx.rewards.match(groups, truth, tiers=tiers).tolist() == weighted
    credit = [-0.5, 0.25, 0.5, 2.0]
    by_prefix = best_match(groups, truth, lambda sid, target, t: credit[common_prefix(sid, target)])
    assert rx.rewards.match(groups, truth, prefix_credit=credit).tolist() == by_prefix
    both = best_match(groups, truth, lambda sid, target, t: credit[common_prefix(sid, target)] * float(tiers[t]))
    got = rx.rewards.match(groups, truth, prefix_credit=torch.tensor(credit), tiers=tiers)
    assert got.tolist() == pytest.approx(both)


def test_match_of_other_lengths() -> None:
    """Targets with more or fewer levels; their padding is not read."""
    groups = rx.SessionBatch(
        torch.tensor([[1, 2], [1, 3]]), torch.tensor([2, 2]), torch.tensor([0, 2]), torch.zeros(1).long()
    )
    for tokens, lengths, expected in [([[1, 2, 5]], [2], [1, 0]), ([[1, 2, 5]], [3], [0, 0]), ([[1]], [1], [0, 0])]:
        truth = rx.SessionBatch(torch.tensor(tokens), torch.tensor(lengths), torch.tensor([0, 1]), torch.tensor([1]))
        assert rx.rewards.match(groups, truth).tolist() == expected


@settings(max_examples=40)
@given(COUNTS, st.integers(0, 2**16))
def test_ranking(counts: list[tuple[int, int]], seed: int) -> None:
    groups, _, numbers = draw(counts, seed)
    hits = numbers < 0.3
    expected = []
    for s in range(groups.num_sessions):
        rollouts = list(rows_of(groups, s))[int(groups.num_positives[s]) :]
        expected += [0.0] * int(groups.num_positives[s])
        weights = [1 / math.log2(i + 2) for i in range(len(rollouts))]
        any_hit = any(bool(hits[i]) for i in rollouts)
        expected += [
            -w / sum(weights) if any_hit and not hits[i] else 0.0 for i, w in zip(rollouts, weights, strict=True)
        ]
    assert rx.rewards.ranking(hits, groups).tolist() == pytest.approx(expected)


@settings(max_examples=40)
@given(COUNTS, st.integers(0, 2**16))
def test_tiered(counts: list[tuple[int, int]], seed: int) -> None:
    groups, truth, numbers = draw(counts, seed)
    exposed, valid = build([(2, 2)] * len(counts), 3, seed + 2).sessions, numbers < 0.5
    clicked = best_match(groups, truth, lambda sid, target, t: float(sid == target))
    shown = best_match(groups, exposed, lambda sid, target, t: float(sid == target))
    expected = [
        1.0 if c else 0.5 if e else 0.1 if v else 0.0 for c, e, v in zip(clicked, shown, valid.tolist(), strict=True)
    ]
    assert rx.rewards.tiered(groups, truth, exposed, valid).tolist() == pytest.approx(expected)


@settings(max_examples=40)
@given(COUNTS, st.integers(0, 2**16))
def test_gated(counts: list[tuple[int, int]], seed: int) -> None:
    groups, _, relevance = draw(counts, seed)
    preference, hits = 2 * relevance.flip(0) - 1, relevance.roll(1) < 0.3
    if len(preference):
        preference[0] = math.nan
    passed = [float(r) if s > 0.4 else 0.0 for r, s in zip(preference, relevance.tolist(), strict=True)]
    expected = list(passed)
    for s in range(groups.num_sessions):
        known = [passed[i] for i in rows_of(groups, s) if not math.isnan(passed[i])]
        for i in rows_of(groups, s):
            if hits[i] and known:
                expected[i] = max(known)
    got = rx.rewards.gated(preference, relevance, groups, hits, 0.4)
    assert got.tolist() == pytest.approx(expected, nan_ok=True)


def test_rewards_become_advantages() -> None:
    groups, truth, numbers = draw([(1, 5), (0, 4)], 3)
    hits = rx.rewards.match(groups, truth) > 0
    for rewards in (
        rx.rewards.match(groups, truth, prefix_credit=[0, 0.1, 0.3, 1]) + rx.rewards.ranking(hits, groups),
        rx.rewards.gated(numbers, numbers, groups, hits, 0.5),
    ):
        assert rx.group_advantages(rewards, groups).values.isfinite().all()


GROUPS, TRUTH, NUMBERS = draw([(1, 2), (0, 2)], 1)
HITS = NUMBERS > 0.5
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: rx.rewards.match(None, TRUTH), TypeError, "rollouts must be a SessionBatch, got NoneType"),
    (lambda: rx.rewards.match(GROUPS, NUMBERS), TypeError, "targets must be a SessionBatch, got Tensor"),
    (lambda: rx.rewards.match(GROUPS, draw([(1, 1)], 0)[1]), ValueError, "targets must have one session per group (2)"),
    (lambda: rx.rewards.match(GROUPS, TRUTH.to("meta")), ValueError, "targets must be on the device of rollouts, cpu"),
    (lambda: rx.rewards.match(GROUPS, TRUTH, prefix_credit=[0, 1]), ValueError, "prefix_credit must have shape (4,)"),
    (
        lambda: rx.rewards.match(GROUPS, TRUTH, prefix_credit=[0, 1, "a", 1]),
        TypeError,
        "prefix_credit[2] must be a number, got 'a'",
    ),
    (
        lambda: rx.rewards.match(GROUPS, TRUTH, prefix_credit=torch.tensor([0, 1, 1, math.nan])),
        ValueError,
        "prefix_credit[3] must be finite, got nan",
    ),
    (lambda: rx.rewards.match(GROUPS, TRUTH, tiers=[1.0]), ValueError, "tiers must have shape"),
    (lambda: rx.rewards.ranking(NUMBERS, GROUPS), ValueError, "hits must be torch.bool of shape (5,), got torch.float"),
    (lambda: rx.rewards.ranking(HITS[:2], GROUPS), ValueError, "hits must be torch.bool of shape (5,)"),
    (lambda: rx.rewards.ranking(HITS, None), TypeError, "sessions must be a SessionBatch, got NoneType"),
    (lambda: rx.rewards.tiered(GROUPS, TRUTH, None, HITS), TypeError, "exposed must be a SessionBatch, got NoneType"),
    (lambda: rx.rewards.tiered(GROUPS, TRUTH, TRUTH, NUMBERS), ValueError, "valid must be torch.bool of shape (5,)"),
    (
        lambda: rx.rewards.tiered(GROUPS, TRUTH, TRUTH, HITS, rewards=(1, -1, 0)),
        ValueError,
        "rewards[1] must be at least 0, got -1",
    ),
    (lambda: rx.rewards.gated(HITS, NUMBERS, GROUPS, HITS, 0.5), TypeError, "preference must be a float32"),
    (lambda: rx.rewards.gated(NUMBERS, NUMBERS[:2], GROUPS, HITS, 0.5), ValueError, "relevance must be torch.float32"),
    (lambda: rx.rewards.gated(NUMBERS, NUMBERS, GROUPS, HITS, math.nan), ValueError, "tau must be finite, got nan"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_refuses(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
