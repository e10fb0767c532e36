"""sample_step's CUDA kernels, run on the CPU by a shim (cuda_on_cpu), under several orders of threads and blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import assert_scores_close
from support.beam_cases import DTYPES, generator_of, wide_index, wide_reference
from support.cuda_on_cpu.shim import Shim
from support.sample_cases import (
    assert_sample_states_equal,
    assert_sample_step_agrees,
    random_sample_state,
    sample_state,
    step,
)
from support.strategies import Catalogue, catalogues

import raddpo_ext as rx
from raddpo_ext import reference

ORDERS = [(0, 0), (1, 1), (2, 3), (4, 5)]  # of threads, of blocks: ascending, descending, shuffled


@settings(max_examples=40)
@given(catalogues(), st.integers(0, 2**63 - 1), st.sampled_from(DTYPES), st.sampled_from(ORDERS), st.data())
def test_equals_reference(
    shim: Shim, catalogue: Catalogue, seed: int, dtype: torch.dtype, order: tuple[int, int], data: st.DataObject
) -> None:
    shim.set_order(*order)
    index = rx.TrieIndex.build(**catalogue.arguments())
    batch, width = data.draw(st.sampled_from([(1, 1), (1, 7), (3, 4)]))
    state = random_sample_state(index, batch, width, generator_of(seed))
    logits = (3 * torch.randn(batch, width, catalogue.columns, generator=generator_of(seed))).to(dtype)
    hidden = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    logits[torch.rand(logits.shape, generator=generator_of(seed)) < hidden] = -math.inf
    keys = torch.randint(-(2**62), 2**62, (batch,), generator=generator_of(seed))
    options = {"seed": seed, "keys": keys, "temperature": data.draw(st.sampled_from([1.0, 0.5, 2.0]))}
    got = shim.sample_step(logits, state, index, data.draw(st.sampled_from([1, 2, 10, 1000])), **options)
    plain = reference.TrieIndex.build(**catalogue.arguments())
    assert_sample_step_agrees(got, logits, state, plain, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beam_width", [1, 50, 1500])
def test_many_children(shim: Shim, dtype: torch.dtype, beam_width: int) -> None:
    """Several slices per query and rounds of a beam's readers; under every order the same bits, and those of a root."""
    index = wide_index()
    scores = -2 * torch.rand(1, 7, generator=generator_of(0))
    perturbed = (scores + 1).index_fill(1, torch.tensor([6]), math.inf)  # the last beam is the root
    state = sample_state(scores, torch.tensor([[1, 2, 3, 4, 5, 6, 0]]), perturbed)
    logits = (3 * torch.randn(1, 7, 1603, generator=generator_of(1))).to(dtype)
    options = {"seed": 3, "keys": torch.tensor([5]), "temperature": 0.7}
    found = []
    for order in ORDERS:
        shim.set_order(*order)
        found.append(shim.sample_step(logits, state, index, beam_width, **options))
        assert_sample_states_equal(found[-1], found[0])
    assert_sample_step_agrees(found[0], logits, state, wide_reference(), **options)


def test_the_best_child_has_its_parents_perturbed_score(shim: Shim) -> None:
    """To the bit, of every beam; and what the CPU draws, from a filtered index too."""
    index = wide_index()
    scores = -2 * torch.rand(3, 6, generator=generator_of(0))
    state = sample_state(scores, torch.arange(1, 7).expand(3, 6).contiguous(), scores + 0.5)
    logits = 3 * torch.randn(3, 6, 1603, generator=generator_of(1))
    options = {"seed": 9, "keys": torch.tensor([5, -7, 2**40]), "temperature": 1.0}
    for searched in (index, index.restrict(torch.rand(6000, generator=generator_of(2)) < 0.1)):
        got = shim.sample_step(logits, state, searched, 9000, **options)
        live = got.nodes >= 0
        assert (got.perturbed <= state.perturbed.gather(1, got.parents))[live].all()
        for query in range(3):
            for beam in range(6):
                best = got.perturbed[query][live[query] & (got.parents[query] == beam)].max()
                assert float(best) == float(state.perturbed[query, beam])
        expected = step(logits, state, searched, 9000, False, **options)
        assert got.nodes[:, :20].tolist() == expected.nodes[:, :20].tolist()
        assert_scores_close(got.perturbed, expected.perturbed, "sample_step")
        narrow = shim.sample_step(logits, state, searched, 17, **options)
        assert_sample_states_equal(narrow, rx.SampleState(*(part[:, :17] for part in vars(got).values())))


def test_hopeless_rows_and_states(shim: Shim) -> None:
    index = rx.TrieIndex.build([[0], [1]])
    nodes = torch.tensor([[0, 0, 0, -1, 99, -(2**40), 0, 0]])
    scores = torch.tensor([[0.0, -math.inf, math.nan, 0.0, 0.0, 0.0, 0.0, 0.0]])
    perturbed = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0]])
    logits = torch.zeros(1, 8, 2)
    logits[0, 0] = -math.inf
    logits[0, 7, 0] = math.nan
    options = {"seed": 0, "keys": torch.zeros(1, dtype=torch.int64)}
    got = shim.sample_step(logits, sample_state(scores, nodes, perturbed), index, 2, **options)
    assert got.nodes.tolist() == [[-1, -1]]
    assert got.perturbed.tolist() == got.scores.tolist() == [[-math.inf] * 2]
    assert got.logps.tolist() == [[0, 0]]
