"""How beam_step's second CUDA kernel divides its work: blocks, clusters, and buffers in shared or global memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from support.agreement import assert_states_equal
from support.beam_cases import exact_logits, generator_of, state_of
from support.cuda_on_cpu.shim import Shim, compiler
from torch import Tensor

import raddpo_ext as rx

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (g++, or the one named by CXX)")

#: Whether blocks come in clusters, and the KiB of shared memory that a block may have; "least" is a GPU that allows no
#: more than what needs no asking.
DEVICES = {"sm_90": (True, 227), "sm_80": (False, 163), "least": (False, 48)}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, shim: Shim) -> Iterator[Shim]:
    clusters, shared = DEVICES[request.param]
    shim.set_clusters(clusters)
    shim.set_shared(shared << 10)
    yield shim
    shim.set_clusters(True)
    shim.set_shared(227 << 10)


@cache
def ragged_index() -> rx.TrieIndex:
    """5000 first codes with 0 to 16 second ones each, whose tokens are the columns 0 to 15."""
    rng = np.random.default_rng(0)
    first = (5000 * rng.random(20_000) ** 2).astype(np.int64)
    tokens = [list(range(17, 5017)), list(range(16))]
    vocab = rx.SIDVocab([5000, 16], token_ids=tokens, eos=16)
    return rx.TrieIndex.build(np.stack([first, rng.integers(0, 16, 20_000)], 1), vocab=vocab)


def some_beams(batch: int, width: int, empty: float = 0.1) -> rx.BeamState:
    """Of ragged_index: first codes, whole SIDs and empty slots."""
    index, generator = ragged_index(), generator_of(width)
    nodes = torch.randint(1, 5000, (batch, width), generator=generator)
    leaves = torch.randint(index.num_nodes - 5000, index.num_nodes, (batch, width), generator=generator)
    kind = torch.rand(batch, width, generator=generator)
    nodes = torch.where(kind < 0.05, leaves, torch.where(kind > 1 - empty, -1, nodes))
    return state_of(torch.randint(-9, 1, (batch, width), generator=generator) / 2, nodes)


def assert_equals_cpu(
    shim: Shim, logits: Tensor, state: rx.BeamState, index: rx.TrieIndex, width: int, penalty: float = 0.0
) -> None:
    """Under one order of threads and blocks: test_cuda_on_cpu.py tries them all."""
    expected = rx.beam_step(logits, state, index, width, length_penalty=penalty)
    shim.set_order(2, 3)
    assert_states_equal(shim.beam_step(logits, state, index, width, length_penalty=penalty), expected)


def test_4096_beams(shim: Shim) -> None:
    logits = exact_logits((1, 4096, 18), torch.float32, 0)
    assert_equals_cpu(shim, logits, some_beams(1, 4096), ragged_index(), 4096)


@pytest.mark.parametrize(
    ("batch", "beams", "beam_width"),
    [
        (2, 600, 1400),  # more keys than a block keeps without asking for shared memory
        (1, 1100, 100),  # without it, three tiles of beams
        (1, 600, 3000),  # fewer candidates than are asked for
        (1, 300, 513),  # a cluster, for one key more than a block has threads
    ],
)
def test_wide_beams(device: Shim, batch: int, beams: int, beam_width: int) -> None:
    logits = exact_logits((batch, beams, 18), torch.float32, beams)
    assert_equals_cpu(device, logits, some_beams(batch, beams), ragged_index(), beam_width, 0.5)


@pytest.mark.parametrize("beam_width", [60, 4096])
def test_many_slices(device: Shim, beam_width: int) -> None:
    """More candidates than one cluster gathers, most of them of equal scores; many of them are among the best."""
    index = rx.TrieIndex.build(torch.arange(100_000)[:, None])
    logits = exact_logits((1, 1, 100_001), torch.float32, 0)
    assert_equals_cpu(device, logits, rx.BeamState.start(index, 1), index, beam_width)


def test_scores_in_clumps(device: Shim) -> None:
    """One score far above and one far below two clumps of scores that differ in their last bits only."""
    index = rx.TrieIndex.build(torch.arange(9000)[:, None])
    logits = -20 + 2.0**-20 * torch.randint(0, 9, (1, 1, 9001), generator=generator_of(0))
    logits[..., ::2] -= 7
    logits[..., [4000, 5000]] = torch.tensor([-1.0, -3e38])
    logits[..., -1] = 200
    for beam_width in (7, 5000):
        assert_equals_cpu(device, logits, rx.BeamState.start(index, 1), index, beam_width)


def test_none_of_many_candidates_counts(device: Shim) -> None:
    index = rx.TrieIndex.build(torch.arange(9000)[:, None])
    device.set_order(0, 0)
    got = device.beam_step(torch.full((1, 1, 9000), torch.nan), rx.BeamState.start(index, 1), index, 3)
    assert got.nodes.tolist() == [[-1] * 3]
