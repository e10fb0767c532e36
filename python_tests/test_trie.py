"""TrieIndex.build and its lookups, against the plain reference and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import Catalogue, catalogues

import raddpo_ext as rx
from raddpo_ext import reference


def assert_same_index(got: rx.TrieIndex, expected: reference.TrieIndex) -> None:
    """Every node, path, child and item."""
    for name in ("num_items", "num_sids", "num_nodes", "levels", "sid_levels"):
        assert getattr(got, name) == getattr(expected, name), name
    nodes = torch.arange(-2, expected.num_nodes + 2)
    for mine, theirs in zip(got.paths(nodes), expected.paths(nodes), strict=True):
        assert mine.tolist() == theirs.tolist()
    for mine, theirs in zip(got.item_ranges(nodes), expected.item_ranges(nodes), strict=True):
        count = expected.item_ranges(nodes)[1]
        assert torch.where(count > 0, mine, 0).tolist() == torch.where(count > 0, theirs, 0).tolist()
    assert got.items.tolist() == expected.items.tolist()
    assert_top_items(got, nodes)


def assert_top_items(index: rx.TrieIndex, nodes: torch.Tensor) -> None:
    """``top_items`` of one row, and of two rows at once, against :meth:`item_ranges`."""
    rows = torch.stack([nodes, nodes.flip(0)])
    owned = []
    for first, count in zip(*index.item_ranges(rows), strict=True):
        ranges = zip(first.tolist(), (first + count).tolist(), strict=True)
        owned.append([(item, k) for k, (begin, end) in enumerate(ranges) for item in index.items[begin:end].tolist()])
    for top_k in (0, 1, 7, max(map(len, owned)) + 2):
        for items, owners, expected in zip(*index.top_items(rows, top_k), owned, strict=True):
            got = [*zip(items.tolist(), owners.tolist(), strict=True)]
            assert got == (expected + top_k * [(-1, -1)])[:top_k]


@given(catalogues(), st.data())
def test_equals_reference(isa: str, catalogue: Catalogue, data: st.DataObject) -> None:
    index = rx.TrieIndex.build(**catalogue.arguments())
    expected = reference.TrieIndex.build(**catalogue.arguments())
    assert_same_index(index, expected)
    assert_same_index(index, reference.TrieIndex.of(index))
    assert index.fixed_length == (len(set(map(len, catalogue.codes()))) == 1)

    for node in data.draw(st.lists(st.integers(0, index.num_nodes - 1), max_size=5)):
        prefix = expected.codes[node]
        assert index.children(prefix).tolist() == expected.children(prefix).tolist()

    # The catalogue's SIDs and some that differ a little from them, cut at any length.
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    sids = catalogue.sids.astype(np.int64)
    sids = np.concatenate([sids, sids + rng.integers(-1, 2, sids.shape)])
    lengths = np.concatenate([catalogue.ends(), rng.integers(0, sids.shape[1] + 1, len(catalogue.sids))])
    got, want = index.lookup(sids, lengths), expected.lookup(sids, lengths)
    assert got.items.tolist() == want.items.tolist()
    assert got.offsets.tolist() == want.offsets.tolist()
    found = index.contains(sids, lengths)
    assert found.tolist() == expected.contains(sids, lengths).tolist()
    assert found[: len(catalogue.sids)].all()

    tokens = torch.full((len(catalogue.sids), max(map(len, catalogue.tokens())) + 2), -1)
    for row, path in enumerate(catalogue.tokens()):
        tokens[row, : len(path)] = torch.tensor(path)
    tokens[::3, rng.integers(0, tokens.shape[1])] += 1
    assert index.nodes(tokens).tolist() == expected.nodes(tokens).tolist()


def test_small_example() -> None:
    index = rx.TrieIndex.build([[5, 1], [2, 7], [5, 0], [2, 7]], item_ids=[40, 30, 20, 10])
    assert (index.num_items, index.num_sids, index.num_nodes, index.levels) == (4, 3, 6, 2)
    assert index.lookup([[2, 7], [5, 1], [5, 2]]).items.tolist() == [30, 10, 40]
    assert index.lookup([[2, 7], [5, 1], [5, 2]]).offsets.tolist() == [0, 2, 3, 3]
    assert index.contains(torch.tensor([[5, 0], [0, 5]], dtype=torch.uint8)).tolist() == [True, False]
    assert index.children([]).tolist() == [2, 5]
    assert index.children([5]).tolist() == [0, 1]
    assert index.children([3]).tolist() == index.children([5, 1]).tolist() == []
    assert index.nodes(torch.tensor([[5, 0], [4, 0]])).tolist() == [[0, 2], [0, -1]]
    assert index.max_tokens == [5, 7]
    assert index.nbytes == index.data.numel()
    assert "num_sids=3" in repr(index)


def test_terminal_node_with_children() -> None:
    index = rx.TrieIndex.build([[1, 1], [1, 0], [0, 0]], lengths=[2, 1, 2], vocab=rx.SIDVocab([2, 2], offset=1, eos=0))
    assert index.levels == 3
    assert index.children([1]).tolist() == [-1, 1]  # by token id: eos is 0
    assert index.children([1, 1]).tolist() == [-1]
    assert index.lookup([[1, 9], [1, 1]], lengths=[1, 2]).items.tolist() == [1, 0]


def test_children_come_in_token_order() -> None:
    index = rx.TrieIndex.build([[0], [1], [2], [10]], vocab=rx.SIDVocab([11], token_ids=[[9, 3, 7, *[-1] * 7, 5]]))
    assert index.children([]).tolist() == [1, 10, 2, 0]


@pytest.mark.parametrize("levels", [32, 31])
def test_most_levels(levels: int) -> None:
    rng = np.random.default_rng(0)
    sids = rng.integers(0, 2, (50, levels))
    vocab = None if levels == 32 else rx.SIDVocab([2] * 31, eos=62)
    lengths = None if levels == 32 else rng.integers(20, 32, 50)
    assert_same_index(
        rx.TrieIndex.build(sids, lengths=lengths, vocab=vocab),
        reference.TrieIndex.build(sids, lengths=lengths, vocab=vocab),
    )


@pytest.mark.parametrize("codes", [65536, 65537, 2**31 - 1])
def test_wide_symbols(isa: str, codes: int) -> None:
    """Codes of more than 16 bits need wide symbols."""
    rng = np.random.default_rng(0)
    sids = rng.integers(0, codes, (300, 3))
    sids[:2] = [[codes - 1] * 3, [0] * 3]
    index = rx.TrieIndex.build(sids)
    assert_same_index(index, reference.TrieIndex.build(sids))
    assert index.contains(sids).all()
    assert index.max_tokens == sids.max(0).tolist()


@pytest.mark.parametrize("rows", [511, 512, 513, 5000])
def test_blocks_and_hints(threads: int, rows: int) -> None:
    """Degrees and numbers of nodes around the 512 that the bit sequences' indices count by, one node with them all."""
    rng = np.random.default_rng(rows)
    flat = rx.TrieIndex.build(rng.permutation(rows)[:, None])
    assert flat.children([]).tolist() == list(range(rows))
    collided = rx.TrieIndex.build(np.zeros((rows, 2), np.int8), item_ids=rng.permutation(rows))
    assert collided.num_nodes == 3
    assert collided.lookup([[0, 0]]).items.tolist() == collided.items.tolist()
    chains = np.tile(rng.permutation(rows)[:, None], (1, 3))
    assert_same_index(rx.TrieIndex.build(chains), reference.TrieIndex.build(chains))


@pytest.mark.parametrize("first", [True, False])
def test_uneven_parents(isa: str, first: bool) -> None:
    """One code has as many children as all others together, so that a parent is far from where its child's place among
    its siblings would put it."""
    many, half = torch.arange(40_000), torch.arange(1, 20_001)
    wide = torch.stack([torch.full_like(many, 0 if first else 20_001), many], 1)
    sids = torch.cat([wide, torch.stack([half, half], 1)])
    index = rx.TrieIndex.build(sids)
    leaves = torch.arange(index.num_nodes - len(sids), index.num_nodes)
    assert torch.equal(index.paths(leaves)[0], sids[(sids[:, 0] * 40_000 + sids[:, 1]).argsort()])


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20000), st.integers(1, 8))
def test_larger_catalogues(isa: str, threads: int, seed: int, rows: int, levels: int) -> None:
    """More rows than one thread's share, packed into one word or several."""
    rng = np.random.default_rng(seed)
    sids = rng.integers(0, rng.integers(2, 5000, levels), (rows, levels))
    index = rx.TrieIndex.build(sids)
    distinct, first = np.unique(sids, axis=0, return_index=True)
    assert index.num_sids == len(distinct)
    assert index.num_nodes == 1 + sum(len(np.unique(sids[:, : d + 1], axis=0)) for d in range(levels))
    items, offsets = index.lookup(distinct)
    assert items[offsets[:-1]].tolist() == first.tolist()
    others = sids[rng.integers(rows, size=1000)] + rng.integers(-1, 2, (1000, levels))
    known = set(map(tuple, distinct.tolist()))
    assert index.contains(others).tolist() == [tuple(sid) in known for sid in others.tolist()]
    leaves = torch.arange(index.num_nodes - index.num_sids, index.num_nodes)
    assert index.paths(leaves)[0].tolist() == distinct.tolist()


def test_input_kinds_are_equal() -> None:
    sids = np.random.default_rng(0).integers(0, 100, (40, 3))
    data = rx.TrieIndex.build(sids).data
    for same in (
        sids.tolist(),
        sids.astype(">u2"),
        np.asfortranarray(sids),
        np.repeat(sids, 2, axis=0)[::2],
        torch.tensor(sids, dtype=torch.uint16),
        torch.tensor(sids.T.copy(), dtype=torch.int32).T,
    ):
        assert torch.equal(rx.TrieIndex.build(same).data, data)
    for ids in (np.arange(40, dtype=np.uint8), torch.arange(80)[::2] // 2, list(range(40))):
        assert torch.equal(rx.TrieIndex.build(sids, item_ids=ids, lengths=None).data, data)
    lengths = torch.arange(1, 81)[::2] * 0 + 3
    assert rx.TrieIndex.build(sids, lengths=lengths).contains(sids).all()


def test_item_ids_of_32_and_64_bits() -> None:
    for most, dtype in ((2**31 - 1, torch.int32), (2**31, torch.int64), (2**63 - 1, torch.int64)):
        index = rx.TrieIndex.build([[0], [1]], item_ids=[most, 0])
        assert index.items.dtype == dtype
        assert index.lookup([[0]]).items.tolist() == [most]


def test_threads_do_not_change_a_byte() -> None:
    sids = np.random.default_rng(0).integers(0, 50, (10000, 4))
    before = torch.get_num_threads()
    blocks = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        blocks.append(rx.TrieIndex.build(sids).data)
    torch.set_num_threads(before)
    assert torch.equal(blocks[0], blocks[1])
    assert torch.equal(blocks[0], blocks[2])


def test_progress_rises_to_one() -> None:
    shares: list[float] = []
    rx.TrieIndex.build([[0, 1], [1, 0]], progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rx.TrieIndex.build([[0, 1], [1, 0]], progress=stop)


def test_empty_queries() -> None:
    index = rx.TrieIndex.build([[0, 1], [1, 0]])
    none = np.zeros((0, 2), np.int64)
    assert index.lookup(none).offsets.tolist() == [0]
    assert index.contains(none).tolist() == []
    assert index.nodes(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2)
    assert index.nodes(torch.zeros(3, 0, dtype=torch.int64)).shape == (3, 0)
    assert index.contains(np.zeros((2, 0), np.int64)).tolist() == [False, False]


@pytest.mark.parametrize("name", ["instruments/Instruments", "industrial/Industrial_and_Scientific"])
def test_public_catalogues(data_dir: Path, name: str) -> None:
    rows = json.loads((data_dir / f"{name}.index.json").read_text())
    sids = np.array([[int(token[3:-1]) for token in sid] for sid in rows.values()])
    vocab = rx.SIDVocab([256] * sids.shape[1], offset=1000)
    index = rx.TrieIndex.build(sids, item_ids=np.array([*map(int, rows)]), vocab=vocab)
    assert index.num_sids == len(np.unique(sids, axis=0))
    assert_same_index(index, reference.TrieIndex.build(sids, item_ids=[*map(int, rows)], vocab=vocab))


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_an_item_id_that_is_there_twice(place: int) -> None:
    """The least, the largest or one between, in rows that do not follow one another."""
    ids = [3, 2**40, 5, 1]
    repeated = [*ids, ids[place]]
    with pytest.raises(ValueError, match=rf"item_ids\[{place}\] and item_ids\[4\] are both {ids[place]}"):
        rx.TrieIndex.build([[1], [2], [3], [4], [5]], item_ids=repeated)
