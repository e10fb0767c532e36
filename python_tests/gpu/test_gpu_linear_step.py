"""Beam steps from hidden states on a CUDA device, against the CPU and float64. Skipped without a device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agreement import assert_scores_close, assert_states_equal
from support.beam_cases import (
    DTYPES,
    NORMALIZE,
    exact_logits,
    generator_of,
    six_beams,
    state_of,
    wide_index,
)
from support.on_gpu import NEEDS_GPU, REPEATS, moved, no_synchronisation
from support.strategies import Catalogue, catalogues
from test_linear_beam_step import assert_equals_reference, module
from test_linear_beam_step_tiles import assert_lse_equals_float64
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference

pytestmark = NEEDS_GPU

WAYS = ["children", "level", "all"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which logits are made: the children's alone, the whole level's, or, under ``"vocab"``, all of a query's.

    In the first two ways the log-sum-exp comes from tiles, here of 1024 columns.
    """
    monkeypatch.setattr(module, "_TILE_BYTES", 1)
    monkeypatch.setattr(module, "_level_is_cheaper", lambda *_: request.param == "level")
    monkeypatch.setattr(module, "_queries_at_once", lambda *_: int(request.param == "all"))
    return request.param


def on_gpu(hidden: Tensor, weight: Tensor, state: rx.BeamState, index: rx.TrieIndex, width: int, **options: Any) -> Any:
    """linear_beam_step on the GPU, its arguments and result on the CPU."""
    options = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    got = rx.linear_beam_step(hidden.cuda(), weight.cuda(), moved(state, "cuda"), index.to("cuda"), width, **options)
    return moved(got, "cpu")


@settings(max_examples=REPEATS, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(catalogues(), st.integers(0, 2**32), st.sampled_from(DTYPES), st.sampled_from([0.0, 1.0]), st.data())
def test_equals_reference(
    way: str, catalogue: Catalogue, seed: int, dtype: torch.dtype, penalty: float, data: st.DataObject
) -> None:
    assert_equals_reference(on_gpu, catalogue, seed, dtype, penalty, data)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (2.5, 1.5)])
def test_many_children(way: str, normalize: str, dtype: torch.dtype, temperature: float, softcap: float | None) -> None:
    """Several tiles of the vocabulary, scattered token ids, bias, and a weight that is not aligned."""
    index, generator = wide_index(), generator_of(1)
    state = state_of(-torch.arange(6.0)[None], torch.arange(1, 7)[None])
    hidden = (torch.randn(1, 6, 1501, generator=generator) / 8).to(dtype)
    weight = (torch.randn(1600, 1502, generator=generator) / 8).to(dtype)[:, 1:]
    bias = torch.randn(1600, generator=generator).to(dtype)
    options = {"normalize": normalize, "temperature": temperature, "logit_softcap": softcap}
    got = on_gpu(hidden, weight, state, index, 300, bias=bias, **options)
    wide = {"bias": bias.double(), **options}
    expected = reference.linear_beam_step(hidden.double(), weight.double(), state, index, 300, **wide)
    atol = 1e-4 if dtype == torch.float32 else 0.1  # the product rounds to the type of its factors
    torch.testing.assert_close(got.scores.double(), expected.scores, rtol=0, atol=atol)
    assert index.contains(index.paths(got.nodes.view(-1))[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=REPEATS, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_lse_in_tiles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, data: st.DataObject) -> None:
    monkeypatch.setattr(module, "_TILE_BYTES", 1)
    assert_lse_equals_float64("cuda", dtype, data)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_child_logits(dtype: torch.dtype, softcap: float) -> None:
    """More features than a piece in shared memory, rows that are aligned and not, and beams of other levels."""
    index, generator = wide_index(), generator_of(2)
    nodes, scores = torch.tensor([1, 2, 3, 0, -1, 4, 5, 6]), torch.zeros(8)
    scores[6] = -math.inf
    first, count = index.child_ranges(nodes)
    count[[3, 4, 6]] = 0
    for size, offset in [(4099, 0), (4100, 1), (1024, 0), (64, 0), (3, 0)]:
        hidden = (torch.randn(8, size, generator=generator) / 16).to(dtype)
        weight = (torch.randn(1600, size + offset, generator=generator) / 4).to(dtype)[:, offset:]
        bias = torch.randn(1600, generator=generator).to(dtype)
        torch.full((8, index.num_symbols[1]), 777.0, device="cuda")  # what the result's memory may hold before
        tail = (*index.to("cuda").block, 0.5, softcap, 1, index.num_symbols[1])
        got = torch.ops.raddpo.child_logits(
            hidden.cuda(), weight.cuda(), bias.cuda(), scores.cuda(), nodes.cuda(), *tail
        ).cpu()
        product = hidden.double() @ weight.double().T + bias.double()
        expected = 0.5 * (softcap * torch.tanh(product / softcap) if softcap else product)
        tokens = index.node_tokens.long()
        columns = {int(token): column for column, token in enumerate(index.level_tokens(1))}
        for row in range(8):
            own = tokens[int(first[row]) : int(first[row] + count[row])]
            at = torch.tensor([columns[token] for token in own.tolist()], dtype=torch.int64)
            torch.testing.assert_close(got[row, at].double(), expected[row, own], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_over_a_level(normalize: str, dtype: torch.dtype) -> None:
    """Columns that are one level's symbols, and log-sum-exps worked out before, a NaN among them: the CPU's step."""
    index, state = wide_index(), six_beams()
    logits = exact_logits((2, 6, index.num_symbols[1]), dtype, 0)
    lse = torch.tensor([[math.nan, 200.0, 200.0, math.inf, 200.0, math.nan], [200.0] * 6])
    for sums in (None, lse):
        results = []
        for device in ("cpu", "cuda"):
            tensors = [
                None if x is None else x.to(device) for x in (logits, state.scores, state.nodes, index.data, sums)
            ]
            got = torch.ops.raddpo.beam_step(
                *tensors[:4], index.header, None, tensors[4], 1, 300, NORMALIZE.index(normalize), 0.5
            )
            results.append(rx.BeamState(*(part.cpu() for part in got)))
        expected, got = results
        assert_scores_close(got.scores, expected.scores, "beam_step")
        if sums is not None or normalize == "vocab":  # exact log-probs: ties fall alike
            assert got.nodes.tolist() == expected.nodes.tolist()
            assert got.parents.tolist() == expected.parents.tolist()


def inputs() -> tuple[Tensor, Tensor, rx.TrieIndex, rx.BeamState]:
    generator = generator_of(3)
    hidden, weight = torch.randn(2, 6, 64, generator=generator), torch.randn(1601, 64, generator=generator)
    return hidden.cuda(), weight.cuda(), wide_index().to("cuda"), moved(six_beams(), "cuda")


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_runs_on_the_current_stream(way: str, normalize: str) -> None:
    ready, weight, index, state = inputs()
    options: dict[str, Any] = {"normalize": normalize, "level": 1}
    expected = moved(rx.linear_beam_step(ready, weight, state, index, 70, **options), "cpu")
    late = torch.full_like(ready, math.nan)
    assert (rx.linear_beam_step(late, weight, state, index, 70, **options).nodes == -1).all()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        late.copy_(ready)
        got = rx.linear_beam_step(late, weight, state, index, 70, **options)
        waiting = not stream.query()
    assert waiting
    stream.synchronize()
    assert_states_equal(moved(got, "cpu"), expected)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_in_a_graph_without_synchronising(way: str, normalize: str) -> None:
    ready, weight, index, state = inputs()
    static = ready.clone()

    def step() -> rx.BeamState:
        return rx.linear_beam_step(static, weight, state, index, 70, normalize=normalize, level=1)

    step()
    with no_synchronisation():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for seed in range(3):
        static.copy_(torch.randn(static.shape, generator=generator_of(seed)))
        graph.replay()
        replayed = moved(got, "cpu")
        assert_states_equal(moved(step(), "cpu"), replayed)


def test_opcheck() -> None:
    index = rx.TrieIndex.build([[0, 1], [1, 0], [1, 1]], vocab=rx.SIDVocab([2, 2]))
    state = rx.BeamState.start(index.to("cuda"), 3)
    hidden, weight, bias = (torch.randn(shape, device="cuda") for shape in ((3, 4), (6, 4), (6,)))
    heads = (hidden, weight, bias, state.scores.view(-1), state.nodes.view(-1))
    torch.library.opcheck(torch.ops.raddpo.child_logits, (*heads, *index.to("cuda").block, 0.5, 2.0, 0, 2))
