"""What the operators compute on a CUDA device, against the CPU and the float64 reference. Skipped without a device."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import (
    ToyModel,
    assert_equals_reference,
    assert_scores_close,
    assert_states_equal,
    assert_step_agrees,
)
from support.beam_cases import (
    DTYPES,
    NORMALIZE,
    exact_logits,
    generator_of,
    six_beams,
    state_of,
    wide_index,
    wide_reference,
)
from support.logit_cases import DTYPES as LOGIT_TYPES
from support.logit_cases import (
    MAPS,
    SUPPORTS,
    Call,
    assert_backward_close,
    assert_forward_close,
    assert_kept,
    random_call,
    random_grad,
    strided,
)
from support.on_gpu import NEEDS_GPU, REPEATS, moved
from support.strategies import Catalogue, catalogues
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext.decoding.row_lse import row_lse

pytestmark = NEEDS_GPU


@st.composite
def indexed(draw: st.DrawFn, **options: int) -> tuple[Catalogue, rx.TrieIndex]:
    """A catalogue and the index of its items, of every second one or of one."""
    catalogue = draw(catalogues(**options))
    index = rx.TrieIndex.build(**catalogue.arguments())
    step = draw(st.sampled_from([1, 2, index.num_items]))
    return catalogue, index if step == 1 else index.restrict(index.items[::step])


def on_gpu(logits: Tensor, state: rx.BeamState, index: rx.TrieIndex, width: int, **options: object) -> rx.BeamState:
    """beam_step on the GPU, its arguments and result on the CPU."""
    got = rx.beam_step(logits.cuda(), moved(state, "cuda"), index.to("cuda"), width, **options)
    return moved(got, "cpu")


def assert_matches_cpu(logits: Tensor, state: rx.BeamState, index: rx.TrieIndex, width: int, **options: object) -> None:
    """For logits whose log-probs are exact, or tie exactly: the same order, scores up to rounding."""
    expected = rx.beam_step(logits, state, index, width, **options)
    got = on_gpu(logits, state, index, width, **options)
    assert_scores_close(got.scores, expected.scores, "beam_step")
    assert_states_equal(dataclasses.replace(got, scores=expected.scores), expected)


@settings(max_examples=2 * REPEATS)
@given(catalogues(), st.integers(0, 2**32), st.sampled_from(DTYPES), st.data())
def test_equals_reference(catalogue: Catalogue, seed: int, dtype: torch.dtype, data: st.DataObject) -> None:
    assert_equals_reference(on_gpu, catalogue, seed, dtype, data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("beam_width", [1, 50, 1500])
def test_many_children(dtype: torch.dtype, normalize: str, beam_width: int) -> None:
    index = wide_index()
    scores = -2 * torch.rand(1, 7, generator=generator_of(0))
    state = state_of(scores, torch.tensor([[1, 2, 3, 4, 5, 6, 0]]))
    logits = (3 * torch.randn(1, 7, 1603, generator=generator_of(1))).to(dtype)
    got = on_gpu(logits, state, index, beam_width, normalize=normalize)
    assert_step_agrees(got, logits, state, wide_reference(), normalize, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beam_width", [1, 70, 700, 3000, 20000])
def test_ties(dtype: torch.dtype, beam_width: int) -> None:
    nodes = torch.tensor([[0, 3, 1, 2000, 3, 6, 2, 4, -1, 5], [1, 1, 2, 2, 3, 3, 4, 4, 5, 2500]])
    scores = torch.tensor([0.0, -0.5, -1.0, -0.5, 0.0]).repeat(2, 2)
    logits = exact_logits((2, 10, 1601), dtype, 0)
    assert_matches_cpu(logits, state_of(scores, nodes), wide_index(), beam_width, length_penalty=1.0)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_all_candidates_tie(normalize: str) -> None:
    state = state_of(torch.full((1, 5), -1.0), torch.tensor([[5, 2, 4, 1, 3]]))
    assert_matches_cpu(torch.zeros(1, 5, 1600), state, wide_index(), 300, normalize=normalize)


def test_many_beams() -> None:
    index = wide_index()
    nodes = torch.randint(-1, index.num_nodes, (3, 3000), generator=generator_of(0))
    nodes[:, ::10] = torch.randint(0, 7, (3, 300), generator=generator_of(1))
    scores = torch.randint(-9, 0, (3, 3000), generator=generator_of(2)) / 2
    logits = exact_logits((3, 3000, 1601), torch.bfloat16, 3)
    assert_matches_cpu(logits, state_of(scores, nodes), index, 3000, length_penalty=0.5)


def test_hundred_thousand_children() -> None:
    index = rx.TrieIndex.build(torch.arange(100_000)[:, None])
    state = rx.BeamState.start(index, 2)
    for width in (1, 50, 5000, 200_000):
        assert_matches_cpu(exact_logits((2, 1, 100_001), torch.float32, 0), state, index, width)
    repeated = state_of(torch.zeros(1, 100), torch.zeros(1, 100, dtype=torch.int64))  # ten million candidates
    assert_matches_cpu(exact_logits((1, 100, 100_001), torch.bfloat16, 0), repeated, index, 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1601, 1604, 1607])
def test_strides_and_alignment(dtype: torch.dtype, columns: int) -> None:
    index, state = wide_index(), six_beams()
    storage = exact_logits((3, 2, 6, columns + 9), dtype, columns)
    storage[..., columns - 1 :] = 200
    on_device = storage.cuda()
    shifted = torch.cat([on_device.flatten()[:3], on_device.flatten()])[3:].view_as(on_device)
    views = [on_device[0, ..., :columns], shifted[1, ..., :columns]]
    views.append(shifted.transpose(1, 2)[2, ..., :columns].transpose(0, 1))
    views.append(on_device[0, :1, :1, :columns].expand(2, 6, columns))
    for logits in views:
        got = rx.beam_step(logits, moved(state, "cuda"), index.to("cuda"), 30)
        assert_states_equal(moved(got, "cpu"), rx.beam_step(logits.cpu(), state, index, 30))


def test_rows_that_end_beams() -> None:
    index = wide_index()
    nodes = torch.tensor([[1, 2, 3, 4, index.num_nodes - 1, 5]])
    logits = exact_logits((1, 6, 1601), torch.float32, 0)
    logits[0, 0, 1600] = math.nan
    logits[0, 1, 3] = math.inf
    logits[0, 2] = -math.inf
    logits[0, 4] = math.nan
    assert_matches_cpu(logits, state_of(torch.zeros(1, 6), nodes), index, 5000)
    assert_matches_cpu(torch.full((1, 6, 1601), math.nan), state_of(torch.zeros(1, 6), nodes), index, 3)
    assert_matches_cpu(logits, state_of(torch.full((1, 6), -math.inf), nodes), index, 3)
    with pytest.raises(ValueError, match="NaN"):
        on_gpu(logits, state_of(torch.zeros(1, 6), nodes), index, 3, check=True)


def test_empty_batch() -> None:
    state = state_of(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64))
    assert on_gpu(torch.zeros(0, 4, 1601), state, wide_index(), 5).nodes.shape == (0, 5)


@settings(max_examples=30)
@given(indexed(), st.integers(0, 2**32), st.sampled_from([0.0, 1.0]), st.sampled_from([None, 1, 7]))
def test_search(indexed: tuple[Catalogue, rx.TrieIndex], seed: int, penalty: float, top_k: int | None) -> None:
    catalogue, index = indexed
    results = []
    for device in ("cpu", "cuda"):
        model = ToyModel(exact_logits((index.levels, 2, 17, catalogue.columns + 1), torch.float32, seed))

        def step(tokens: Tensor, parents: Tensor, level: int, model: ToyModel = model, device: str = device) -> Tensor:
            return model(tokens.cpu(), parents.cpu(), level).to(device)

        options = {"length_penalty": penalty, "top_k": top_k, "return_token_logps": True}
        results.append(rx.beam_search(step, index.to(device), batch_size=2, beam_width=20, **options))
    for expected, got in zip(*results, strict=True):
        assert got.device.type == "cuda"
        assert got.cpu().tolist() == expected.tolist()


def children_of(index: rx.TrieIndex, nodes: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.raddpo.trie_children(nodes, *index.block)


@given(indexed(most_items=300), st.integers(0, 2**32))
def test_trie_lookups(indexed: tuple[Catalogue, rx.TrieIndex], seed: int) -> None:
    catalogue, index = indexed
    on_device = index.to("cuda")
    nodes = torch.randint(-2, index.node_bound + 2, (300,), generator=generator_of(seed))
    for method in (rx.TrieIndex.paths, rx.TrieIndex.item_ranges, children_of):
        for got, expected in zip(method(on_device, nodes.cuda()), method(index, nodes), strict=True):
            assert got.tolist() == expected.tolist()
    for got, expected in zip(
        on_device.top_items(nodes.view(2, 150).cuda(), 40), index.top_items(nodes.view(2, 150), 40), strict=True
    ):
        assert got.tolist() == expected.tolist()
    tokens = torch.randint(-1, catalogue.columns, (200, index.levels + 1), generator=generator_of(seed))
    tokens[:100, : len(catalogue.tokens()[0])] = torch.tensor(catalogue.tokens()[0])
    assert on_device.nodes(tokens).tolist() == index.nodes(tokens).tolist()
    expected = index.contains(catalogue.sids, catalogue.lengths)
    assert on_device.contains(catalogue.sids, catalogue.lengths).tolist() == expected.tolist()
    assert on_device.items.tolist() == index.items.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 33, 1003, 8192, 40000, 152_704])
def test_row_lse(dtype: torch.dtype, columns: int) -> None:
    logits = (10 * torch.randn(7, columns, generator=generator_of(columns))).to(dtype)
    logits[1] = -math.inf
    logits[2, columns // 2] = math.nan
    logits[3, columns - 1] = math.inf
    expected = logits.double().logsumexp(1)
    expected[expected == math.inf] = math.nan
    assert_scores_close(row_lse(logits.cuda()).cpu(), expected, "row_lse")


def assert_token_logps_close(call: Call, seed: int) -> None:
    """Forward, backward and backward in place, the logits at the strides that they have on the CPU."""
    shape, gap, shift = call.logits.shape, call.logits.stride(-2) - call.logits.shape[-1], call.logits.storage_offset()
    on_device = call.to("cuda")._replace(logits=strided(call.logits.cuda(), shift, gap))
    logps, lse = torch.ops.raddpo.token_logps(*on_device)
    assert_forward_close((logps, lse), call)
    grad = random_grad(call, seed)
    fresh = torch.ops.raddpo.token_logps_backward(*on_device.backward(grad.cuda(), lse))
    assert fresh.shape == shape
    assert_backward_close(fresh, call, grad, lse.cpu())
    arguments = on_device.backward(grad.cuda(), lse)
    torch.ops.raddpo.token_logps_backward_(*arguments[:7], None, *arguments[7:])
    torch.testing.assert_close(on_device.logits, fresh, rtol=0, atol=0, equal_nan=True)
    assert_kept(on_device.logits)


@settings(max_examples=2 * REPEATS)
@given(
    st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 3), st.integers(1, 3))),
    st.one_of(st.integers(1, 40), st.integers(1, 3000)),
    st.sampled_from(LOGIT_TYPES),
    st.sampled_from(SUPPORTS),
    st.sampled_from(MAPS),
    st.integers(0, 2**32),
    st.integers(0, 8),
    st.integers(0, 8),
)
def test_token_logps(
    rows: int | tuple[int, int],
    cols: int,
    dtype: torch.dtype,
    support: str,
    map_: tuple[float, float],
    seed: int,
    shift: int,
    gap: int,
) -> None:
    assert_token_logps_close(random_call(rows, cols, dtype, support, map_, seed, shift, gap), seed)


@pytest.mark.parametrize("dtype", LOGIT_TYPES)
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize(("rows", "cols"), [(5, 8193), (3, 40_003), (64, 151_936), (700, 16_390)])
def test_token_logps_long_rows(dtype: torch.dtype, support: str, rows: int, cols: int) -> None:
    """Clusters of 2 to 8 blocks forward; pieces of one and of several rounds backward."""
    assert_token_logps_close(random_call(rows, cols, dtype, support, MAPS[0], rows, 1), cols)


def test_token_logps_special_rows() -> None:
    """NaN, +inf, only -inf and huge logits, as on the CPU."""
    logits = torch.randn(6, 20_000, generator=generator_of(0))
    logits[0], logits[1, 7], logits[2, 9], logits[3, 1], logits[4, 0] = -math.inf, math.nan, math.inf, -math.inf, 1e30
    targets = torch.tensor([1, 1, 1, 1, 0, 1])
    for map_ in MAPS[:1] + MAPS[2:]:
        call = Call(logits, targets, None, None, None, *map_, -100, 0, 20_000)
        got = torch.ops.raddpo.token_logps(*call.to("cuda"))
        for one, other in zip(got, torch.ops.raddpo.token_logps(*call), strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-6, atol=4e-6, equal_nan=True)
    call = Call(logits, targets, None, None, None, 1 / 0.7, 0.0, -100, 0, 20_000)
    logps, lse = torch.ops.raddpo.token_logps(*call.to("cuda"))
    assert logps[4] == 0
    grad = torch.ones(6, device="cuda")
    assert torch.ops.raddpo.token_logps_backward(*call.to("cuda").backward(grad, lse))[4].isfinite().all()


def test_token_logps_malformed_lists() -> None:
    """Columns beyond the logits count as an empty support; nothing faults."""
    columns = torch.tensor([-1, 0, 1, 2, 5, 7, 8, 9, 50, 2**31 - 1]).int()
    begin, count = torch.tensor([0, 0, 6, 3, 9, 2, 1]), torch.tensor([3, 5, 3, 7, 1, 0, -2])
    call = Call(torch.randn(7, 9), torch.tensor([1, 1, 8, 5, 5, 1, 1]), columns, begin, count, 1.0, 0.0, -100, 0, 9)
    logps, lse = torch.ops.raddpo.token_logps(*call.to("cuda"))
    assert logps.tolist() == [-math.inf] * 7
    grad = torch.ones(7, device="cuda")
    assert (torch.ops.raddpo.token_logps_backward(*call.to("cuda").backward(grad, lse)) == 0).all()


def test_token_logps_beyond_int32() -> None:
    """More than 2^31 logits, the last rows as the first."""
    few = random_call(8, 151_936, torch.bfloat16, "vocab", MAPS[0], 1)
    times = 1800
    if torch.cuda.mem_get_info()[0] < 3 * times * few.logits.nbytes:
        pytest.skip("too little memory")
    call = few.to("cuda")
    call = call._replace(logits=call.logits.contiguous().repeat(times, 1), targets=call.targets.repeat(times))
    logps, lse = torch.ops.raddpo.token_logps(*call)
    assert_forward_close((logps[-8:], lse[-8:]), few)
    assert torch.equal(logps[:8], logps[-8:])
    grad = random_grad(few, 0)
    fresh = torch.ops.raddpo.token_logps_backward(*call.backward(grad.cuda().repeat(times), lse))
    assert_backward_close(fresh[-8:], few, grad, lse[-8:].cpu())
    assert torch.equal(fresh[:8], fresh[-8:])
