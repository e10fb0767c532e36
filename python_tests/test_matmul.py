"""Products by oneDNN against float64, and when they are chosen."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.beam_cases import generator_of
from support.matmul import products_by_onednn
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import _C, _matmul

SIZES = st.integers(0, 12)
LAYOUTS = ("rows", "columns", "sliced", "expanded")


def matrix(rows: int, columns: int, layout: str, seed: int) -> Tensor:
    """Random, with its rows or its columns in memory one after another, part of a larger one, or one row repeated."""
    random = generator_of(seed)
    if layout == "columns":
        return torch.randn(columns, rows, generator=random).T
    if layout == "sliced":
        return torch.randn(rows + 2, columns + 3, generator=random)[1 : rows + 1, 2 : columns + 2]
    if layout == "expanded":
        return torch.randn(1, columns, generator=random).expand(rows, columns)
    return torch.randn(rows, columns, generator=random)


@given(SIZES, SIZES, SIZES, *[st.sampled_from(LAYOUTS)] * 2, st.booleans(), st.sampled_from(["new", "out", "add"]))
def test_equals_float64(rows: int, columns: int, inner: int, left: str, right: str, biased: bool, into: str) -> None:
    a, b = matrix(rows, inner, left, 0), matrix(columns, inner, right, 1)
    bias = torch.randn(columns, generator=generator_of(2)) if biased and into != "add" else None
    expected = a.double() @ b.double().T + (0 if bias is None else bias.double())
    out = None if into == "new" else torch.ones(rows, columns + 4)[:, 2 : columns + 2]
    for onednn in (True, False):
        with products_by_onednn(onednn):
            found = _matmul.linear(a, b, bias, out=out if out is None else out.fill_(1), add=into == "add")
        torch.testing.assert_close(found.double(), expected + (into == "add"), rtol=1e-5, atol=1e-5)
        assert out is None or found is out or found.data_ptr() == out.data_ptr()


def chosen(left: Tensor, right: Tensor) -> bool:
    with products_by_onednn():
        return _matmul.is_by_onednn(left, right)


def test_when_it_is_chosen() -> None:
    a, b = torch.randn(3, 4), torch.randn(5, 4)
    assert chosen(a, b)
    assert not chosen(a.double(), b.double())
    assert not chosen(a.bfloat16(), b.bfloat16())
    assert not chosen(a[:0], b)
    assert not chosen(a.to("meta"), b.to("meta"))
    torch._C._set_mkldnn_enabled(False)
    try:
        assert not chosen(a, b)
    finally:
        torch._C._set_mkldnn_enabled(True)


def test_small_products_are_not_worth_a_new_shape() -> None:
    with mock.patch.object(_matmul, "onednn_is_faster", return_value=True):
        assert not _matmul.is_by_onednn(torch.randn(64, 64), torch.randn(64, 64))
        assert not _matmul.is_by_onednn(torch.randn(16, 512), torch.randn(512, 512))
        assert _matmul.is_by_onednn(torch.randn(16, 512), torch.randn(512, 512), recurs=True)
        assert not _matmul.is_by_onednn(torch.randn(4, 512), torch.randn(512, 512), recurs=True)
        assert _matmul.is_by_onednn(torch.randn(1, 512), torch.randn(2048, 512))
        assert _matmul.is_by_onednn(torch.randn(256, 512), torch.randn(512, 512))
        head = torch.randn(4096, 512)
        assert not _matmul.is_by_onednn(torch.randn(2, 4096), head.T)  # a head's gradients of two rows
        assert not _matmul.is_by_onednn(torch.randn(4096, 2), torch.randn(512, 2))


@pytest.mark.parametrize("lacks", ["", "avx512", "amd", "operator", "mkl"])
def test_where_it_is_faster(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor with AVX-512 that MKL does not use; a torch whose operator is another one keeps to MKL."""
    vendor = "GenuineIntel" if lacks == "amd" else "AuthenticAMD"
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id : {vendor}")
    monkeypatch.setattr(_C, "best_isa", lambda: "avx2" if lacks == "avx512" else "avx512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: lacks != "mkl")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    if lacks == "operator":
        monkeypatch.setattr(_matmul, "_SCHEMA", "another one")
    assert _matmul.onednn_is_faster.__wrapped__() == (not lacks and _matmul._has_operator())


def test_gradients_of_a_large_head() -> None:
    """Whole tiles of it, by both libraries."""
    hidden, weight = torch.randn(40, 64), torch.randn(5000, 64) / 8
    targets = torch.randint(5000, (40,))
    found = []
    for onednn in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        with products_by_onednn(onednn, tile=512):
            logps = rx.linear_token_logps(*leaves, targets)
            found.append([logps, *torch.autograd.grad(logps.sum(), leaves)])
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
