"""token_logps' CUDA kernels on the CPU, see test_cuda_on_cpu.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.beam_cases import generator_of
from support.cuda_on_cpu.shim import Shim, token_logps_sizes
from support.logit_cases import (
    DTYPES,
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
from torch import Tensor

ORDERS = [(0, 0), (1, 1), (2, 3), (4, 5)]  # of threads, of blocks: ascending, descending, shuffled


@pytest.fixture(autouse=True)
def with_clusters(shim: Shim) -> Iterator[None]:
    yield
    shim.set_clusters(True)


def backward(shim: Shim, call: Call, grad: Tensor, lse: Tensor, shift: int = 0, gap: int = 0) -> Tensor:
    """In storage of its own, ``shift`` elements off a multiple of 16 bytes, and in place: the same bits."""
    fresh = strided(torch.full(call.logits.shape, 777.0, dtype=call.logits.dtype), shift, gap)
    shim.token_logps_backward(*call.backward(grad, lse), out=fresh)
    assert_kept(fresh)
    offset = call.logits.storage_offset()
    inplace = strided(call.logits, offset, call.logits.stride(-2) - call.logits.shape[-1])
    shim.token_logps_backward(*call._replace(logits=inplace).backward(grad, lse), out=inplace)
    assert_kept(inplace)
    torch.testing.assert_close(inplace, fresh, rtol=0, atol=0, equal_nan=True)
    return fresh


def check(shim: Shim, call: Call, seed: int, shift: int = 0, gap: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    logps, lse = shim.token_logps(*call)
    assert_forward_close((logps, lse), call)
    grad = random_grad(call, seed)
    grad_logits = backward(shim, call, grad, lse, shift, gap)
    assert_backward_close(grad_logits, call, grad, lse)
    return logps, lse, grad_logits


@settings(max_examples=150)
@given(
    st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 3), st.integers(1, 3))),
    st.one_of(st.integers(1, 40), st.integers(1, 3000)),
    st.sampled_from(DTYPES),
    st.sampled_from(SUPPORTS),
    st.sampled_from(MAPS),
    st.integers(0, 2**32),
    st.tuples(*[st.integers(0, 8)] * 4),
    st.sampled_from(ORDERS),
)
def test_equals_cpu(
    shim: Shim,
    rows: int | tuple[int, int],
    cols: int,
    dtype: torch.dtype,
    support: str,
    map_: tuple[float, float],
    seed: int,
    places: tuple[int, int, int, int],
    order: tuple[int, int],
) -> None:
    """Any support, strides and alignment of logits and gradient."""
    shim.set_order(*order)
    check(shim, random_call(rows, cols, dtype, support, map_, seed, *places[:2]), seed, *places[2:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("support", SUPPORTS)
def test_long_rows(shim: Shim, dtype: torch.dtype, support: str) -> None:
    """Rows that several blocks read and write, under any order of threads and blocks the same bits."""
    call = random_call(4, 40_003, dtype, support, MAPS[0], 1, 3, 2)
    call.logits[0, 40_002], call.targets[0] = 11, 40_002 + call.first_column
    results = []
    for order in ORDERS[:3]:
        shim.set_order(*order)
        results.append(check(shim, call, 1, 1, 0))
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cols", [8191, 8192, 8193, 16_385, 33_000, 70_001])
def test_bounds_of_clusters(shim: Shim, cols: int) -> None:
    """Rows that fill 1, 2, 4 and 8 blocks, or just do not, beside one block a row."""
    shim.set_order(4, 5)
    call = random_call(2, cols, torch.float32, "vocab", MAPS[0], cols, 1)
    call.targets[:] = torch.tensor([0, cols - 1])
    call.logits[:, [0, cols - 1]] = 1.0
    together = shim.token_logps(*call)
    assert_forward_close(together, call)
    shim.set_clusters(False)
    assert_forward_close(shim.token_logps(*call), call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("support", ["vocab", "runs", "lists"])
def test_many_rows(shim: Shim, dtype: torch.dtype, support: str) -> None:
    """So many rows that a block writes several rounds of one."""
    cols = 20_500 // dtype.itemsize
    few = random_call(10, cols, dtype, support, MAPS[0], 3)
    times = 210
    grad = torch.zeros(10 * times)
    grad[-10:] = random_grad(few, 3)
    call = few._replace(
        logits=few.logits.repeat(times, 1),
        targets=few.targets.repeat(times),
        begin=None if few.begin is None else few.begin.repeat(times),
        count=None if few.count is None else few.count.repeat(times),
    )
    shim.set_order(2, 3)
    lse = torch.zeros(10 * times, dtype=torch.float64)
    lse[-10:] = shim.token_logps(*few)[1]
    shim.token_logps_backward(*call.backward(grad, lse), out=call.logits)
    assert (call.logits[:-10] == 0).all()
    assert_backward_close(call.logits[-10:], few, grad[-10:], lse[-10:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1, 5, 8, 9, 64, 1030])
@pytest.mark.parametrize("support", ["vocab", "lists"])
def test_bounds(shim: Shim, dtype: torch.dtype, cols: int, support: str) -> None:
    """Contiguous rows that begin anywhere in 16 bytes; each buffer ends where its last row does."""
    shim.set_order(0, 0)
    call = random_call(9, cols, dtype, support, MAPS[0], cols)
    call = call._replace(logits=call.logits.contiguous().clone())
    logps, lse = shim.token_logps(*call)
    assert_forward_close((logps, lse), call)
    grad, out = random_grad(call, 0), torch.full_like(call.logits, 777.0)
    shim.token_logps_backward(*call.backward(grad, lse), out=out)
    assert_backward_close(out, call, grad, lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [3, 70, 20_000])
@pytest.mark.parametrize("map_", MAPS)
def test_special_values(shim: Shim, dtype: torch.dtype, cols: int, map_: tuple[float, float]) -> None:
    """NaN, infinities and rows of -inf, in the target or beside it, as on the CPU."""
    logits = torch.randn(9, cols, generator=generator_of(0)).to(dtype)
    logits[0] = -math.inf
    logits[1] = math.nan
    logits[2, cols // 2] = math.nan
    logits[3, cols - 1] = math.inf
    logits[4, 0] = math.inf
    logits[5, 1] = -math.inf
    logits[6] = 1000
    logits[7, 0] = torch.finfo(dtype).min
    logits[8, 1] = torch.finfo(dtype).max if dtype == torch.float16 else 1e30
    targets = torch.tensor([1, 1, 1, 1, 0, 1, 2, 1, 1])
    call = Call(logits, targets, None, None, None, *map_, -100, 0, cols)
    grad = torch.ones(9, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    shim.set_order(1, 1)
    logps, lse = shim.token_logps(*call)
    expected = torch.ops.raddpo.token_logps(*call)
    for got, other in zip((logps, lse), expected, strict=True):
        torch.testing.assert_close(got[:8], other[:8], rtol=1e-6, atol=4e-6, equal_nan=True)
    if map_[1] == 0:
        assert logps[8] == 0
    assert logps[8].isfinite()
    assert lse[8].isfinite()
    got = torch.full_like(logits, 777.0)
    shim.token_logps_backward(*call.backward(grad, lse), out=got)
    assert got[8].isfinite().all()
    got = got[:8]
    other = torch.ops.raddpo.token_logps_backward(*call.backward(grad, lse))[:8]
    rtol = 2 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-4
    torch.testing.assert_close(got, other, rtol=rtol, atol=1e-6, equal_nan=True)


def test_target_elsewhere(shim: Shim) -> None:
    """A target among the columns of the wider row has no log-prob here, even beside NaN."""
    logits = torch.zeros(2, 4)
    logits[1, 2] = math.nan
    call = Call(logits, torch.tensor([1, 9]), None, None, None, 1.0, 0.0, -100, 4, 10)
    logps, lse = shim.token_logps(*call)
    assert logps.tolist() == [-math.inf] * 2
    assert lse[0] == torch.tensor(4.0).log()
    assert lse[1].isnan()


def test_outside_the_support_is_not_used(shim: Shim) -> None:
    """NaN in columns outside a list or run leaves no trace."""
    for support in ("runs", "lists"):
        call = random_call(12, 300, torch.float32, support, MAPS[0], 7)
        assert call.columns is not None
        assert call.begin is not None
        assert call.count is not None
        for row in range(12):
            inside = call.columns[call.begin[row] : call.begin[row] + call.count[row]].long()
            values = call.logits[row, inside]
            call.logits[row] = math.nan
            call.logits[row, inside] = values
        shim.set_order(2, 0)
        assert not any(part.isnan().any() for part in check(shim, call, 0))


@pytest.mark.parametrize("support", ["vocab", "lists"])
def test_rows_without_gradient_are_not_read(shim: Shim, support: str) -> None:
    """Ignored rows, rows outside their support and, backward, rows with g = 0 lie where there is no memory."""
    call = random_call(4, 100, torch.float32, "lists", MAPS[0], 0)
    call = call._replace(columns=torch.arange(0, 100, 3).int(), begin=torch.zeros(4).long(), count=torch.full((4,), 34))
    call.targets[:] = torch.tensor([3, -100, 100, 4 if support == "lists" else -100])
    if support == "vocab":
        call = call._replace(columns=None, begin=None, count=None)
    logps, lse = (torch.full((4,), 777.0, dtype=dtype) for dtype in (torch.float32, torch.float64))
    sizes = token_logps_sizes(call.logits, call.logits, call[-3:])
    sizes[5] = 1 << 40  # from row to row of the logits
    supports = call[1:7]
    shim.call("token_logps", sizes, call.logits, *supports, logps, lse, None, None)
    first = call._replace(logits=call.logits[:1], targets=call.targets[:1])
    if support == "lists":
        first = first._replace(begin=torch.tensor([0]), count=torch.tensor([34]))
    assert_forward_close((logps[:1], lse[:1]), first)
    assert logps[1:].tolist() == [0.0, -math.inf, -math.inf if support == "lists" else 0.0]
    assert lse[1:].tolist() == [0.0] * 3
    out = torch.full((4, 100), 777.0)
    call.targets[3] = 6
    grad = torch.tensor([1.0, 1.0, 1.0, 0.0])
    shim.call("token_logps", sizes, call.logits, *supports, None, lse, grad, out)
    assert_backward_close(out[:1], first, grad[:1], lse[:1])
    assert (out[1:] == 0).all()


def test_lists_that_leave_the_logits_bounds(shim: Shim) -> None:
    """They count as empty supports."""
    columns = torch.tensor([-1, 0, 1, 2, 5, 7, 8, 9, 50, 2**31 - 1]).int()
    begin = torch.tensor([0, 0, 6, 3, 9, 2, 1, -(2**40)])
    count = torch.tensor([3, 5, 3, 7, 1, 0, -2, 2])
    logits = torch.randn(8, 9, generator=generator_of(0))
    targets = torch.tensor([1, 1, 8, 5, 5, 1, 1, 1])
    call = Call(logits, targets, columns, begin, count, 1.0, 0.0, -100, 0, 9)
    logps, lse = shim.token_logps(*call)
    assert logps.tolist() == [-math.inf] * 8
    assert lse.tolist() == [0.0] * 8
    shim.token_logps_backward(*call.backward(torch.ones(8), lse), out=logits)
    assert (logits == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_int32(shim: Shim, dtype: torch.dtype) -> None:
    """Rows 2^30 elements apart, in one dimension or two; memory that is not touched is not there."""
    storage = torch.empty((2**32 + 2**10,), dtype=dtype)
    small = random_call((2, 2), 100, dtype, "vocab", MAPS[0], 5)
    for strides in ((2**31, 2**30), (2**30, 2**31)):
        view = storage.as_strided((2, 2, 100), (*strides, 1), 1)
        view.copy_(small.logits)
        logps, lse = shim.token_logps(*small._replace(logits=view))
        assert_forward_close((logps, lse), small)
        grad = random_grad(small, 0) + 1
        shim.token_logps_backward(*small._replace(logits=view).backward(grad, lse), out=view)
        assert_backward_close(view.clone(), small, grad, lse)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 2, 5), (2, 0, 5)])
def test_empty(shim: Shim, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape)
    call = Call(logits, torch.full(shape[:-1], 2), None, None, None, 1.0, 0.0, -100, 0, 5)
    logps, lse = shim.token_logps(*call)
    assert logps.tolist() == torch.full(shape[:-1], -math.inf).tolist()
    assert lse.tolist() == logps.tolist()
    shim.token_logps_backward(*call.backward(torch.ones(shape[:-1]), lse), out=logits)
