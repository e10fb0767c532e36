"""The CUDA kernels themselves, run on the CPU by a shim (cuda_on_cpu), under several orders of threads and blocks."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import assert_equals_reference, assert_scores_close, assert_states_equal, assert_step_agrees
from support.beam_cases import (
    DTYPES,
    NORMALIZE,
    exact_logits,
    generator_of,
    state_of,
    wide_index,
    wide_reference,
)
from support.cuda_on_cpu.shim import SANITIZE, Shim, compiler
from support.strategies import Catalogue, catalogues
from torch import Tensor

import raddpo_ext as rx

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (g++, or the one named by CXX)")

ORDERS = [(0, 0), (1, 1), (2, 3), (4, 5)]  # of threads, of blocks: ascending, descending, shuffled


def assert_matches_cpu(
    shim: Shim, logits: Tensor, state: rx.BeamState, index: rx.TrieIndex, width: int, **options: Any
) -> rx.BeamState:
    """Scores to the bit, and so every tie in the same order, whatever the order of threads and blocks."""
    expected = rx.beam_step(logits, state, index, width, **options)
    for order in ORDERS:
        shim.set_order(*order)
        assert_states_equal(shim.beam_step(logits, state, index, width, **options), expected)
    return expected


@pytest.fixture
def without_clusters(shim: Shim) -> Iterator[Shim]:
    """For what the first kernel does: a cluster's blocks take time."""
    shim.set_clusters(False)
    yield shim
    shim.set_clusters(True)


@settings(max_examples=60)
@given(catalogues(), st.integers(0, 2**32), st.sampled_from(DTYPES), st.sampled_from(ORDERS), st.data())
def test_equals_reference(
    shim: Shim, catalogue: Catalogue, seed: int, dtype: torch.dtype, order: tuple[int, int], data: st.DataObject
) -> None:
    shim.set_order(*order)
    assert_equals_reference(shim.beam_step, catalogue, seed, dtype, data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("beam_width", [1, 50, 1500])
def test_many_children(shim: Shim, dtype: torch.dtype, normalize: str, beam_width: int) -> None:
    """Several slices a query, several rounds of the selection; 1500 beams are gathered in global memory."""
    index = wide_index()
    scores = -2 * torch.rand(1, 7, generator=generator_of(0))
    state = state_of(scores, torch.tensor([[1, 2, 3, 4, 5, 6, 0]]))
    logits = (3 * torch.randn(1, 7, 1603, generator=generator_of(1))).to(dtype)
    shim.set_order(2, 3)
    got = shim.beam_step(logits, state, index, beam_width, normalize=normalize)
    assert_step_agrees(got, logits, state, wide_reference(), normalize, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beam_width", [1, 70, 700, 3000, 20000])
def test_ties(shim: Shim, dtype: torch.dtype, beam_width: int) -> None:
    """Thousands of candidates with a few distinct scores, and beams of different lengths that tie across parents."""
    nodes = torch.tensor([[0, 3, 1, 2000, 3, 6, 2, 4, -1, 5], [1, 1, 2, 2, 3, 3, 4, 4, 5, 2500]])
    scores = torch.tensor([0.0, -0.5, -1.0, -0.5, 0.0]).repeat(2, 2)
    logits = exact_logits((2, 10, 1601), dtype, 0)
    assert_matches_cpu(shim, logits, state_of(scores, nodes), wide_index(), beam_width, length_penalty=1.0)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_all_candidates_tie(shim: Shim, normalize: str) -> None:
    """Only parents and tokens decide, down to the last bit of the keys."""
    state = state_of(torch.full((1, 5), -1.0), torch.tensor([[5, 2, 4, 1, 3]]))
    logits = torch.zeros(1, 5, 1600)
    expected = rx.beam_step(logits, state, wide_index(), 300, normalize=normalize)
    for order in ORDERS:
        shim.set_order(*order)
        got = shim.beam_step(logits, state, wide_index(), 300, normalize=normalize)
        assert_scores_close(got.scores, expected.scores, "beam_step")
        assert_states_equal(dataclasses.replace(got, scores=expected.scores), expected)


def test_more_beams_than_threads(shim: Shim) -> None:
    """Beams come in tiles of a block's threads; empty, finished and live ones in every tile."""
    index = wide_index()
    generator = generator_of(0)
    nodes = torch.randint(-1, index.num_nodes, (1, 1300), generator=generator)
    nodes[:, ::100] = torch.randint(0, 7, (1, 13), generator=generator)
    scores = torch.randint(-9, 0, (1, 1300), generator=generator) / 2
    logits = exact_logits((1, 1300, 1601), torch.float32, 1)
    assert_matches_cpu(shim, logits, state_of(scores, nodes), index, 400, length_penalty=0.5)


def test_hundred_thousand_children(shim: Shim) -> None:
    """One beam whose children fill many slices and whose logits are read by many blocks; 32-bit symbols."""
    index = rx.TrieIndex.build(torch.arange(100_000)[:, None])
    state = rx.BeamState.start(index, 1)
    assert_matches_cpu(shim, exact_logits((1, 1, 100_001), torch.float32, 0), state, index, 50)
    logits = torch.randn(1, 1, 100_000, generator=generator_of(1))
    logits[0, 0, -1] = 20
    got = shim.beam_step(logits, state, index, 50)
    assert got.tokens.tolist() == logits[0].topk(50).indices.tolist()
    assert got.tokens[0, 0] == 99_999
    assert_scores_close(got.scores, logits[0].double().log_softmax(1).topk(50).values, "beam_step")


def test_long_degree_sequences(shim: Shim) -> None:
    """Nodes whose place in the trie is found over many blocks of bits; the first and the last child win."""
    sids = torch.cartesian_prod(torch.arange(50), torch.arange(2500))
    index = rx.TrieIndex.build(sids, vocab=rx.SIDVocab([50, 2500], offsets=[0, 0]))
    logits = exact_logits((1, 4, 2501), torch.float32, 0)
    logits[..., [0, 2499]] = 100
    for nodes in ([1, 2, 49, 50], [0, 13, 27, 36]):
        assert_matches_cpu(shim, logits, state_of(torch.zeros(1, 4), torch.tensor([nodes])), index, 10)


def test_signed_zeros_tie(shim: Shim) -> None:
    index = wide_index()
    leaves = torch.tensor([[index.num_nodes - 2, index.num_nodes - 1]])
    state = state_of(torch.tensor([[-0.0, 0.0]]), leaves)
    assert_matches_cpu(shim, torch.zeros(1, 2, 1600), state, index, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1601, 1602, 1604, 1607])
def test_strides_and_alignment(without_clusters: Shim, dtype: torch.dtype, columns: int) -> None:
    """Rows that begin anywhere in 16 bytes, of one batch or with gaps between, and one row shared by all beams."""
    index = wide_index()
    state = state_of(-torch.arange(4.0).reshape(2, 2) / 2, torch.tensor([[1, 2], [6, 5]]))
    storage = exact_logits((3, 2, 2, columns + 9), dtype, columns)
    storage[..., columns - 1 :] = 200
    shifted = torch.cat([storage.flatten()[:3], storage.flatten()])[3:].view_as(storage)
    assert shifted.data_ptr() % 16
    views = [storage[0, ..., :columns].contiguous(), storage[0, ..., :columns], shifted[1, ..., :columns]]
    views.append(shifted.transpose(1, 2)[2, ..., :columns].transpose(0, 1))
    views.append(storage[0, :1, :1, :columns].expand(2, 2, columns))
    for logits in views:
        assert_matches_cpu(without_clusters, logits, state, index, 30)


def test_rows_that_end_beams(shim: Shim) -> None:
    """A NaN, +inf or only -inf in the row's support: none of its children is kept, finished beams stay."""
    index = wide_index()
    leaf = index.num_nodes - 1
    nodes = torch.tensor([[1, 2, 3, 4, leaf, 5]])
    logits = exact_logits((1, 6, 1601), torch.float32, 0)
    logits[0, 0, 1600] = math.nan
    logits[0, 1, 3] = math.inf
    logits[0, 2] = -math.inf
    logits[0, 4] = math.nan
    got = assert_matches_cpu(shim, logits, state_of(torch.zeros(1, 6), nodes), index, 5000)
    assert set(got.parents[got.nodes >= 0].tolist()) == {3, 4, 5}
    nothing = assert_matches_cpu(shim, torch.full((1, 6, 1601), math.nan), state_of(torch.zeros(1, 6), nodes), index, 3)
    assert nothing.nodes.tolist() == [[leaf, -1, -1]]


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_levels_beyond_the_logits(shim: Shim, normalize: str) -> None:
    """A beam whose level has a token id that the logits do not reach offers nothing, and is not read there."""
    index = wide_index()  # level 0 ends at token 5, level 1 at 1506
    leaf = index.num_nodes - 1
    state = state_of(torch.tensor([[-0.5, -1.0, -1.5, -0.25]]), torch.tensor([[1, 0, leaf, 6]]))
    for columns in (6, 9, 1506):
        logits = exact_logits((1, 4, columns), torch.float32, columns)
        shim.set_order(0, 0)
        got = shim.beam_step(logits, state, index, 4000, normalize=normalize)
        assert sorted(got.nodes[got.nodes >= 0].tolist()) == [1, 2, 3, 4, 5, 6, leaf]


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_no_beams(shim: Shim, batch: int) -> None:
    index = wide_index()
    state = state_of(torch.full((batch, 4), -math.inf), torch.full((batch, 4), -1))
    if batch:
        assert_matches_cpu(shim, exact_logits((batch, 4, 1601), torch.float32, 0), state, index, 5)
        empty = state_of(torch.zeros(batch, 0), torch.zeros(batch, 0, dtype=torch.int64))
        got = shim.beam_step(torch.zeros(batch, 0, 1601), empty, index, 5)
        assert got.nodes.tolist() == [[-1] * 5] * batch


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_order_does_not_matter(shim: Shim, normalize: str) -> None:
    """The same bits from random logits under every order of threads and blocks."""
    index = wide_index()
    state = state_of(-torch.rand(2, 6, generator=generator_of(0)), torch.tensor([[1, 2, 3, 4, 5, 6]] * 2))
    logits = torch.randn(2, 6, 1606, generator=generator_of(1))
    results = []
    for order in ORDERS:
        shim.set_order(*order)
        results.append(shim.beam_step(logits, state, index, 70, normalize=normalize))
    for one, other in pairwise(results):
        assert_states_equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [0, 1, 7, 33, 1003, 8192, 40000])
def test_row_lse(shim: Shim, dtype: torch.dtype, columns: int) -> None:
    logits = (10 * torch.randn(5, columns, generator=generator_of(columns))).to(dtype)
    if columns:
        logits[1] = -math.inf
        logits[2, columns // 2] = math.nan
        logits[3, columns - 1] = math.inf
    expected = logits.double().logsumexp(1) if columns else torch.full((5,), -math.inf, dtype=torch.float64)
    expected[expected == math.inf] = math.nan
    for order in ORDERS[:3]:
        shim.set_order(*order)
        assert_scores_close(shim.row_lse(logits), expected, "row_lse")


@given(catalogues(most_items=200), st.integers(0, 2**32))
def test_trie_lookups(shim: Shim, catalogue: Catalogue, seed: int) -> None:
    index = rx.TrieIndex.build(**catalogue.arguments())
    generator = generator_of(seed)
    nodes = torch.randint(-2, index.num_nodes + 2, (300,), generator=generator)
    trie = index.block
    for got, expected in [
        (shim.trie_paths(nodes, index), index.paths(nodes)),
        (shim.trie_ranges(nodes, index, items=True), index.item_ranges(nodes)),
        (shim.trie_top_items(nodes[None], index, 40), index.top_items(nodes[None], 40)),
        (shim.trie_ranges(nodes, index, items=False), torch.ops.raddpo.trie_children(nodes, *trie)),
    ]:
        assert got[0].tolist() == expected[0].tolist()
        assert got[1].tolist() == expected[1].tolist()
    tokens = torch.randint(-1, catalogue.columns, (200, index.levels + 1), generator=generator)
    tokens[:100, : len(catalogue.tokens()[0])] = torch.tensor(catalogue.tokens()[0])
    assert shim.trie_walk(tokens, index).tolist() == torch.ops.raddpo.trie_walk(tokens, *trie).tolist()


def test_shim_tells_faults(shim: Shim) -> None:
    """A missing barrier changes the result under some order; one that not all threads reach is an error."""
    values = torch.arange(64, dtype=torch.int32)

    def results(kind: str, values: Tensor) -> list[bool]:
        right = []
        for order in range(4):
            shim.set_order(order, 0)
            right.append(torch.equal(shim.fault(kind, values), values.flip(0)))
        return right

    assert results("none", values) == [True] * 4
    assert not all(results("missing_barrier", values))
    assert results("early_exit", values) == [True] * 4
    for kind, bad in (("divergent_barrier", values), ("early_exit", values - 1), ("divergent_shuffle", values)):
        with pytest.raises(RuntimeError, match="barrier not reached by every thread"):
            shim.fault(kind, bad)


def test_shim_tells_what_an_early_launch_must_not_do(shim: Shim) -> None:
    """Neither read what the launch before writes until it waits for that one, nor end without having waited."""
    values = torch.arange(64, dtype=torch.int32)
    shim.set_order(0, 0)
    assert torch.equal(shim.fault("early", values), 2 * values + 1)
    assert shim.fault("too_early", values)[0] == 778  # the first thread to wait runs the launch before
    with pytest.raises(RuntimeError, match="has not waited for the one before"):
        shim.fault("never_waiting", values)


@pytest.mark.skipif(SANITIZE in os.environ, reason="this is the sanitized run")
def test_sanitized() -> None:
    """The same kernels under AddressSanitizer and UndefinedBehaviorSanitizer, every buffer of its exact size."""
    program = compiler()
    assert program is not None
    runtime = subprocess.run([program, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"{program} has no AddressSanitizer library")
    environment = {
        **os.environ,
        SANITIZE: "1",
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0",
        "PYTHONMALLOC": "malloc",
    }
    tests = "beyond_the_logits or 1607 or end_beams or hundred or no_beams or row_lse or (ties and 3000) or bounds"
    tests += " or malformed or more_sessions or (order and detach)"
    files = [str(path) for path in Path(__file__).parents[1].rglob("test_*cuda*.py")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-q", "-x", "-p", "no:cacheprovider", "-k", tests],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]
