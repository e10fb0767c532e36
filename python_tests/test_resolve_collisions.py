"""resolve_collisions against a plain loop; split_clusters and adaptive_lengths."""

from __future__ import annotations

import importlib
import re
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext.sids.prefixes import numbered, ranks

module = importlib.import_module("raddpo_ext.sids.resolve_collisions")  # its name is the function's, too


def slow(sids: Tensor, x: Tensor, books: rx.sids.Codebooks, mode: str) -> list[list[int]]:
    """The SIDs as lists."""

    def distance(row: int, sid: list[int]) -> float:
        vector = sum(book[code].double() for book, code in zip(books.levels, sid, strict=True))
        return float((x[row].double() - vector).square().sum())

    found = sids.tolist()
    groups = defaultdict(list)
    for row, sid in enumerate(found):
        groups[tuple(sid)].append(row)
    ranked = {
        sid: sorted(rows, key=lambda row: (distance(row, list(sid)), row)) for sid, rows in sorted(groups.items())
    }
    used = {sid for sid in groups}
    if mode == "nearest_free":
        for sid, rows in ranked.items():
            for row in rows[1:]:
                free = [code for code in range(books.sizes[-1]) if (*sid[:-1], code) not in used]
                if free:
                    code = min(free, key=lambda code: (distance(row, [*sid[:-1], code]), code))
                    found[row] = [*sid[:-1], code]
                    used.add(tuple(found[row]))
    for sid, rows in ranked.items():
        left = [row for row in rows if found[row] == list(sid)]
        if len(left) > 1:
            for place, row in enumerate(left):
                found[row] = [*sid, place]
    return found


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    before=st.lists(st.integers(1, 4), max_size=2),
    last=st.integers(1, 40),
    mode=st.sampled_from(["nearest_free", "extra_level"]),
    small=st.booleans(),
)
def test_equals_a_loop(rows: int, before: list[int], last: int, mode: str, small: bool) -> None:
    sizes = [*before, last]
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-4, 5, (rows, 2), generator=generator).float()  # with ties, exactly
    books = rx.sids.Codebooks(tuple(torch.randint(-4, 5, (size, 2), generator=generator).float() for size in sizes))
    sids = rx.sids.encode(x, books)
    with pytest.MonkeyPatch.context() as patch:
        if small:  # several chunks, and tables of one prefix
            patch.setattr(module, "CHUNK", 3)
            patch.setattr(module, "_ROOM", 1)
        found = rx.sids.resolve_collisions(sids, x, books, mode)
    lengths = torch.full((rows,), len(sizes)) if found.lengths is None else found.lengths
    rowwise = [sid[:length] for sid, length in zip(found.sids.tolist(), lengths.tolist(), strict=True)]
    assert rowwise == slow(sids, x, books, mode)
    assert len(set(map(tuple, rowwise))) == rows  # each names one item
    index = rx.TrieIndex.build(found.sids, lengths=lengths)  # refuses SIDs that are prefixes of others
    assert index.num_sids == rows


def test_nothing_changes_where_nothing_collides() -> None:
    x = torch.arange(4.0)[:, None]
    books = rx.sids.Codebooks((x.clone(),))
    sids = rx.sids.encode(x, books)
    for mode in ("nearest_free", "extra_level", "keep"):
        found = rx.sids.resolve_collisions(sids, x, books, mode)
        assert torch.equal(found.sids, sids)
        assert found.lengths is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(mode="drop"), ValueError, "mode must be one of 'nearest_free', 'extra_level', 'keep', got 'drop'"),
        (dict(sids=torch.tensor([[2], [0]])), ValueError, "sids[:, 0] must be in [0, 1], got 2"),
        (dict(sids=torch.tensor([[0, 0], [0, 0]])), ValueError, "sids must have shape [N, 1], got (2, 2)"),
        (dict(x=torch.zeros(3, 2)), ValueError, "x must have shape (2, 2), got (3, 2)"),
        (dict(x=torch.full((2, 2), torch.nan)), ValueError, "x[0] must be finite"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    usual: dict[str, Any] = dict(
        sids=torch.zeros(2, 1).long(), x=torch.zeros(2, 2), codebooks=rx.sids.Codebooks((torch.zeros(2, 2),))
    )
    with pytest.raises(error, match=re.escape(message)):
        rx.sids.resolve_collisions(**usual | arguments)


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5), most=st.integers(1, 9), groups=st.integers(1, 6))
def test_clusters_are_split_evenly(counts: list[int], most: int, groups: int) -> None:
    sids = torch.cat([torch.tensor([[number, 7]]).repeat(count, 1) for number, count in enumerate(counts)])
    order = torch.randperm(len(sids), generator=torch.Generator().manual_seed(0))
    found = rx.sids.split_clusters(sids[order], most, groups, seed=5)
    assert torch.equal(rx.sids.split_clusters(sids[order], most, groups, seed=5), found)
    for number, count in enumerate(counts):
        sizes = torch.bincount(found[sids[order, 0] == number])
        assert len(sizes) == min(groups, -(-count // most))
        assert sizes.max() - sizes.min() <= 1


def test_clusters_are_dealt_by_the_seed() -> None:
    sids = torch.zeros(100, 2).long()
    one, other = (rx.sids.split_clusters(sids, 10, seed=seed) for seed in (0, 1))
    assert not torch.equal(one, other)
    assert not torch.equal(one, one.sort().values)
    assert rx.sids.split_clusters(sids[:0], seed=0).tolist() == []
    with pytest.raises(ValueError, match="sids must have at least one level"):
        rx.sids.split_clusters(sids[:, :0], seed=0)
    for argument in ("max_items", "max_groups"):
        with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
            rx.sids.split_clusters(sids, **{argument: 0}, seed=0)


@given(
    rows=st.integers(1, 40),
    levels=st.integers(1, 4),
    budget=st.floats(0, 6),
    reading=st.sampled_from(["mass", "entropy"]),
    shortest=st.integers(1, 4),
)
def test_lengths_equal_a_loop(rows: int, levels: int, budget: float, reading: str, shortest: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    sids = torch.randint(0, 3, (rows, levels), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    shortest = min(shortest, levels)
    found = rx.sids.adaptive_lengths(sids, weights, budget=budget, min_length=shortest, reading=reading)
    shares = (weights / weights.sum()).tolist()
    rows_of = [tuple(sid) for sid in sids.tolist()]
    for sid, length in zip(rows_of, found.tolist(), strict=True):
        for level in range(shortest, levels + 1):
            inside = torch.tensor([s for s, other in zip(shares, rows_of, strict=True) if other[:level] == sid[:level]])
            inside = inside.double()
            bits = float(-(inside / inside.sum() * (inside / inside.sum()).log2()).sum())
            margin = abs(float(inside.sum()) - 2.0**-budget) if reading == "mass" else abs(bits - budget)
            if margin < 1e-9:
                break  # rounding decides
            fine = float(inside.sum()) <= 2.0**-budget if reading == "mass" else bits <= budget
            if fine or level == levels:
                assert length == level
                break
    rx.TrieIndex.build(sids, lengths=found)  # refuses SIDs that are prefixes of others


def test_rare_items_get_short_sids() -> None:
    sids = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert rx.sids.adaptive_lengths(sids, [97, 1, 1, 1], budget=3).tolist() == [2, 2, 1, 1]
    assert rx.sids.adaptive_lengths(sids, [97, 1, 1, 1], budget=3, min_length=2).tolist() == [2, 2, 2, 2]
    assert rx.sids.adaptive_lengths(sids, [1, 1, 1, 0], budget=0.5, reading="entropy").tolist() == [2, 2, 1, 1]
    assert Counter(rx.sids.adaptive_lengths(sids, budget=0).tolist()) == {1: 4}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(budget=-1), ValueError, "budget must be at least 0, got -1"),
        (dict(budget=torch.nan), ValueError, "budget must be finite, got nan"),
        (dict(min_length=3), ValueError, "min_length must be at most 2, got 3"),
        (dict(reading="bits"), ValueError, "reading must be one of 'mass', 'entropy', got 'bits'"),
        (dict(weights=[1.0]), ValueError, "weights must have one entry per row of sids (2), got shape (1,)"),
        (dict(weights=[1.0, -1.0]), ValueError, "weights[1] must be finite and at least 0, got -1.0"),
        (dict(weights=[0.0, 0.0]), ValueError, "weights must have a positive sum, got 0"),
        (dict(sids=torch.zeros(0, 2).long()), ValueError, "sids must have at least one row and level"),
    ],
)
def test_bad_arguments_of_lengths(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    usual: dict[str, Any] = dict(sids=torch.zeros(2, 2).long(), budget=1)
    with pytest.raises(error, match=re.escape(message)):
        rx.sids.adaptive_lengths(**usual | arguments)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_ranks_of_codes_far_apart(dtype: torch.dtype) -> None:
    """Against sorted tuples, also where keys of the whole range would overflow."""
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    codes = torch.randint(low, high, (200, 5), generator=torch.Generator().manual_seed(0)).to(dtype)
    codes = codes[torch.randint(40, (300,), generator=torch.Generator().manual_seed(1))]
    rows = [tuple(row) for row in codes.tolist()]
    order = {row: place for place, row in enumerate(sorted(set(rows)))}
    assert ranks(codes).tolist() == [order[row] for row in rows]
    assert numbered(codes)[:, -1].tolist() == ranks(codes).tolist()
