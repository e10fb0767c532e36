"""beam_search as a whole: against brute force over the catalogue and against the plain reference."""

from __future__ import annotations

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import ToyModel, assert_scores_close, assert_search_agrees
from support.strategies import Catalogue, catalogues
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference
from raddpo_ext.decoding.row_lse import row_lse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMALIZE = ("vocab", "level", "trie")
PENALTIES = st.sampled_from([0.0, 1.0, -0.7, 2.5])


def draw_normalize(data: st.DataObject, catalogue: Catalogue) -> str:
    return data.draw(st.sampled_from(NORMALIZE if catalogue.vocab is not None else ("vocab", "trie")))


@settings(max_examples=25)
@given(catalogues(most_items=25), st.integers(0, 1000), st.sampled_from(DTYPES), PENALTIES, st.data())
def test_equals_brute_force(
    isa: str, catalogue: Catalogue, seed: int, dtype: torch.dtype, length_penalty: float, data: st.DataObject
) -> None:
    """With beams for everything the search scores the whole catalogue; so does the reference."""
    index = rx.TrieIndex.build(**catalogue.arguments())
    model = ToyModel.random(index.levels, 2, catalogue.columns, dtype, seed)
    normalize = draw_normalize(data, catalogue)
    top_k = data.draw(st.sampled_from([None, 1, 3, 100]))
    arguments = dict(batch_size=2, beam_width=64, normalize=normalize, length_penalty=length_penalty, top_k=top_k)
    scores = model.brute_force(catalogue, normalize, length_penalty)
    got = rx.beam_search(model, index, **arguments)
    assert got.scores.dtype == torch.float32
    assert_search_agrees(got, catalogue, scores, top_k)
    plain = reference.TrieIndex.build(**catalogue.arguments())
    assert_search_agrees(reference.beam_search(model, plain, **arguments), catalogue, scores, top_k)


@settings(max_examples=40)
@given(catalogues(), st.integers(0, 1000), st.sampled_from(DTYPES), PENALTIES, st.data())
def test_equals_reference_to_the_bit(
    isa: str, threads: int, catalogue: Catalogue, seed: int, dtype: torch.dtype, penalty: float, data: st.DataObject
) -> None:
    """Narrow beams, many ties, a width for each step. Only the log-sum-exps may be rounded in another way than the
    reference's; when it takes them from the same kernel, nothing at all may differ."""
    index = rx.TrieIndex.build(**catalogue.arguments())
    batch = data.draw(st.integers(1, 3))
    model = ToyModel.tied(index.levels, batch, catalogue.columns, dtype, seed)
    widths = [data.draw(st.sampled_from([1, 2, 3, 5, 30, 500])) for _ in range(index.levels)]
    top_k = data.draw(st.sampled_from([None, 1, 10]))
    arguments = dict(batch_size=batch, beam_width=widths, length_penalty=penalty, top_k=top_k)
    got = rx.beam_search(model, index, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            import_module("raddpo_ext.reference.beam_search"), "row_lse", lambda row: row_lse(row[None].to(dtype))[0]
        )
        expected = reference.beam_search(model, reference.TrieIndex.build(**catalogue.arguments()), **arguments)
    for name in ("items", "scores", "sids"):
        assert getattr(got, name).tolist() == getattr(expected, name).tolist()
    rows = widths[-1] if top_k is None else top_k
    assert got.scores.shape == got.items.shape == (batch, rows)
    assert got.sids.shape == (batch, rows, index.sid_levels)


def catalogue_index(rows: int = 2000, levels: int = 4, codes: int = 40) -> rx.TrieIndex:
    sids = np.random.default_rng(0).integers(0, codes, (rows, levels))
    return rx.TrieIndex.build(sids, vocab=rx.SIDVocab([codes] * levels))


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_float64_reference(isa: str, normalize: str) -> None:
    """Beams of a usual width on a larger catalogue; no score ties here, so the choice is the reference's."""
    index = catalogue_index()
    model = ToyModel.random(4, 3, 170, torch.float32, seed=1)
    exact = ToyModel(model.tables.double())
    arguments = dict(batch_size=3, beam_width=20, normalize=normalize)
    got = rx.beam_search(model, index, **arguments)
    expected = reference.beam_search(exact, index, **arguments)
    assert expected.scores.dtype == torch.float64
    assert got.items.tolist() == expected.items.tolist()
    assert_scores_close(got.scores, expected.scores, "beam_search")


def test_step_fn_is_called_once_a_level() -> None:
    index = rx.TrieIndex.build([[0, 1], [1, 0]], vocab=rx.SIDVocab([2, 2], eos=7))
    calls: list[tuple[int, list[list[int]], list[list[int]]]] = []

    def step_fn(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        calls.append((level, tokens.tolist(), parents.tolist()))
        return torch.zeros(*tokens.shape, 8)

    rx.beam_search(step_fn, index, batch_size=2, beam_width=3)
    assert calls == [
        (0, [[-1]] * 2, [[0]] * 2),
        (1, [[0, 1, -1]] * 2, [[0, 0, 0]] * 2),
        (2, [[3, 2, -1]] * 2, [[0, 1, 0]] * 2),
    ]


def test_logits_may_differ_in_width_by_level() -> None:
    index = rx.TrieIndex.build([[0, 99], [3, 50]])
    got = rx.beam_search(
        lambda tokens, parents, level: torch.zeros(*tokens.shape, [4, 100][level]), index, batch_size=1, beam_width=2
    )
    assert got.sids.tolist() == [[[0, 99], [3, 50]]]
    assert_scores_close(got.scores, torch.full((1, 2), -math.log(400)), "beam_search")


def test_more_items_than_beams() -> None:
    """Asking for items that the beams cannot hold is warned of; collided SIDs and a small catalogue may fill them."""
    single, collided = rx.TrieIndex.build([[0], [1], [2]]), rx.TrieIndex.build([[0], [0], [1], [2]])

    def search(index: rx.TrieIndex, width: int, top_k: int | None) -> int:
        return int((rx.beam_search(step_fn, index, batch_size=1, beam_width=width, top_k=top_k).items >= 0).sum())

    def step_fn(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        return torch.tensor([2.0, 1.0, 0.0]).expand(*tokens.shape, 3)

    with pytest.warns(UserWarning, match="top_k = 3 is above the last beam_width, 2: a search finds at most 2 items"):
        assert search(single, 2, 3) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [search(single, 2, 2), search(single, 3, 9), search(collided, 2, 3), search(single, 2, None)] == [
            2,
            3,
            3,
            2,
        ]


def test_parts_come_in_one_order() -> None:
    """Whoever unpacks a result gets what its names say, from the reference too."""
    index = rx.TrieIndex.build([[0, 1], [1, 0]], item_ids=[70, 80])

    def step_fn(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        return torch.tensor([3.0, 1.0]).expand(*tokens.shape, 2)

    for search in (rx.beam_search, reference.beam_search):
        for top_k in (None, 2):
            items, scores, sids, _ = found = search(step_fn, index, batch_size=1, beam_width=2, top_k=top_k)
            assert items is found.items
            assert items.tolist() == [[70, 80]]
            assert scores.dtype == torch.float32
            assert sids.tolist() == [[[0, 1], [1, 0]]]


@settings(max_examples=25)
@given(catalogues(), st.integers(0, 1000), PENALTIES, st.booleans(), st.data())
def test_forced_levels_need_no_model(
    catalogue: Catalogue, seed: int, penalty: float, filtered: bool, data: st.DataObject
) -> None:
    """To the bit, and the model runs as long as a live beam of the state before has a choice somewhere below."""
    index = rx.TrieIndex.build(**catalogue.arguments())
    if filtered:
        index = index.restrict(index.items[::3])
    model = ToyModel.random(index.levels, 2, catalogue.columns, torch.float32, seed)
    width = data.draw(st.sampled_from([1, 3, 64]))
    arguments = dict(batch_size=2, beam_width=width, normalize="trie", length_penalty=penalty, return_token_logps=True)
    states: list[rx.BeamState] = []
    expected = rx.beam_search(model, index, on_step=lambda level, state: states.append(state), **arguments)
    levels: list[int] = []
    got = rx.beam_search(
        lambda tokens, parents, level: (levels.append(level), model(tokens, parents, level))[1],
        index,
        skip_forced=True,
        **arguments,
    )
    assert all(map(torch.equal, got, expected))
    # The beams' tokens after each level, followed through their parents.
    left = set(index.items.tolist())
    sids = {path for path, item in zip(catalogue.tokens(), catalogue.items(), strict=True) if item in left}
    beams: list[list[tuple[int, ...]]] = [[()], [()]]
    choices = [len(sids) > 1]
    for state in states[:-1]:
        rows = zip(beams, state.tokens.tolist(), state.parents.tolist(), strict=True)
        beams = [
            [(*old[parent], token) if token >= 0 else old[parent] for token, parent in zip(*row, strict=True)]
            for old, *row in rows
        ]
        live = {
            beam for query, nodes in zip(beams, state.nodes.tolist(), strict=True) for beam in live_of(query, nodes)
        }
        choices.append(any(sum(sid[: len(beam)] == beam for sid in sids) > 1 for beam in live))
    assert levels == list(range(sum(choices)))


def live_of(beams: list[tuple[int, ...]], nodes: list[int]) -> list[tuple[int, ...]]:
    return [beam for beam, node in zip(beams, nodes, strict=True) if node >= 0]


def test_skip_forced_needs_the_trie() -> None:
    with pytest.raises(ValueError, match="skip_forced = True needs normalize = 'trie', got 'vocab'"):
        rx.beam_search(zeros, rx.TrieIndex.build([[0]]), batch_size=1, beam_width=1, skip_forced=True)


def zeros(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
    return torch.zeros(*tokens.shape, 8)


@settings(max_examples=25)
@given(catalogues(most_items=25), st.integers(0, 1000), st.data())
def test_token_log_probs(isa: str, catalogue: Catalogue, seed: int, data: st.DataObject) -> None:
    """Of every SID, by brute force; they add up to the score, and what is beyond a SID is 0."""
    index = rx.TrieIndex.build(**catalogue.arguments())
    model = ToyModel.random(index.levels, 2, catalogue.columns, torch.float32, seed)
    normalize = draw_normalize(data, catalogue)
    top_k = data.draw(st.sampled_from([None, 3, 100]))
    arguments = dict(batch_size=2, beam_width=64, normalize=normalize, top_k=top_k)
    found = rx.beam_search(model, index, **arguments, return_token_logps=True)
    assert found.token_logps is not None
    plain = rx.beam_search(model, index, **arguments)
    assert plain.token_logps is None
    assert all(map(torch.equal, found[:3], plain[:3]))
    for query, expected in enumerate(model.token_log_probs(catalogue, normalize)):
        for item, sid, logps in zip(
            *(part[query].tolist() for part in (found.items, found.sids, found.token_logps)), strict=True
        ):
            right = expected[tuple(code for code in sid if code >= 0)] if item >= 0 else []
            right = right + [0.0] * (index.most_levels - len(right))
            torch.testing.assert_close(torch.tensor(logps), torch.tensor(right), rtol=1e-5, atol=1e-5)


def test_collisions_and_top_k() -> None:
    """One row a SID with its first item, or one row an item."""
    index = rx.TrieIndex.build([[1], [0], [1], [1]], item_ids=[8, 6, 4, 2])
    logits = torch.tensor([0.0, 1.0])

    def step_fn(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        return logits.expand(*tokens.shape, 2)

    best, second = (logits - logits.logsumexp(0)).flip(0).tolist()
    got = rx.beam_search(step_fn, index, batch_size=1, beam_width=3)
    assert got.items.tolist() == [[8, 6, -1]]
    assert got.sids.tolist() == [[[1], [0], [-1]]]
    assert_scores_close(got.scores, torch.tensor([[best, second, -math.inf]]), "beam_search")
    got = rx.beam_search(step_fn, index, batch_size=1, beam_width=2, top_k=6)
    assert got.items.tolist() == [[8, 4, 2, 6, -1, -1]]
    assert got.sids.tolist() == [[[1], [1], [1], [0], [-1], [-1]]]
    assert got.scores[0, 4:].tolist() == [-math.inf] * 2
    got = rx.beam_search(step_fn, index, batch_size=1, beam_width=2, top_k=2)
    assert got.items.tolist() == [[8, 4]]


def test_length_penalty_decides_between_lengths() -> None:
    """A short SID of score -2 against a long one of -3: 2/1 against 3/3 tokens."""
    sids = [[0, 0, 0], [1, 0, 0]]
    index = rx.TrieIndex.build(sids, lengths=[1, 3])
    rows = [[-2.0, -1.0], [-1.0, -9.0], [-1.0, -9.0]]

    def step_fn(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        rest = math.log(1 - sum(map(math.exp, rows[level])))
        return torch.tensor([*rows[level], rest]).expand(*tokens.shape, 3)

    for penalty, expected in [(0.0, [-2, -3]), (1.0, [-1, -2]), (-1.0, [-2, -9]), (2.0, [-3 / 9, -2])]:
        got = rx.beam_search(step_fn, index, batch_size=1, beam_width=2, length_penalty=penalty)
        assert_scores_close(got.scores, torch.tensor([expected]), "beam_search")
        assert got.items.tolist() == [[1, 0] if penalty > 0 else [0, 1]]
        assert got.sids.tolist()[0][got.items.tolist()[0].index(0)] == [0, -1, -1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hopeless_logits_give_empty_rows(isa: str, bad: float) -> None:
    """One query's logits are lost at level 1; the other's are not."""
    index = catalogue_index()

    def step_fn(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        logits = torch.zeros(*tokens.shape, 160)
        if level == 1:
            logits[0] = bad
        return logits

    got = rx.beam_search(step_fn, index, batch_size=2, beam_width=5, top_k=4)
    assert got.items[0].tolist() == [-1] * 4
    assert got.scores[0].tolist() == [-math.inf] * 4
    assert (got.sids[0] == -1).all()
    assert (got.items[1] >= 0).all()


def test_batch_of_none() -> None:
    got = rx.beam_search(ToyModel.random(4, 0, 160, torch.float32, 0), catalogue_index(), batch_size=0, beam_width=3)
    assert got.scores.shape == (0, 3)
    assert got.sids.shape == (0, 3, 4)


def test_runs_are_identical(isa: str) -> None:
    """Also on another number of threads: a query is one piece of work or several, with the same result."""
    index, model = catalogue_index(), ToyModel.random(4, 1, 160, torch.bfloat16, 2)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        results.append(rx.beam_search(model, index, batch_size=1, beam_width=30))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result.items, results[0].items)
        assert torch.equal(result.scores, results[0].scores)
        assert torch.equal(result.sids, results[0].sids)


def test_concurrent_searches() -> None:
    """Rows long enough for the steps of several threads to overlap."""
    index = catalogue_index()
    tables = [ToyModel.random(4, 1, 20000, torch.float32, seed).tables for seed in range(4)]

    def search(i: int) -> rx.BeamResult:
        return rx.beam_search(ToyModel(tables[i % 4]), index, batch_size=1, beam_width=25)

    alone = [search(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for i, result in enumerate(pool.map(search, range(60))):
            for mine, theirs in zip(result[:3], alone[i % 4][:3], strict=True):
                assert torch.equal(mine, theirs)
