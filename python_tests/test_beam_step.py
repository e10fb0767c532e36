"""One beam_step from any state, against the plain reference."""

from __future__ import annotations

import math
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import ToyModel, assert_scores_close, assert_states_equal, assert_step_agrees
from support.strategies import Catalogue, catalogues
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference
from raddpo_ext.decoding.row_lse import row_lse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def state_of(scores: list[list[float]], nodes: list[list[int]]) -> rx.BeamState:
    """Beams at these nodes; a step reads neither tokens nor parents."""
    tensor = torch.tensor(nodes)
    return rx.BeamState(torch.tensor(scores), torch.full_like(tensor, -1), torch.zeros_like(tensor), tensor)


def random_state(index: rx.TrieIndex, batch: int, width: int, generator: torch.Generator) -> rx.BeamState:
    """Inner nodes, whole SIDs and empty slots of any depth, in any order."""
    nodes = torch.randint(-1, index.num_nodes, (batch, width), generator=generator)
    scores = -5 * torch.rand(batch, width, generator=generator)
    scores[torch.rand(batch, width, generator=generator) < 0.1] = -math.inf
    return state_of(scores.tolist(), nodes.tolist())


@settings(max_examples=60)
@given(catalogues(), st.integers(0, 2**32), st.sampled_from(DTYPES), st.sampled_from([0.0, 1.0, -0.7]), st.data())
def test_equals_reference(
    isa: str, threads: int, catalogue: Catalogue, seed: int, dtype: torch.dtype, penalty: float, data: st.DataObject
) -> None:
    index = rx.TrieIndex.build(**catalogue.arguments())
    plain = reference.TrieIndex.build(**catalogue.arguments())
    generator = torch.Generator().manual_seed(seed)
    batch, width = data.draw(st.sampled_from([(1, 1), (1, 7), (3, 4)]))
    state = random_state(index, batch, width, generator)
    logits = (3 * torch.randn(batch, width, catalogue.columns, generator=generator)).to(dtype)
    hidden = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    logits[torch.rand(logits.shape, generator=generator) < hidden] = -math.inf
    normalize = data.draw(st.sampled_from(["vocab", "trie"] + ["level"] * (catalogue.vocab is not None)))
    beam_width = data.draw(st.sampled_from([1, 2, 10, 1000]))
    got = rx.beam_step(logits, state, index, beam_width, normalize=normalize, length_penalty=penalty)
    assert [part.dtype for part in vars(got).values()] == [torch.float32, *[torch.int64] * 3]
    assert_step_agrees(got, logits, state, plain, normalize, penalty)


@cache
def many_children() -> tuple[rx.TrieIndex, reference.TrieIndex]:
    """The index, and the same in Python, which takes longer to make than the test."""
    rng = np.random.default_rng(0)
    sids = np.stack([rng.integers(0, 6, 4000), rng.integers(0, 1500, 4000)], 1)
    tokens = [list(range(6)), (7 + rng.permutation(1500)).tolist()]
    index = rx.TrieIndex.build(sids, vocab=rx.SIDVocab([6, 1500], token_ids=tokens, eos=6))
    return index, reference.TrieIndex.of(index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
@pytest.mark.parametrize("beam_width", [1, 50, 300, 2000])
def test_many_children(isa: str, threads: int, dtype: torch.dtype, normalize: str, beam_width: int) -> None:
    """Rows longer than a block, more candidates than are held at once, several looks at the threshold a beam."""
    index, plain = many_children()
    generator = torch.Generator().manual_seed(0)
    nodes = [[1, 2, 3, 4, 5, 6, 0]]
    state = state_of([(-2 * torch.rand(7, generator=generator)).tolist()], nodes)
    logits = (3 * torch.randn(1, 7, 1600, generator=generator)).to(dtype)
    got = rx.beam_step(logits, state, index, beam_width, normalize=normalize)
    assert_step_agrees(got, logits, state, plain, normalize, 0.0)


@pytest.mark.parametrize("beam_width", [1, 3, 64, 65, 700, 5000])
@pytest.mark.parametrize("threads_used", [1, 2, 3])
def test_ties_go_to_the_lower_parent_then_token(isa: str, beam_width: int, threads_used: int) -> None:
    """Equal rows, equal scores: thousands of candidates on seven values, token ids in another order than codes."""
    rng = np.random.default_rng(0)
    sids = np.stack([np.repeat(np.arange(5), 400), np.tile(np.arange(400), 5)], 1)
    vocab = rx.SIDVocab([5, 400], token_ids=[[4, 3, 2, 1, 0], (5 + rng.permutation(400)).tolist()])
    index = rx.TrieIndex.build(sids, vocab=vocab)
    state = state_of([[-1.0, -1.0, -1.5, -1.0, -1.5]], [[3, 1, 2, 5, 4]])
    logits = torch.from_numpy(rng.integers(0, 7, 405) / 2).float().expand(1, 5, 405)
    before = torch.get_num_threads()
    torch.set_num_threads(threads_used)
    got = rx.beam_step(logits, state, index, beam_width)
    torch.set_num_threads(before)
    lse = float(row_lse(logits[0, :1].contiguous()))
    candidates = [
        (
            -float(np.float32(state.scores[0, beam]) + (np.float32(logits[0, beam, token]) - np.float32(lse))),
            beam,
            token,
        )
        for beam in range(5)
        for token in range(5, 405)
    ]
    rows = list(zip((-got.scores[0]).tolist(), got.parents[0].tolist(), got.tokens[0].tolist(), strict=True))
    assert rows[: min(beam_width, 2000)] == sorted(candidates)[:beam_width]
    assert (got.tokens[0, 2000:] == -1).all()


def test_finished_beams_compete_and_stay(isa: str) -> None:
    """A whole SID keeps score, node and slot, with token -1; its row of logits is not read."""
    index = rx.TrieIndex.build([[0, 0], [1, 0], [1, 1]], lengths=[1, 2, 2])
    state = state_of([[-2.0, -0.5, -1.0]], [[1, 2, 1]])
    logits = torch.zeros(1, 3, 2)
    logits[0, [0, 2]] = math.nan
    got = rx.beam_step(logits, state, index, 4)
    assert got.nodes.tolist() == [[1, 3, 4, 1]]
    assert got.parents.tolist() == [[2, 1, 1, 0]]
    assert got.tokens.tolist() == [[-1, 0, 1, -1]]
    assert_scores_close(got.scores, torch.tensor([[-1, -0.5 - math.log(2), -0.5 - math.log(2), -2]]), "beam_step")
    again = rx.beam_step(torch.zeros(1, 4, 2), got, index, 4)
    assert again.nodes.tolist() == got.nodes.tolist()
    assert again.scores.tolist() == got.scores.tolist()
    assert again.parents.tolist() == [[0, 1, 2, 3]]
    assert again.tokens.tolist() == [[-1] * 4]


def test_finished_beams_under_a_length_penalty(isa: str) -> None:
    index = rx.TrieIndex.build([[0, 0], [1, 0]], lengths=[1, 2])
    state = state_of([[-1.0, -1.5]], [[1, 2]])
    for penalty, best in [(0.0, 1), (1.0, 3)]:  # -1 against -1.5, then -1 / 1 against -1.5 / 2
        logits = torch.tensor([[[0.0, 0.0], [0.0, -200.0]]])
        got = rx.beam_step(logits, state, index, 1, length_penalty=penalty)
        assert got.nodes.tolist() == [[best]]
        score = -1.0 if best == 1 else -1.5  # the state's scores are unpenalised
        assert_scores_close(got.scores, torch.tensor([[score]]), "beam_step")


def test_no_child_scores_above_its_parent(isa: str) -> None:
    """Rounding lifts some log-probs above 0; they are clamped. Rows whose maximum comes late show it."""
    columns = 3000
    index = rx.TrieIndex.build([[columns - 1]])
    logits = torch.full((500, 1, columns), -8.0)
    logits[:, 0, -1] = torch.linspace(1, 40, 500)
    assert (row_lse(logits[:, 0]) < logits[:, 0, -1]).any()
    got = rx.beam_step(logits, rx.BeamState.start(index, 500), index, 1)
    assert (got.scores <= 0).all()


@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rest", [0.0, -math.inf])
@pytest.mark.parametrize("table", [False, True])
def test_a_bad_logit_ends_its_beam(isa: str, normalize: str, bad: float, rest: float, table: bool) -> None:
    """NaN and +inf anywhere in the softmax's support, also among -inf; the beam beside it lives on."""
    codes = 3200
    ids = list(range(1, codes + 1))
    vocab = rx.SIDVocab([codes], token_ids=[ids[::-1]] if table else [ids])
    index = rx.TrieIndex.build(np.arange(codes)[:, None], vocab=vocab)
    for place in (1, 70, 1030, codes):
        logits = torch.full((1, 2, codes + 1), rest)
        logits[0, :, -150:] = 0.0
        logits[0, 0, place] = bad
        got = rx.beam_step(logits, state_of([[-1.0, -1.0]], [[0, 0]]), index, 10)
        assert got.parents.tolist() == [[1] * 10]
        assert (got.scores > -math.inf).all()
        got = rx.beam_step(logits[:, :1], state_of([[-1.0]], [[0]]), index, 3, normalize=normalize)
        assert_states_equal(
            got, rx.BeamState(torch.full((1, 3), -math.inf), *torch.tensor([[[-1] * 3], [[0] * 3], [[-1] * 3]]))
        )


@pytest.mark.parametrize("normalize", ["level", "trie"])
def test_logits_outside_the_support_are_not_read(isa: str, normalize: str) -> None:
    vocab = rx.SIDVocab([3], offset=2)
    index = rx.TrieIndex.build([[0], [1], [2]], vocab=vocab)
    logits = torch.tensor([[[math.nan, math.inf, 1.0, 2.0, 3.0, math.nan]]])
    got = rx.beam_step(logits, rx.BeamState.start(index, 1), index, 3, normalize=normalize)
    assert_scores_close(got.scores, logits[0, :, 2:5].log_softmax(-1).flip(1), "beam_step")


def test_states_that_hold_no_beam(isa: str) -> None:
    """-inf, NaN, -1 and nodes beyond the trie."""
    index = rx.TrieIndex.build([[0], [1]])
    state = state_of([[-math.inf, math.nan, 0.0, 0.0, 0.0]], [[0, 0, -1, 99, -(2**40)]])
    got = rx.beam_step(torch.zeros(1, 5, 2), state, index, 2)
    assert got.nodes.tolist() == [[-1, -1]]
    assert got.scores.tolist() == [[-math.inf] * 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_logits(isa: str, dtype: torch.dtype) -> None:
    """Slices, broadcasts and transposes give what their contiguous copies give."""
    rng = np.random.default_rng(0)
    index = rx.TrieIndex.build(rng.integers(0, 50, (200, 2)))
    generator = torch.Generator().manual_seed(0)
    state = random_state(index, 3, 4, generator)
    whole = torch.randn(3, 9, 4, 120, generator=generator).to(dtype)
    views = [
        whole[:, 5, :, 7:60],
        whole[:, 2].transpose(1, 2)[:, :60].transpose(1, 2),
        whole[0, 0, 0, :51].expand(3, 4, 51),
    ]
    views += [whole.permute(0, 2, 3, 1).reshape(3, 4, 1080)[..., ::9], whole[:, 0, :1].expand(3, 4, 120)]
    for logits in views:
        assert_states_equal(rx.beam_step(logits, state, index, 10), rx.beam_step(logits.contiguous(), state, index, 10))
    scattered = rx.BeamState(*(part.repeat_interleave(2, 1)[:, ::2] for part in vars(state).values()))
    assert_states_equal(rx.beam_step(views[0], scattered, index, 9), rx.beam_step(views[0], state, index, 9))


@pytest.mark.parametrize("codes", [65536, 70000])
def test_wide_symbols(isa: str, codes: int) -> None:
    """Symbols of 16 bits up to 65536 codes, of 32 beyond."""
    sids = np.random.default_rng(0).integers(0, codes, (300, 2))
    sids[0] = codes - 1
    for vocab in (None, rx.SIDVocab([codes] * 2, offsets=[0, 0], eos=codes)):
        index = rx.TrieIndex.build(sids, vocab=vocab)
        model = ToyModel.random(1, 1, codes + 1, torch.float32, 0)
        logits = model.tables[0, :, :3]
        state = state_of([[0.0, -1.0, -2.0]], [[0, 1, 150]])
        got = rx.beam_step(logits, state, index, 400)
        assert_step_agrees(got, logits, state, reference.TrieIndex.of(index), "vocab", 0.0)


def test_reference_takes_any_type() -> None:
    index = rx.TrieIndex.build([[0, 1], [1, 0]])
    state = rx.BeamState.start(index, 2)
    for dtype, scores in [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)]:
        got = reference.beam_step(torch.zeros(2, 1, 2, dtype=dtype), state, index, 3)
        assert got.scores.dtype == scores
        assert got.tokens.tolist() == [[0, 1, -1]] * 2


def compile_case() -> tuple[rx.TrieIndex, Tensor, rx.BeamState]:
    index = rx.TrieIndex.build(np.random.default_rng(0).integers(0, 20, (100, 3)))
    state = rx.beam_step(torch.randn(2, 1, 20), rx.BeamState.start(index, 2), index, 4)
    return index, torch.randn(2, 4, 20), state


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend: str) -> None:
    """Together with what a model does around it."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler for inductor")
    index, hidden, state = compile_case()

    def step(hidden: Tensor, state: rx.BeamState) -> rx.BeamState:
        got = rx.beam_step(hidden * 2 + 1, state, index, 5, length_penalty=1.0)
        return rx.BeamState(got.scores - 1, got.tokens, got.parents, got.nodes)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for _ in range(2):
        assert_states_equal(compiled(hidden, state), step(hidden, state))
    assert_states_equal(
        compiled(hidden[:1], rx.BeamState(*(part[:1] for part in vars(state).values()))),
        step(hidden[:1], rx.BeamState(*(part[:1] for part in vars(state).values()))),
    )


@pytest.mark.parametrize("columns", [4, 100])
def test_compiles_where_levels_differ_in_columns(columns: int) -> None:
    index = rx.TrieIndex.build([[0, 99], [3, 50]])
    state = rx.BeamState.start(index, 2)
    compiled = torch.compile(lambda x: rx.beam_step(x, state, index, 3).scores, fullgraph=True, backend="aot_eager")
    logits = torch.randn(2, 1, columns)
    assert compiled(logits).tolist() == rx.beam_step(logits, state, index, 3).scores.tolist()
