"""TrieIndex.restrict, discard and add: the index is that of the items that are left."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import ToyModel, assert_scores_close, assert_search_agrees, assert_states_equal
from support.beam_cases import DTYPES, NORMALIZE, exact_logits, generator_of, state_of, wide_index
from support.cuda_on_cpu.shim import Shim
from support.live_cases import assert_holds, part_of, tokens_of
from support.strategies import Catalogue, catalogues

import raddpo_ext as rx
from raddpo_ext import _C, reference


def changed(
    index: rx.TrieIndex, catalogue: Catalogue, rows: list[int], data: st.DataObject
) -> tuple[rx.TrieIndex, list[int]]:
    """The index after one change, and the rows that it then holds."""
    items = np.array(catalogue.items(), np.int64)
    change = data.draw(st.sampled_from(["mask", "ids", "discard", "add"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    share = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    some = np.flatnonzero(rng.random(len(items)) < share)
    kept = [row for row in rows if row in some]
    if change == "mask" and items.max() < 2**20:
        mask = np.zeros(items.max() + data.draw(st.sampled_from([1, 70])), bool)
        mask[items[some]] = True
        return index.restrict(torch.from_numpy(mask) if share < 0.5 else mask), kept
    if change in ("mask", "ids"):
        return index.restrict(np.concatenate([items[some], items[some][:2], [10**6, 2**50]])), kept
    if change == "discard":
        return index.discard(items[kept]), [row for row in rows if row not in some]
    new = [row for row in some.tolist() if row not in rows]
    part = part_of(catalogue, new)
    return index.add(part.sids, item_ids=part.item_ids, lengths=part.lengths), rows + new


@settings(max_examples=50)
@given(catalogues(), st.integers(0, 10**6), st.data())
def test_equals_a_new_index(isa: str, catalogue: Catalogue, seed: int, data: st.DataObject) -> None:
    rows = np.flatnonzero(np.random.default_rng(seed).random(len(catalogue.sids)) < 0.7).tolist() or [0]
    index = rx.TrieIndex.build(**part_of(catalogue, rows).arguments())
    for _ in range(data.draw(st.integers(1, 3))):
        index, rows = changed(index, catalogue, rows, data)
    assert_holds(index, catalogue, rows, seed)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("count", [511, 512, 513, 20000])
def test_many_nodes(isa: str, threads: int, wide: bool, count: int) -> None:
    """Ranks over many blocks of bits, runs of ones over many words, 32-bit symbols and 64-bit ids that go again."""
    rng = np.random.default_rng(count)
    sids = np.stack([rng.integers(0, 3, count), rng.permutation(count) * (70 if wide else 1)], 1)
    sids[::7] = sids[0]
    item_ids = rng.permutation(count) + (2**40 if wide else 0)
    item_ids[: count // 2] -= 2**40 if wide else 0
    catalogue = Catalogue(sids, None, item_ids, None, int(sids.max()) + 1)
    index = rx.TrieIndex.build(**catalogue.arguments())
    for share in (0.0, 0.001, 0.5, 0.999):
        rows = np.flatnonzero(rng.random(count) < share)
        left = index.restrict(item_ids[rows])
        built = rx.TrieIndex.build(sids[rows], item_ids=item_ids[rows]) if len(rows) else None
        assert left.num_nodes == (1 if built is None else built.num_nodes)
        if built is not None:
            assert left._compact().tobytes() == built.data.numpy().tobytes()
            others = np.setdiff1d(np.arange(count), rows)
            grown = left.add(sids[others], item_ids=item_ids[others])
            order = np.concatenate([rows, others])
            assert torch.equal(grown.data, rx.TrieIndex.build(sids[order], item_ids=item_ids[order]).data)
            assert index.discard(item_ids[others])._compact().tobytes() == built.data.numpy().tobytes()
    small = np.flatnonzero((sids[:, 1] < 65536) & (item_ids < 2**31))
    left = index.restrict(item_ids[small])
    built = rx.TrieIndex.build(sids[small], item_ids=item_ids[small])
    assert left._compact().tobytes() == built.data.numpy().tobytes()


@settings(max_examples=20)
@given(catalogues(), st.sampled_from(NORMALIZE), st.integers(0, 2**32), st.data())
def test_equals_brute_force(catalogue: Catalogue, normalize: str, seed: int, data: st.DataObject) -> None:
    """An exhaustive search ranks exactly what is left, by probabilities among what is left under ``"trie"``."""
    if normalize == "level" and catalogue.vocab is None:
        normalize = "vocab"
    index = rx.TrieIndex.build(**catalogue.arguments())
    rows = np.flatnonzero(np.random.default_rng(seed).random(len(catalogue.sids)) < 0.4).tolist()
    left = part_of(catalogue, rows)
    model = ToyModel.random(index.levels, 2, catalogue.columns, torch.float32, seed)
    got = rx.beam_search(
        model, index.restrict(left.item_ids), batch_size=2, beam_width=5000, normalize=normalize, top_k=100
    )
    assert_search_agrees(got, left, model.brute_force(left, normalize, 0.0), 100)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_reference(normalize: str) -> None:
    """The plain index goes through the same changes."""
    rng = np.random.default_rng(0)
    sids, vocab = rng.integers(0, 6, (200, 3)), rx.SIDVocab([6] * 3, eos=18)
    model = ToyModel.random(4, 2, 19, torch.float64, 0)
    single = ToyModel(model.tables.float())
    pairs = [(rx.TrieIndex.build(sids[:150], vocab=vocab), reference.TrieIndex.build(sids[:150], vocab=vocab))]
    changes = [("restrict", (np.arange(200) % 3 > 0,)), ("discard", (np.arange(1, 100, 6),)), ("restrict", ([],))]
    for name, arguments in changes:
        pairs.append(tuple(getattr(trie, name)(*arguments) for trie in pairs[-1]))
    pairs.append(tuple(trie.add(sids[150:], item_ids=range(150, 200), lengths=[2] * 50) for trie in pairs[1]))
    for fused, plain in pairs:
        options = {"batch_size": 2, "beam_width": 20, "normalize": normalize, "top_k": 25}
        got, expected = rx.beam_search(single, fused, **options), reference.beam_search(model, plain, **options)
        assert got.items.tolist() == expected.items.tolist()
        assert_scores_close(got.scores, expected.scores, "beam_search")
        assert reference.TrieIndex.of(fused).rows == sorted(plain.rows, key=lambda row: (len(row[0]), row[0]))
    with pytest.raises(ValueError, match=r"got a restricted raddpo_ext\.TrieIndex"):
        reference.beam_step(torch.zeros(1, 1, 19), rx.BeamState.start(pairs[1][0], 1), pairs[1][0], 1)


def test_by_hand() -> None:
    """Leaving an item out raises the probability of its siblings under ``"trie"`` and under no other support."""
    vocab = rx.SIDVocab([2, 2])
    index = rx.TrieIndex.build([[0, 0], [0, 1], [1, 0]], item_ids=[7, 8, 9], vocab=vocab)
    found = {}
    for normalize in NORMALIZE:
        got = rx.beam_search(
            lambda tokens, parents, level: torch.zeros(*tokens.shape, 4),
            index.discard([8]),
            batch_size=1,
            beam_width=3,
            normalize=normalize,
        )
        assert got.items.tolist() == [[7, 9, -1]]
        found[normalize] = got.scores[0, :2].exp().tolist()
    assert found["vocab"] == pytest.approx([1 / 16] * 2)
    assert found["level"] == pytest.approx([1 / 4] * 2)
    assert found["trie"] == pytest.approx([1 / 2] * 2)


def test_original_stays() -> None:
    index = rx.TrieIndex.build([[0, 1], [1, 0]])
    data = index.data.clone()
    left = index.discard([0])
    assert left.data is index.data
    assert index.restrict(torch.tensor([True, True])).restrict([1]).items.tolist() == [1]
    index.add([[5, 5]])
    assert index.items.tolist() == [0, 1]
    assert torch.equal(index.data, data)
    assert index.live is None


def test_default_item_ids() -> None:
    sids = np.random.default_rng(0).integers(0, 9, (50, 3))
    index = rx.TrieIndex.build(sids[:30])
    assert torch.equal(index.add(sids[30:]).data, rx.TrieIndex.build(sids).data)
    assert index.restrict([]).add(sids[:3]).items.sort().values.tolist() == [0, 1, 2]
    assert index.add(np.zeros((0, 3), int)).items.tolist() == index.items.tolist()


def test_save_and_to(tmp_path: Path) -> None:
    sids = np.random.default_rng(0).integers(0, 9, (50, 3))
    index = rx.TrieIndex.build(sids)
    index.save(tmp_path / "all.trie")
    left = rx.TrieIndex.load(tmp_path / "all.trie").discard(range(20)).to("cpu").restrict(range(40))
    left.save(tmp_path / "left.trie")
    built = rx.TrieIndex.build(sids[20:40], item_ids=range(20, 40))
    assert torch.equal(rx.TrieIndex.load(tmp_path / "left.trie").data, built.data)
    assert left.nbytes == index.nbytes + left.live.numel()
    with pytest.raises(ValueError, match=r"none\.trie: an index without items cannot be saved"):
        index.restrict([]).save(tmp_path / "none.trie")


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_token_logps(normalize: str) -> None:
    """The support of ``"trie"`` is what is left of the children; an item that is gone has probability 0."""
    catalogue = Catalogue(np.random.default_rng(0).integers(0, 9, (40, 3)), None, None, rx.SIDVocab([9] * 3), 27)
    index = rx.TrieIndex.build(**catalogue.arguments()).restrict(range(20))
    built = rx.TrieIndex.build(**part_of(catalogue, list(range(20))).arguments())
    targets = tokens_of(catalogue)[:, :3]
    logits = torch.randn(40, 3, 27, requires_grad=True)
    got, expected = (
        rx.token_logps(logits, targets, vocab=index.vocab, index=trie, nodes=trie.nodes(targets), normalize=normalize)
        for trie in (index, built)
    )
    assert got.tolist() == expected.tolist()
    gone = ~index.contains(catalogue.sids)
    assert (got[gone].sum(1) > -torch.inf).any() == (normalize != "trie")


def test_logits_processor() -> None:
    catalogue = Catalogue(
        np.random.default_rng(0).integers(0, 9, (40, 3)), None, None, rx.SIDVocab([9] * 3, eos=27), 28
    )
    index = rx.TrieIndex.build(**catalogue.arguments()).discard(range(30))
    built = rx.TrieIndex.build(**part_of(catalogue, list(range(30, 40))).arguments())
    tokens = tokens_of(catalogue)
    for length in range(4):
        scores = torch.randn(40, 28)
        got, expected = (rx.TrieLogitsProcessor(trie, 0)(tokens[:, :length], scores) for trie in (index, built))
        assert got.tolist() == expected.tolist()


def test_nodes_that_are_gone() -> None:
    """A beam at one offers nothing, as an empty slot."""
    index = rx.TrieIndex.build([[0, 0], [0, 1], [1, 0]]).discard([2])
    state = state_of(torch.zeros(1, 3), torch.tensor([[2, 5, 1]]))
    got = rx.beam_step(torch.zeros(1, 3, 2), state, index, 4, check=True)
    assert got.parents.tolist() == [[2, 2, 0, 0]]
    assert got.nodes.tolist() == [[3, 4, -1, -1]]


def test_compiles() -> None:
    index = rx.TrieIndex.build(np.random.default_rng(0).integers(0, 9, (50, 3))).restrict(range(25))
    state, logits = rx.BeamState.start(index, 2), torch.randn(2, 1, 9)
    compiled = torch.compile(lambda x: rx.beam_step(x, state, index, 5).nodes, fullgraph=True, backend="aot_eager")
    assert compiled(logits).tolist() == rx.beam_step(logits, state, index, 5).nodes.tolist()


def test_places_outside_of_the_index_select_nothing() -> None:
    index = rx.TrieIndex.build([[0, 1], [1, 0], [1, 2]]).restrict([0, 2])
    assert torch.ops.raddpo.trie_select(torch.arange(-1, 3), *index.block, True).tolist() == [-1, 0, 2, -1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5, 1.0])
def test_cuda_kernels(shim: Shim, tmp_path: Path, dtype: torch.dtype, normalize: str, share: float) -> None:
    """To the bit as in a new index, and as on the CPU where no sum is rounded: thousands of candidates, many tied."""
    index = wide_index()
    left = index.restrict(np.flatnonzero(np.random.default_rng(0).random(index.num_items) < share))
    left.save(tmp_path / "left.trie")
    built = rx.TrieIndex.load(tmp_path / "left.trie")
    nodes = torch.randint(-1, built.num_nodes, (2, 10), generator=generator_of(1))
    nodes[:, :4] = torch.tensor([0, 1, 2, 1])
    numbers = torch.where(nodes < 0, -1, left.nodes_at(nodes.clamp(min=0).flatten()).view_as(nodes))
    scores = torch.tensor([0.0, -0.5, -1.0, -0.5, 0.0]).repeat(2, 2)
    logits = exact_logits((2, 10, 1601), dtype, 0)
    for beam_width in (1, 70, 1500, 9000):
        options = {"normalize": normalize, "length_penalty": 1.0}
        shim.set_order(2, 3)
        got = shim.beam_step(logits, state_of(scores, numbers), left, beam_width, **options)
        expected = shim.beam_step(logits, state_of(scores, nodes), built, beam_width, **options)
        number_of = torch.cat([left.nodes_at(torch.arange(built.num_nodes)), torch.tensor([-1])])
        assert_states_equal(got, dataclasses.replace(expected, nodes=number_of[expected.nodes]))
        if normalize == "vocab":
            assert_states_equal(got, rx.beam_step(logits, state_of(scores, numbers), left, beam_width, **options))


def test_cuda_kernels_where_nothing_is_left(shim: Shim) -> None:
    """Nor of the nodes of beams that an index before the change gave."""
    left, state = wide_index().restrict([]), state_of(torch.zeros(1, 3), torch.tensor([[0, 1, 4000]]))
    got = shim.beam_step(torch.zeros(1, 3, 1600), state, left, 5)
    assert got.nodes.tolist() == [[-1] * 5]
    index = wide_index()
    leaf = torch.tensor([[index.node_bound - 1]])
    first, count = (int(x) for x in index.item_ranges(leaf))
    left = index.discard(index.items[first : first + count])
    state = state_of(torch.zeros(1, 2), torch.cat([leaf, torch.ones_like(leaf)], 1))
    got = shim.beam_step(exact_logits((1, 2, 1601), torch.float32, 0), state, left, 5)
    assert got.parents.tolist() == [[1] * 5]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_child_logits(shim: Shim, dtype: torch.dtype) -> None:
    index, generator = wide_index(), generator_of(0)
    left = index.restrict(np.flatnonzero(np.random.default_rng(0).random(index.num_items) < 0.3))
    state = state_of(torch.zeros(1, 6), torch.arange(1, 7)[None])
    hidden = torch.randint(-1, 2, (6, 33), generator=generator).to(dtype)
    weight = torch.randint(-1, 2, (1600, 33), generator=generator).to(dtype)
    arguments = (hidden, weight, None, state)
    got = shim.child_logits(*arguments, left, 1)
    options = (*left.block, 1.0, 0.0, 1, left.num_symbols[1])
    expected = torch.ops.raddpo.child_logits(hidden, weight, None, state.scores[0], state.nodes[0], *options)
    for row, node in enumerate(state.nodes[0]):
        first, count = (int(x) for x in left.child_ranges(node[None]))
        tokens = left.node_tokens[first : first + count]
        symbols = torch.searchsorted(left.level_tokens(1), tokens)
        assert got[row, symbols].tolist() == expected[row, symbols].tolist()
        assert got[row, symbols].tolist() == (weight[tokens].float() @ hidden[row].float()).tolist()
        gone = torch.ones(got.shape[1]).bool()
        gone[symbols] = False
        assert (got[row, gone] == 777).all()  # not computed


@given(catalogues(most_items=200), st.integers(0, 2**32))
def test_cuda_lookups(shim: Shim, catalogue: Catalogue, seed: int) -> None:
    index = rx.TrieIndex.build(**catalogue.arguments())
    index = index.restrict(index.items[torch.rand(index.num_items, generator=generator_of(seed)) < 0.5])
    nodes = torch.randint(-2, index.node_bound + 2, (300,), generator=generator_of(seed))
    places = torch.randint(-2, index.num_nodes + 2, (300,), generator=generator_of(seed))
    for got, expected in [
        (shim.trie_paths(nodes, index), index.paths(nodes)),
        (shim.trie_ranges(nodes, index, items=True), index.item_ranges(nodes)),
        (shim.trie_ranges(nodes, index, items=False), index.child_ranges(nodes)),
        (shim.trie_top_items(nodes.view(3, 100), index, 40), index.top_items(nodes.view(3, 100), 40)),
        ([shim.trie_select(places, index, items=False)], [index.nodes_at(places)]),
        ([shim.trie_walk(tokens_of(catalogue), index)], [index._walk(tokens_of(catalogue))]),
    ]:
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.tolist() == theirs.tolist()


BASE = rx.TrieIndex.build([[0, 1], [1, 0], [2, 2]], item_ids=[4, 5, 2**40])
BAD = [
    (lambda: BASE.discard([4, 6]), ValueError, "item_ids hold 6, which is no item of the index"),
    (lambda: BASE.discard([-1]), ValueError, "item_ids hold -1, which is no item of the index"),
    (lambda: BASE.discard([4]).discard([4]), ValueError, "item_ids hold 4, which is no item of the index"),
    (lambda: BASE.discard([0.5]), TypeError, "item_ids must hold integers, got float64"),
    (lambda: BASE.restrict([[4]]), ValueError, "item_mask must have 1 dimensions"),
    (lambda: BASE.restrict([4, -2]), ValueError, r"item_mask\[1\] = -2 is negative"),
    (lambda: BASE.restrict(torch.ones(2, 3).bool()), ValueError, "item_mask must have 1 dimensions"),
    (
        lambda: BASE.restrict(torch.ones(6).bool()),
        ValueError,
        f"item_mask has 6 entries, but the index holds item {2**40}",
    ),
    (lambda: BASE.restrict([4, 5]).restrict(torch.ones(5).bool()), ValueError, "but the index holds item 5"),
    (lambda: BASE.restrict(torch.ones(6)), TypeError, "item_mask must hold integers, got torch.float32"),
    (lambda: BASE.restrict("all"), TypeError, "item_mask must hold integers, got <U3"),
    (lambda: BASE.add([[1, 1]], item_ids=[5]), ValueError, "item_ids hold 5, which is an item of the index already"),
    (lambda: BASE.add([[1, 1], [1, 2]], item_ids=[7, 7]), ValueError, "are both 7"),
    (lambda: BASE.add([[1, 1]], item_ids=[-7]), ValueError, "is negative"),
    (lambda: BASE.add([[1, 1]], item_ids=[6, 7]), ValueError, "item_ids must have one entry per row"),
    (lambda: BASE.add([[1, 1, 1]]), ValueError, r"sids must have 2 columns, as the index has, got shape \(1, 3\)"),
    (lambda: BASE.add([[1, -1]]), ValueError, r"sids\[0, 1\] = -1 is outside"),
    (
        lambda: BASE.add([[2, 2]], lengths=[1], item_ids=[9]),
        ValueError,
        r"the SID of item 9, \(2\), is a proper prefix of",
    ),
    (
        lambda: rx.TrieIndex.build([[3, 0]], lengths=[1]).add([[3, 1]]),
        ValueError,
        r"the SID of item 0, \(3\), is a prop",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("count", [1, 3, 12, 200])
def test_shares_of_a_merge(isa: str, count: int) -> None:
    """Shares that end within a word of bits, between nodes of one depth or without any added node."""
    rng = np.random.default_rng(count)
    for most in (2, 40, 5000):
        sids = rng.integers(0, [2, most, most], (2 * count, 3))
        lengths = np.where(sids[:, 0] == 0, 2, 3)  # items at two depths, no SID a prefix of another one
        first, second = np.split(np.arange(2 * count), [count if most > 2 else 2 * count - 1])
        ids = rng.permutation(2 * count)
        blocks = [
            rx.TrieIndex.build(sids[rows], lengths=lengths[rows], item_ids=ids[rows]).data.numpy()
            for rows in (first, second, np.arange(2 * count))
        ]
        for threads in (1, 2, 3, 16):
            np.full(len(blocks[2]), 255, np.uint8)  # memory that the merge gets next is seldom zero
            merged = _C.trie_merge(blocks[0], blocks[1], threads)
            assert merged.tobytes() == blocks[2].tobytes(), (most, threads)


def test_a_long_run_of_added_siblings(threads: int) -> None:
    """Ones over several words for one node, in front of all, between, and behind; steps over many old siblings."""
    old = np.arange(1000, 9000, 2)
    between = [np.arange(1001, 9000, 2 * stride) for stride in (1, 31, 32, 33, 96, 97)]
    for added in (*between, np.arange(500), np.arange(9000, 9500), np.array([0, 7777, 9999])):
        sids = np.concatenate([old, added])[:, None]
        grown = rx.TrieIndex.build(old[:, None]).add(added[:, None])
        assert torch.equal(grown.data, rx.TrieIndex.build(sids).data)


@pytest.mark.parametrize("step", [1, 2**20, 2**30])  # ids of 32 bits as bits, as a table; ids of 64 bits
def test_first_known(isa: str, threads: int, step: int) -> None:
    """Ids among those of the index, beyond them on either side, and around them."""
    held = (5 + np.arange(1000)[::-1]) * step
    index = rx.TrieIndex.build(np.arange(1000)[:, None], item_ids=held)
    for ids, known in (
        ([5 * step], 5 * step),
        ([2**62, 1004 * step], 1004 * step),
        ([0, 7 * step, 6 * step], 7 * step),
        ([4 * step, 1005 * step], -1),
        (range(4 * step), -1) if step == 1 else ([7 * step + 1], -1),
        ([1004 * step + 1, 2**31, 2**40 + 5 * step, 2**62], -1),
        ([], -1),
    ):
        assert _C.trie_first_known(index.data.numpy(), np.array(ids, np.int64), threads) == known


@pytest.mark.parametrize("first_ids", [0, 2**40])
@pytest.mark.parametrize("added_ids", [100, 2**31 - 3, 2**31 - 2, 2**41])
@pytest.mark.parametrize("codes", [(3, 5), (3, 70_000), (5000, 70_000), (70_000, 3)])
def test_ids_and_codes_of_other_widths_are_added(first_ids: int, added_ids: int, codes: tuple[int, int]) -> None:
    """Ids of 32 bits and of 64, up to the last that fits 32, and symbols of 16 and of 32 bits, either way round."""
    sids = np.array([[codes[0], 1], [0, 1], [codes[1], 1], [0, 2], [codes[1], 1]])
    ids = np.array([0, 1, 0, 1, 2]) + np.array([first_ids, first_ids, *[added_ids] * 3])
    grown = rx.TrieIndex.build(sids[:2], item_ids=ids[:2]).add(sids[2:], item_ids=ids[2:])
    assert torch.equal(grown.data, rx.TrieIndex.build(sids, item_ids=ids).data)
    assert grown.lookup(sids[2:3]).items.tolist() == [added_ids, added_ids + 2]
