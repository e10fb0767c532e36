"""linear_beam_step against the dense step and the plain reference, on the CPU and by the shim of the CUDA kernels."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import assert_scores_close, assert_step_agrees
from support.beam_cases import DTYPES, NORMALIZE, generator_of, random_state, state_of, wide_index, without_dead_slots
from support.cuda_on_cpu.shim import Shim
from support.strategies import Catalogue, catalogues
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference

module = sys.modules["raddpo_ext.decoding.linear_beam_step"]
SIZES = [1, 5, 8, 33]  # features; products of such small integers are exact in every type


def one_level(state: rx.BeamState, index: rx.TrieIndex, level: int) -> rx.BeamState:
    """The state's beams, those with children at another level gone."""
    _, children = index.child_ranges(state.nodes)
    gone = (children > 0) & (index.depths(state.nodes) != level)
    return state_of(torch.where(gone, -math.inf, state.scores), torch.where(gone, -1, state.nodes))


def exact_head(
    catalogue: Catalogue, batch: int, width: int, size: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """States, weight and bias whose logits are small integers."""
    generator = generator_of(seed)
    hidden = torch.randint(-1, 2, (batch, width, size), generator=generator).to(dtype)
    weight = torch.randint(-1, 2, (catalogue.columns, size), generator=generator).to(dtype)
    return hidden, weight, torch.randint(-2, 3, (catalogue.columns,), generator=generator).to(dtype)


def assert_equals_reference(
    step: Callable[..., rx.BeamState],
    catalogue: Catalogue,
    seed: int,
    dtype: torch.dtype,
    penalty: float,
    data: st.DataObject,
) -> None:
    """One linear_beam_step from a random state of one level, against the float64 reference."""
    index = rx.TrieIndex.build(**catalogue.arguments())
    batch, width = data.draw(st.sampled_from([(1, 1), (1, 7), (3, 4)]))
    level = data.draw(st.integers(0, index.levels - 1))
    state = one_level(without_dead_slots(random_state(index, batch, width, generator_of(seed)), index), index, level)
    hidden, weight, bias = exact_head(catalogue, batch, width, data.draw(st.sampled_from(SIZES)), dtype, seed)
    used_bias = data.draw(st.sampled_from([None, bias]))
    normalize = data.draw(st.sampled_from([name for name in NORMALIZE if catalogue.vocab or name != "level"]))
    beam_width = data.draw(st.sampled_from([1, 2, 10, 1000]))
    given_level = data.draw(st.sampled_from([None, level]))
    got = step(
        hidden,
        weight,
        state,
        index,
        beam_width,
        bias=used_bias,
        normalize=normalize,
        length_penalty=penalty,
        level=given_level,
    )
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), None if used_bias is None else bias.double())
    plain = reference.TrieIndex.build(**catalogue.arguments())
    assert_step_agrees(got, logits, state, plain, normalize, penalty)


@settings(max_examples=60)
@given(catalogues(), st.integers(0, 2**32), st.sampled_from(DTYPES), st.sampled_from([0.0, 1.0]), st.data())
def test_equals_reference(
    isa: str, threads: int, catalogue: Catalogue, seed: int, dtype: torch.dtype, penalty: float, data: st.DataObject
) -> None:
    assert_equals_reference(rx.linear_beam_step, catalogue, seed, dtype, penalty, data)


EXPECTED: dict[tuple[Any, ...], rx.BeamState] = {}


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.5, None), (1.0, 3.0), (2.5, 1.5)])
def test_many_children(isa: str, normalize: str, dtype: torch.dtype, temperature: float, softcap: float | None) -> None:
    """More features than a piece, tiles of the vocabulary, scattered token ids, and views that are read in place."""
    index, generator = wide_index(), generator_of(1)
    state = state_of(-torch.arange(6.0)[None], torch.arange(1, 7)[None])
    hidden = (torch.randn(1, 6, 1501, generator=generator) / 8).to(dtype)
    weight = (torch.randn(1600, 1502, generator=generator) / 8).to(dtype)[:, 1:]
    bias = torch.randn(1600, generator=generator).to(dtype)
    options = {"normalize": normalize, "temperature": temperature, "logit_softcap": softcap}
    got = rx.linear_beam_step(hidden, weight, state, index, 300, bias=bias, **options)
    case = (normalize, dtype, temperature, softcap)
    if case not in EXPECTED:  # which the instruction sets share
        factors = (hidden.double(), weight.double())
        EXPECTED[case] = reference.linear_beam_step(*factors, state, index, 9000, bias=bias.double(), **options)
    expected = EXPECTED[case]
    score_of = dict(
        zip(
            zip(expected.parents[0].tolist(), expected.tokens[0].tolist(), strict=True),
            expected.scores[0],
            strict=True,
        )
    )
    same = torch.stack([score_of[key] for key in zip(got.parents[0].tolist(), got.tokens[0].tolist(), strict=True)])
    atol = 1e-4 if dtype == torch.float32 else 0.1  # the product rounds to the type of its factors
    torch.testing.assert_close(got.scores[0].double(), same, rtol=0, atol=atol)
    torch.testing.assert_close(got.scores.double(), expected.scores[:, :300], rtol=0, atol=atol)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_logits_of_the_whole_level(normalize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does where beams have many children gives the same step."""
    index, generator = wide_index(), generator_of(1)
    state = state_of(-torch.arange(6.0)[None], torch.arange(1, 7)[None])
    hidden, weight = torch.randn(1, 6, 40, generator=generator), torch.randn(1600, 40, generator=generator)
    options = {"bias": torch.randn(1600, generator=generator), "temperature": 2.0, "normalize": normalize}
    expected = rx.linear_beam_step(hidden, weight, state, index, 300, **options)
    monkeypatch.setattr(module, "_level_is_cheaper", lambda *_: True)
    got = rx.linear_beam_step(hidden, weight, state, index, 300, **options)
    assert got.nodes.tolist() == expected.nodes.tolist()
    assert_scores_close(got.scores, expected.scores, "beam_step")


@pytest.mark.parametrize("queries", [1, 2, 3])
def test_all_logits_of_some_queries_at_a_time(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does under ``"vocab"`` gives the same step, of three queries as of one."""
    index, generator = wide_index(), generator_of(1)
    state = state_of(-torch.rand(3, 6, generator=generator), torch.arange(1, 7).expand(3, 6))
    hidden, weight = torch.randn(3, 6, 40, generator=generator), torch.randn(1600, 40, generator=generator)
    options = {"bias": torch.randn(1600, generator=generator), "temperature": 2.0, "logit_softcap": 5.0}
    expected = rx.linear_beam_step(hidden, weight, state, index, 300, **options)
    monkeypatch.setattr(module, "_queries_at_once", lambda *_: queries)
    got = rx.linear_beam_step(hidden, weight, state, index, 300, **options)
    assert got.nodes.tolist() == expected.nodes.tolist()
    assert got.parents.tolist() == expected.parents.tolist()
    assert_scores_close(got.scores, expected.scores, "beam_step")


def test_how_many_queries_at_once() -> None:
    """On a GPU as many as fit 1 GiB of logits; a query that does not fit, and the CPU, have tiles."""
    weight = torch.empty(2**20, 2, device="meta")
    of = [module._queries_at_once(torch.empty(8, beams, 2, device="meta"), weight) for beams in (1, 64, 256, 257)]
    assert of == [8, 4, 1, 0]
    assert module._queries_at_once(torch.empty(8, 1, 2), torch.empty(4, 2)) == 0


def test_when_the_whole_level_is_cheaper() -> None:
    """On a GPU: where the rows that many beams share are read once, but not for a single child each."""
    prefixes = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    index = rx.TrieIndex.build(torch.cat([prefixes, torch.arange(4096)[:, None] % 512], 1))
    assert index.mean_children == [64, 64, 1]
    hidden = torch.empty(50, 8, device="meta")
    assert [module._level_is_cheaper(hidden, index, level) for level in range(3)] == [True, True, False]
    assert not module._level_is_cheaper(torch.empty(50, 8), index, 0)
    assert not module._level_is_cheaper(torch.empty(4096, 8, device="meta"), index, 2)


@settings(max_examples=40)
@given(catalogues(), st.integers(0, 2**32), st.sampled_from(DTYPES), st.sampled_from([(0, 0), (4, 5)]), st.data())
def test_cuda_kernels(
    shim: Shim, catalogue: Catalogue, seed: int, dtype: torch.dtype, order: tuple[int, int], data: st.DataObject
) -> None:
    """child_logits, and a beam_step whose columns are a level's symbols and whose log-sum-exps are given."""
    shim.set_order(*order)
    index = rx.TrieIndex.build(**catalogue.arguments())
    batch, width = data.draw(st.sampled_from([(1, 1), (1, 7), (3, 4)]))
    level = data.draw(st.integers(0, index.levels - 1))
    state = random_state(index, batch, width, generator_of(seed))
    live = one_level(without_dead_slots(state, index), index, level)
    size = data.draw(st.sampled_from(SIZES))
    hidden, weight, bias = exact_head(catalogue, batch, width, size, dtype, seed)
    bias = data.draw(st.sampled_from([None, bias]))
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    normalize = data.draw(st.sampled_from(["vocab", "trie"]))
    lse = logits.logsumexp(2).float() if normalize == "vocab" else None
    rows = hidden.view(-1, size)
    got = shim.child_logits(rows, weight, bias, state, index, level)
    again = rx.linear_beam_step(hidden, weight, live, index, 20, bias=bias, normalize=normalize, level=level)
    state = shim.beam_step(
        got.view(batch, width, -1), live, index, 20, normalize="trie" if lse is None else "vocab", lse=lse, level=level
    )
    plain = reference.TrieIndex.build(**catalogue.arguments())
    assert_step_agrees(state, logits, live, plain, normalize, 0.0)
    assert_step_agrees(again, logits, live, plain, normalize, 0.0)


@pytest.mark.parametrize("normalize", ["level", "trie"])
def test_cuda_step_over_a_level(shim: Shim, normalize: str) -> None:
    """Logits of one level's symbols, the log-sum-exp worked out."""
    index = wide_index()
    state = state_of(-torch.arange(6.0)[None], torch.arange(1, 7)[None])
    logits = torch.randn(1, 6, index.num_symbols[1], generator=generator_of(0))
    columns = index.level_tokens(1)
    dense = torch.full((1, 6, 1600), 50.0)
    dense[..., columns] = logits
    got = shim.beam_step(logits, state, index, 300, normalize=normalize, level=1)
    assert_scores_close(got.scores, rx.beam_step(dense, state, index, 300, normalize=normalize).scores, "beam_step")
    none = shim.beam_step(logits[:, :1], rx.BeamState.start(index, 1), index, 4, normalize=normalize, level=1)
    assert none.nodes.tolist() == [[-1] * 4]  # the root is of another level


@pytest.mark.parametrize("normalize", ["vocab", "trie"])
def test_cuda_step_with_a_nan_among_the_sums(shim: Shim, normalize: str) -> None:
    """A log-sum-exp that is NaN (of a logit that is +inf, say) ends its beam and no other."""
    index = wide_index()
    state = state_of(-torch.arange(6.0)[None], torch.arange(1, 7)[None])
    logits = torch.zeros(1, 6, index.num_symbols[1])
    lse = torch.tensor([[math.nan, 9.0, math.nan, 9.0, 9.0, math.nan]])
    got = shim.beam_step(logits, state, index, 9000, normalize=normalize, lse=lse, level=1)
    assert set(got.parents[got.nodes >= 0].tolist()) == {1, 3, 4}
    assert not got.scores.isnan().any()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_child_logits(shim: Shim, dtype: torch.dtype, softcap: float) -> None:
    """More features than a piece in shared memory, rows that are not aligned, and no column written but a child's."""
    index, generator = wide_index(), generator_of(2)
    state = state_of(torch.zeros(1, 8), torch.tensor([[1, 2, 3, 0, -1, 4, 5, 6]]))
    for size, first in [(4099, 0), (4100, 1), (64, 0)]:
        hidden = (torch.randn(8, size, generator=generator) / 16).to(dtype)
        weight = (torch.randn(1600, size + first, generator=generator) / 4).to(dtype)[:, first:]
        got = shim.child_logits(hidden, weight, None, state, index, 1, 0.5, softcap)
        expected = hidden.double() @ weight.double()[index.level_tokens(1)].T
        if softcap:
            expected = softcap * torch.tanh(expected / softcap)
        written = got != 777
        assert written.any(1).tolist() == [True, True, True, False, False, True, True, True]
        assert written.sum(1).tolist() == torch.where(written.any(1), index.child_ranges(state.nodes[0])[1], 0).tolist()
        torch.testing.assert_close(got[written].double(), 0.5 * expected[written], rtol=1e-5, atol=1e-5)


def test_search_from_hidden_states() -> None:
    """A whole search with the head fused in equals the search over its logits."""
    vocab = rx.SIDVocab([9, 9, 9], offset=5)
    index = rx.TrieIndex.build(torch.randint(9, (200, 3), generator=generator_of(0)), vocab=vocab)
    generator = generator_of(3)
    table, weight = torch.randn(3, 40, 16, generator=generator), torch.randn(40, 16, generator=generator)
    bias = torch.randn(40, generator=generator)

    def hidden_fn(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        return table[level][tokens]

    def step_fn(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        return 2 * (hidden_fn(tokens, parents, level) @ weight.T + bias)

    for normalize in NORMALIZE:
        states: list[tuple[int, rx.BeamState]] = []
        options = {"batch_size": 2, "beam_width": [3, 8, 20], "normalize": normalize}
        expected = rx.beam_search(step_fn, index, **options)
        got = rx.beam_search(
            hidden_fn,
            index,
            weight=weight,
            bias=bias,
            temperature=0.5,
            on_step=lambda level, state, states=states: states.append((level, state)),
            **options,
        )
        assert got.items.tolist() == expected.items.tolist()
        assert_scores_close(got.scores, expected.scores, "beam_search")
        assert [level for level, _ in states] == [0, 1, 2]
        assert [state.scores.shape[1] for _, state in states] == [3, 8, 20]
        assert states[-1][1].scores.tolist() == got.scores.tolist()


def test_refuses_bad_input() -> None:
    index = rx.TrieIndex.build([[0, 1], [1, 0]], vocab=rx.SIDVocab([2, 2]))
    state = rx.BeamState.start(index, 1)
    hidden, weight = torch.zeros(1, 1, 4), torch.zeros(4, 4)

    def step(**changes: object) -> None:
        arguments = {"hidden": hidden, "weight": weight, "state": state, "index": index, "beam_width": 2, **changes}
        rx.linear_beam_step(**arguments)  # type: ignore[arg-type]

    step()
    with pytest.raises(TypeError, match=r"hidden must be .* got torch.float64"):
        step(hidden=hidden.double())
    with pytest.raises(TypeError, match=r"weight must have the dtype of hidden, torch.float32, got torch.bfloat16"):
        step(weight=weight.bfloat16())
    with pytest.raises(ValueError, match=r"hidden must have 3 dimensions, got shape \(1, 4\)"):
        step(hidden=hidden[0])
    with pytest.raises(ValueError, match=r"hidden must have shape \[B, W, H\] with \[B, W\] = \(1, 1\)"):
        step(hidden=torch.zeros(2, 1, 4))
    with pytest.raises(
        ValueError, match=r"weight must have one column per feature of hidden \(4\), got shape \(4, 3\)"
    ):
        step(weight=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"bias must have one entry per row of weight \(4\), got shape \(3,\)"):
        step(bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"weight must have more than 1 rows, the level's largest token id, got shape"):
        step(weight=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"level must be in \[0, 2\), the index's levels, got 2"):
        step(level=2)
    with pytest.raises(ValueError, match=r"beam_width must be at least 1, got 0"):
        step(beam_width=0)
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0"):
        step(temperature=0)
    with pytest.raises(ValueError, match=r"hidden\[0, 0\] holds NaN"):
        step(hidden=torch.full((1, 1, 4), math.nan), check=True)
    two = state_of(torch.zeros(1, 2), torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"state must hold beams of one level, got levels \[0, 1\]"):
        step(hidden=torch.zeros(1, 2, 4), state=two)
    with pytest.raises(ValueError, match="bias, temperature and logit_softcap need weight"):
        rx.beam_search(lambda *_: torch.zeros(1, 1, 4), index, batch_size=1, beam_width=1, temperature=2.0)


def test_nan_never_yields_an_item() -> None:
    index = rx.TrieIndex.build([[0, 1], [1, 0]], vocab=rx.SIDVocab([2, 2]))
    hidden = torch.full((1, 1, 4), math.nan)
    for normalize in NORMALIZE:
        got = rx.linear_beam_step(hidden, torch.ones(4, 4), rx.BeamState.start(index, 1), index, 2, normalize=normalize)
        assert got.nodes.tolist() == [[-1, -1]]


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_compiles(normalize: str) -> None:
    index = rx.TrieIndex.build([[0, 1], [1, 0], [1, 1]], vocab=rx.SIDVocab([2, 2]))
    state, weight = rx.BeamState.start(index, 2), torch.randn(5, 4, generator=generator_of(0))

    def step(hidden: Tensor) -> tuple[Tensor, Tensor]:
        after = rx.linear_beam_step(hidden, weight, state, index, 3, normalize=normalize, level=0)
        return after.scores, after.nodes

    hidden = torch.randn(2, 1, 4, generator=generator_of(1))
    scores, nodes = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden)
    expected = step(hidden)
    assert nodes.tolist() == expected[1].tolist()
    assert_scores_close(scores, expected[0], "beam_step")
