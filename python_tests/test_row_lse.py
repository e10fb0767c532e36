"""The row log-sum-exp that every step begins with."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import assert_scores_close
from support.instruction_sets import ISAS

from raddpo_ext import _C, reference
from raddpo_ext.decoding.row_lse import row_lse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 2500]),
    st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4, 1e12, 5e37]),
    st.sampled_from([0.0, -2e4, 3e4]),
    st.floats(0, 1),
    st.booleans(),
)
def test_equals_float64(
    isa: str, dtype: torch.dtype, seed: int, columns: int, scale: float, shift: float, hidden: float, finite: bool
) -> None:
    """Any scale, up to what would overflow a carelessly scaled exponent; masks of -inf or the least finite number."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3, columns, generator=generator) + shift
    logits = logits.to(dtype)
    mask = torch.finfo(dtype).min if finite else -math.inf
    logits[torch.rand(logits.shape, generator=generator) < hidden] = mask
    assert_scores_close(row_lse(logits), reference.row_lse(logits.double()), "row_lse")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_16_bit_value(isa: str, dtype: torch.dtype) -> None:
    """A row of one element returns it: conversion is exact, infinities and NaN included."""
    if dtype == torch.float32:
        values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1e-38, math.inf, -math.inf, math.nan])
    else:
        values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    expected = values.float().where(values != math.inf, math.nan)
    torch.testing.assert_close(row_lse(values[:, None]), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rest", [0.0, -math.inf])
@pytest.mark.parametrize("columns", [1, 64, 1024, 3072, 3100])
def test_nan_and_inf_are_never_lost(isa: str, dtype: torch.dtype, bad: float, rest: float, columns: int) -> None:
    """Wherever in the row they stand, and whatever follows: also blocks of -inf, and finite ones after those."""
    places = sorted({0, 1 % columns, columns // 3, columns // 2, columns - 1})
    logits = torch.full((2 * len(places), columns), rest, dtype=dtype)
    logits[:, -columns // 4 :] = torch.tensor([rest, 1.0])[:, None].repeat_interleave(len(places), 0).to(dtype)
    logits[torch.arange(len(logits)), torch.tensor(places * 2)] = bad
    assert row_lse(logits).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [-math.inf, -6e4, -100.0, -50.0, 3.0, 6e4])
@pytest.mark.parametrize("length", [63, 64, 65, 1024, 1100])
def test_a_start_unlike_the_rest(isa: str, dtype: torch.dtype, start: float, length: int) -> None:
    """The first elements give the first shift: hidden, far below or far above what follows."""
    logits = torch.randn(2, 2500, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, :length] = start
    assert_scores_close(row_lse(logits), reference.row_lse(logits.double()), "row_lse")


def test_all_minus_inf(isa: str) -> None:
    assert row_lse(torch.full((2, 3000), -math.inf)).tolist() == [-math.inf] * 2
    assert row_lse(torch.zeros(2, 0)).tolist() == [-math.inf] * 2
    assert row_lse(torch.zeros(0, 5)).shape == (0,)


def test_writes_where_it_is_told(isa: str) -> None:
    """A row of a larger tensor, and nothing beside it."""
    logits, sums = torch.randn(4, 300), torch.full((3, 4), 777.0)
    part = sums[1]
    assert row_lse(logits, out=part) is part
    assert sums[1].tolist() == row_lse(logits).tolist()
    assert sums[[0, 2]].tolist() == [[777.0] * 4] * 2


def test_refuses_a_result_that_does_not_fit() -> None:
    logits = torch.randn(4, 300)
    for out in (torch.zeros(3), torch.zeros(5), torch.zeros(4, dtype=torch.float64), torch.zeros(4, 2)[:, 0]):
        with pytest.raises(RuntimeError, match="row_lse: out must be contiguous, of the documented type and of 4"):
            row_lse(logits, out=out)


@pytest.mark.slow
@pytest.mark.parametrize("cap", ["scalar", "avx2", "nonsense"])
def test_environment_lowers_the_instruction_set(cap: str) -> None:
    expected = min(cap if cap in ISAS else ISAS[-1], _C.best_isa(), key=ISAS.index)
    environment = os.environ | {"RADDPO_ISA": cap, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = "import raddpo_ext; print(raddpo_ext._C.isa())"
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected
