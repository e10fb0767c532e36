"""One sample_step from any state, against the plain reference on the same noise."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import assert_scores_close
from support.beam_cases import DTYPES, generator_of, wide_index, wide_reference
from support.sample_cases import (
    assert_sample_states_equal,
    assert_sample_step_agrees,
    random_sample_state,
    sample_state,
    step,
)
from support.strategies import Catalogue, catalogues
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import _C, reference
from raddpo_ext.decoding.split_draws import split_draws
from raddpo_ext.reference.sample_step import philox


def options_of(batch: int, seed: int, temperature: float = 1.0) -> dict[str, Any]:
    keys = torch.randint(-(2**62), 2**62, (batch,), generator=generator_of(seed))
    return {"seed": seed, "keys": keys, "temperature": temperature}


def test_philox() -> None:
    """The test vectors of its authors (Random123)."""
    assert philox((0, 0, 0, 0), 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 2**32 - 1
    assert philox((ones,) * 4, 2**64 - 1) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@settings(max_examples=60)
@given(catalogues(), st.integers(0, 2**63 - 1), st.sampled_from(DTYPES), st.booleans(), st.data())
def test_equals_reference(
    isa: str, threads: int, catalogue: Catalogue, seed: int, dtype: torch.dtype, replacement: bool, data: st.DataObject
) -> None:
    index = rx.TrieIndex.build(**catalogue.arguments())
    plain = reference.TrieIndex.build(**catalogue.arguments())
    generator = generator_of(seed)
    batch, width = data.draw(st.sampled_from([(1, 1), (1, 7), (3, 4)]))
    state = random_sample_state(index, batch, width, generator, 5 if replacement else None)
    logits = (3 * torch.randn(batch, width, catalogue.columns, generator=generator)).to(dtype)
    hidden = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    logits[torch.rand(logits.shape, generator=generator) < hidden] = -math.inf
    beam_width = 1000 if replacement else data.draw(st.sampled_from([1, 2, 10, 1000]))
    options = options_of(batch, seed, data.draw(st.sampled_from([1.0, 0.5, 2.0])))
    got = step(logits, state, index, beam_width, replacement, **options)
    assert_sample_step_agrees(got, logits, state, plain, replacement=replacement, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beam_width", [1, 50, 2000])
def test_many_children(isa: str, threads: int, dtype: torch.dtype, beam_width: int) -> None:
    """Several chunks of children, more candidates than are held at once, scattered token ids."""
    index = wide_index()
    nodes = torch.tensor([[1, 2, 3, 4, 5, 6, 0]])
    scores = -2 * torch.rand(1, 7, generator=generator_of(0))
    state = sample_state(scores, nodes, scores + 1)
    logits = (3 * torch.randn(1, 7, 1600, generator=generator_of(1))).to(dtype)
    got = step(logits, state, index, beam_width, False, **options_of(1, 3))
    assert_sample_step_agrees(got, logits, state, wide_reference(), **options_of(1, 3))


@pytest.mark.parametrize("codes", [65536, 70000])
def test_wide_symbols(isa: str, codes: int) -> None:
    sids = np.random.default_rng(0).integers(0, codes, (300, 2))
    sids[0] = codes - 1
    index = rx.TrieIndex.build(sids)
    logits = torch.randn(1, 2, codes, generator=generator_of(0))
    state = sample_state(torch.tensor([[0.0, -1.0]]), torch.tensor([[0, 1]]), torch.tensor([[0.0, -0.5]]))
    got = step(logits, state, index, 400, False, **options_of(1, 5))
    assert_sample_step_agrees(got, logits, state, reference.TrieIndex.of(index), **options_of(1, 5))


def random_step(seed: int, batch: int = 4, width: int = 6) -> tuple[Tensor, rx.SampleState, rx.TrieIndex]:
    rng = np.random.default_rng(seed)
    index = rx.TrieIndex.build(rng.integers(0, 40, (900, 3)))
    logits = 2 * torch.randn(batch, width, 40, generator=generator_of(seed))
    return logits, random_sample_state(index, batch, width, generator_of(seed)), index


def test_the_best_child_has_its_parents_perturbed_score(isa: str) -> None:
    """To the bit, and none is above it; the log-prob is the score's increase."""
    logits, state, index = random_step(0)
    got = step(logits, state, index, 5000, False, **options_of(4, 1))
    live = got.nodes >= 0
    parents = state.perturbed.gather(1, got.parents)
    assert (got.perturbed <= parents)[live].all()
    for query in range(4):
        for beam in set(got.parents[query][live[query]].tolist()):
            children = live[query] & (got.parents[query] == beam)
            assert float(got.perturbed[query][children].max()) == float(state.perturbed[query, beam])
            if (got.tokens[query][children] >= 0).all():
                assert_scores_close(got.logps[query][children].exp().sum(), torch.tensor(1.0), "sample_step")
    assert (state.scores.gather(1, got.parents) + got.logps)[live].tolist() == got.scores[live].tolist()


def test_fewer_beams_are_the_first_of_more(isa: str) -> None:
    logits, state, index = random_step(1)
    wide = step(logits, state, index, 300, False, **options_of(4, 1))
    for width in (1, 2, 17, 120):
        narrow = step(logits, state, index, width, False, **options_of(4, 1))
        assert_sample_states_equal(narrow, rx.SampleState(*(part[:, :width] for part in vars(wide).values())))


@pytest.mark.parametrize("scale", [0.3, 3.0, 60.0])
@pytest.mark.parametrize("score", [0.0, -40.0, -3000.0])
@pytest.mark.parametrize("left", [1.0, 0.6])
def test_no_child_that_counts_is_passed_over(isa: str, scale: float, score: float, left: float) -> None:
    """Of many children, most of which are far below the threshold: the first of a wide step, which takes them all."""
    rng = np.random.default_rng(0)
    index = rx.TrieIndex.build(np.stack([rng.integers(0, 900, 4000), rng.integers(0, 900, 4000)], 1) // [225, 1])
    index = index.restrict(torch.from_numpy(rng.random(4000) < left))
    generator = generator_of(int(scale))
    for nodes in ([[0]], [[1, 2, 3, 4]]):
        width = len(nodes[0])
        scores = torch.full((1, width), score)
        perturbed = scores + torch.tensor([[2.0, 1.0, 0.0, -9.0]])[:, :width] if nodes[0][0] else scores + math.inf
        state = sample_state(scores, torch.tensor(nodes), perturbed)
        logits = scale * torch.randn(1, width, 900, generator=generator)
        for seed in range(8):
            wide = step(logits, state, index, 4000, False, **options_of(1, seed))
            for few in (1, 4, 30, 200):
                narrow = step(logits, state, index, few, False, **options_of(1, seed))
                assert_sample_states_equal(narrow, rx.SampleState(*(part[:, :few] for part in vars(wide).values())))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_beam_that_ends_makes_room_for_others(isa: str, bad: float) -> None:
    """As many beams as the result has: each but the ended one offers its own score, and further children fill up."""
    index = rx.TrieIndex.build(np.stack([np.arange(120) // 30, np.arange(120) % 30], 1))
    state = sample_state(torch.zeros(1, 4), torch.tensor([[1, 2, 3, 4]]), torch.full((1, 4), 9.0))
    logits = torch.randn(1, 4, 30, generator=generator_of(0))
    logits[0, 2] = bad
    got = step(logits, state, index, 4, False, **options_of(1, 3))
    assert_sample_step_agrees(got, logits, state, reference.TrieIndex.of(index), **options_of(1, 3))
    assert (got.nodes >= 0).all()
    assert got.perturbed[0, 2] == 9 > got.perturbed[0, 3]


def test_ties_go_to_the_lower_parent(isa: str) -> None:
    """Finished or not: of two beams with one perturbed score, the children of the first are before the second."""
    index = rx.TrieIndex.build([[0, 0], [0, 1], [1, 0], [2, 0], [2, 1]], lengths=[2, 2, 1, 2, 2])
    nodes = index.nodes(torch.tensor([[0, -1], [1, -1], [2, -1]]))[:, 1][None]
    logits = torch.zeros(1, 3, 2)
    for order in itertools.permutations(range(3)):
        state = sample_state(torch.zeros(1, 3), nodes[:, order], torch.ones(1, 3))
        got = rx.sample_step(logits, state, index, 3, seed=0)
        assert (got.parents.tolist(), got.perturbed.tolist()) == ([[0, 1, 2]], [[1.0] * 3])


@pytest.mark.parametrize("replacement", [False, True])
def test_a_query_does_not_depend_on_the_batch(isa: str, threads: int, replacement: bool) -> None:
    """Alone, in another order and on another number of threads: the same bits under the same key."""
    logits, state, index = random_step(2)
    if replacement:
        state = random_sample_state(index, 4, 6, generator_of(2), draws=9)
    options = options_of(4, 7)
    whole = step(logits, state, index, 100, replacement, **options)
    order = torch.tensor([2, 0, 3])
    some = rx.SampleState(*(part[order] for part in vars(state).values()))
    got = step(logits[order], some, index, 100, replacement, **(options | {"keys": options["keys"][order]}))
    assert_sample_states_equal(got, rx.SampleState(*(part[order] for part in vars(whole).values())))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert_sample_states_equal(step(logits, state, index, 100, replacement, **options), whole)
    torch.set_num_threads(before)


def test_keys_and_seed() -> None:
    """Other keys and other seeds give other noise; the default keys are the rows; a seed may be a tensor."""
    index = rx.TrieIndex.build(np.arange(50)[:, None])
    start, logits = rx.SampleState.start(index, 3), torch.zeros(3, 1, 50)
    drawn = rx.sample_step(logits, start, index, 5, seed=1)
    assert len({tuple(row) for row in drawn.tokens.tolist()}) == 3
    same = rx.sample_step(logits, start, index, 5, seed=torch.tensor(1), keys=torch.arange(3))
    assert_sample_states_equal(same, drawn)
    for seed in (0, 2, 1 + 2**32, 2**63 - 1):
        assert rx.sample_step(logits, start, index, 5, seed=seed).tokens.tolist() != drawn.tokens.tolist()
    for key in (1 + 2**32, -1):
        other = rx.sample_step(logits[:1], rx.SampleState.start(index, 1), index, 5, seed=1, keys=torch.tensor([key]))
        assert other.tokens[0].tolist() not in drawn.tokens.tolist()


def test_instruction_sets_agree() -> None:
    logits, state, index = random_step(3)
    before, results = _C.isa(), []
    for isa in ("scalar", _C.best_isa()):
        _C.set_isa(isa)
        results.append(step(logits, state, index, 200, False, **options_of(4, 2)))
    _C.set_isa(before)
    assert results[0].tokens.tolist() == results[1].tokens.tolist()
    assert_scores_close(results[0].perturbed, results[1].perturbed, "sample_step")


def test_finished_beams_compete_and_stay(isa: str) -> None:
    """A whole SID keeps its scores, node and slot, with token -1; its row of logits is not read."""
    index = rx.TrieIndex.build([[0, 0], [1, 0], [1, 1]], lengths=[1, 2, 2])
    state = sample_state(torch.tensor([[-2.0, -0.5]]), torch.tensor([[1, 2]]), torch.tensor([[-1.0, -0.25]]))
    logits = torch.zeros(1, 2, 2)
    logits[0, 0] = math.nan
    got = rx.sample_step(logits, state, index, 4, seed=0)
    finished = got.nodes[0].tolist().index(1)
    assert (got.parents[0, finished], got.tokens[0, finished], got.logps[0, finished]) == (0, -1, 0)
    assert (got.scores[0, finished], got.perturbed[0, finished]) == (-2, -1)
    assert sorted(got.nodes[0].tolist()) == [-1, 1, 3, 4]
    again = rx.sample_step(torch.full((1, 4, 2), math.nan), got, index, 4, seed=0)
    assert again.nodes.tolist() == got.nodes.tolist()
    assert again.perturbed.tolist() == got.perturbed.tolist()
    assert again.parents.tolist() == [[0, 1, 2, 0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rest", [0.0, -math.inf])
@pytest.mark.parametrize("replacement", [False, True])
def test_a_bad_logit_ends_its_beam(isa: str, bad: float, rest: float, replacement: bool) -> None:
    """NaN and +inf anywhere among the children; the beam beside it lives on."""
    index = rx.TrieIndex.build(np.arange(300)[:, None])
    state = sample_state(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), 3.0))
    for place in (0, 70, 299):
        logits = torch.full((1, 2, 300), rest)
        logits[0, :, -150:] = 0.0
        logits[0, 0, place] = bad
        got = step(logits, state, index, 10, replacement, **options_of(1, 0))
        assert (got.nodes >= 0).any()
        assert (got.parents == 1)[got.nodes >= 0].all()
        assert not got.perturbed.isnan().any()
    with pytest.raises(ValueError, match=r"logits\[0, 0\] holds NaN"):
        rx.sample_step(torch.full((1, 2, 300), math.nan), state, index, 3, seed=0, check=True)


@pytest.mark.parametrize("replacement", [False, True])
def test_hopeless_rows_and_states(isa: str, replacement: bool) -> None:
    """A row of -inf, and -inf, NaN, -1 and nodes beyond the trie in the state: no beam, no NaN."""
    index = rx.TrieIndex.build([[0], [1]])
    nodes = torch.tensor([[0, 0, 0, -1, 99, -(2**40), 0]])
    scores = torch.tensor([[0.0, -math.inf, math.nan, 0.0, 0.0, 0.0, 0.0]])
    perturbed = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, math.nan]])
    logits = torch.zeros(1, 7, 2)
    logits[0, 0] = -math.inf
    got = step(logits, sample_state(scores, nodes, perturbed), index, 2, replacement, **options_of(1, 0))
    assert got.nodes.tolist() == [[-1, -1]]
    assert got.perturbed.tolist() == [[-math.inf] * 2]


@pytest.mark.parametrize("replacement", [False, True])
def test_unlikely_children(isa: str, replacement: bool) -> None:
    """Gaps of 1e4 are finite, a child of log-prob -inf is never drawn, and children of equal logits tie nowhere."""
    index = rx.TrieIndex.build(np.arange(40)[:, None])
    logits = torch.zeros(1, 1, 40)
    logits[..., ::2] = -1e4
    logits[..., 1] = -math.inf
    state = sample_state(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), 30.0))
    got = step(logits, state, index, 50, replacement, **options_of(1, 4))
    found = got.nodes[0] >= 0
    assert 1 not in got.tokens[0].tolist()
    assert not any(part.isnan().any() for part in vars(got).values())
    if replacement:
        assert float(got.perturbed[0][found].sum()) == 30
        assert (got.tokens[0][found] % 2 == 1).all()
    else:
        assert int(found.sum()) == 39
        assert (got.scores[0][found] > -math.inf).all()


def test_a_restricted_index_is_one_of_fewer_children(isa: str) -> None:
    """The same bits as the whole index, whose other children have logits of -inf: nodes keep their noise."""
    rng = np.random.default_rng(5)
    index = rx.TrieIndex.build(np.stack([rng.integers(0, 3, 3000), rng.integers(0, 500, 3000)], 1))
    left = index.restrict(torch.from_numpy(rng.random(3000) < 0.2))
    beams = [0, 1, 2, 3]
    state = sample_state(torch.zeros(1, 4), torch.tensor([beams]), torch.tensor([[0.0, -0.5, -1.0, -0.1]]))
    logits = torch.randn(1, 4, 500, generator=generator_of(5))
    masked = torch.full_like(logits, -math.inf)
    for beam, node in enumerate(beams):
        prefix = index.paths(torch.tensor([node]))[0][0]
        children = left.children(prefix[prefix >= 0].tolist())
        masked[0, beam, children] = logits[0, beam, children]
    for replacement in (False, True):
        if replacement:
            state = sample_state(state.scores, state.nodes, torch.full((1, 4), 20.0))
        got = step(logits, state, left, 700, replacement, **options_of(1, 6))
        expected = step(masked, state, index, 700, replacement, **options_of(1, 6))
        assert got.nodes.tolist() == expected.nodes.tolist()
        assert_scores_close(got.perturbed, expected.perturbed, "sample_step")


@pytest.mark.parametrize("eos", [None, 16])
@pytest.mark.parametrize("left", [1.0, 0.4, 0.0])
def test_draws_in_plain_torch(eos: int | None, left: float) -> None:
    """As a GPU makes them: what the operator draws, of whole and of filtered indexes, with a beam that ends in NaN."""
    rng = np.random.default_rng(0)
    vocab = rx.SIDVocab([4, 5, 6], token_ids=[[9, 1, 5, 3], [2, 4, 6, 8, 10], [0, 7, 11, 12, 13, 14]], eos=eos)
    sids = np.stack([rng.integers(0, size, 60) for size in (4, 5, 6)], 1)
    index = rx.TrieIndex.build(sids, lengths=None if eos is None else rng.integers(1, 4, 60), vocab=vocab)
    if left < 1:
        index = index.restrict(torch.from_numpy(rng.random(60) < left))
    state = rx.SampleState.start(index, 3)
    state = replace(state, perturbed=torch.full_like(state.perturbed, 20))
    options = options_of(3, 5, 0.7)
    for level in range(index.levels):
        logits = torch.randn(*state.nodes.shape, 20, generator=generator_of(level))
        logits[0, 1:2] = math.nan
        beams = (state.scores, state.perturbed, state.nodes, options["keys"], torch.tensor(5))
        # From all logits, and from those of the level's symbols.
        tokens = index.level_tokens(level)
        for columns, part in ((-1, logits), (level, logits[..., tokens])):
            got = rx.SampleState(*split_draws(part, *beams, index, columns, 20, 1 / 0.7))
            expected = step(logits, state, index, 20, True, **options)
            for name in ("tokens", "parents", "nodes", "perturbed"):
                assert getattr(got, name).tolist() == getattr(expected, name).tolist(), name
            assert_scores_close(got.scores, expected.scores, "sample_step")
            assert_scores_close(got.logps, expected.logps, "sample_step")
        state = expected
    assert (state.nodes >= 0).any() or left == 0


def test_strided_logits(isa: str) -> None:
    index = rx.TrieIndex.build(np.random.default_rng(0).integers(0, 50, (200, 2)))
    state = random_sample_state(index, 3, 4, generator_of(0))
    whole = torch.randn(3, 9, 4, 120, generator=generator_of(0))
    for logits in (whole[:, 5, :, 7:60], whole[:, 2].transpose(1, 2)[:, :60].transpose(1, 2)):
        got = rx.sample_step(logits, state, index, 10, seed=3)
        assert_sample_states_equal(got, rx.sample_step(logits.contiguous(), state, index, 10, seed=3))


def test_compiles_to_one_graph() -> None:
    logits, state, index = random_step(4)

    def run(logits: Tensor, state: rx.SampleState, seed: Tensor) -> rx.SampleState:
        return rx.sample_step(logits * 2, state, index, 5, seed=seed, temperature=0.5)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed in (torch.tensor(3), torch.tensor(4)):
        assert_sample_states_equal(compiled(logits, state, seed), run(logits, state, seed))
    torch._dynamo.reset()
    plain = torch.compile(
        lambda x: rx.sample_step(x, state, index, 5, seed=9).tokens, fullgraph=True, backend="aot_eager"
    )
    assert plain(logits).tolist() == rx.sample_step(logits, state, index, 5, seed=9).tokens.tolist()


def test_bad_input() -> None:
    index = rx.TrieIndex.build([[0, 1], [1, 0]])
    state, logits = rx.SampleState.start(index, 2), torch.zeros(2, 1, 2)

    def run(logits: Any = logits, state: Any = state, index: Any = index, width: Any = 3, **options: Any) -> None:
        rx.sample_step(logits, state, index, width, **({"seed": 0} | options))

    run()
    for normalize in ("vocab", "level"):
        with pytest.raises(ValueError, match=f"normalize must be 'trie' for sampling, got '{normalize}'"):
            run(normalize=normalize)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        run(seed=-1)
    with pytest.raises(ValueError, match=f"seed must be at most {2**63 - 1}, got {2**63}"):
        run(seed=2**63)
    with pytest.raises(TypeError, match=r"seed must be an integer, got 0\.5"):
        run(seed=0.5)
    with pytest.raises(ValueError, match=r"seed must be one number .* got shape \(2,\)"):
        run(seed=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"keys must have shape \[B\] = \(2,\) .* got \(3,\)"):
        run(keys=torch.arange(3))
    with pytest.raises(TypeError, match="keys must be an int64 tensor"):
        run(keys=torch.zeros(2))
    for temperature in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be"):
            run(temperature=temperature)
    with pytest.raises(ValueError, match="beam_width must be at least 1, got 0"):
        run(width=0)
    with pytest.raises(TypeError, match="state must be a SampleState, got BeamState"):
        run(state=rx.BeamState.start(index, 2))
    with pytest.raises(TypeError, match="index must be a TrieIndex"):
        run(index=3)
    with pytest.raises(TypeError, match="logits must be"):
        run(logits=torch.zeros(2, 1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"state\.perturbed must be float32"):
        run(state=rx.SampleState(**(vars(state) | {"perturbed": torch.zeros(2, 2)})))
    with pytest.raises(ValueError, match="logits of level 0 must have more than 1 columns"):
        run(logits=torch.zeros(2, 1, 1))
