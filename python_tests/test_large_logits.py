"""Gradients at logits near 1000 in float32, where rounding a row's log-sum-exp to float32 would be off by 3e-5."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.cuda_on_cpu.shim import Shim
from support.logit_cases import Call
from support.operator_calls import Recorder
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference

ROWS, COLUMNS = 24, 3001
#: Of the gradient's norm.
TOLERANCE = 1e-6


def large_logits() -> tuple[Tensor, Tensor, Tensor]:
    """Logits in multiples of 2^-10, targets, and the gradient of the log-probs."""
    generator = torch.Generator().manual_seed(0)
    logits = 1000 + (3 * 1024 * torch.randn(ROWS, COLUMNS, generator=generator)).round() / 1024
    logits[::2] -= 2100
    upstream = torch.linspace(-1, 2, ROWS)
    return logits, torch.randint(COLUMNS, (ROWS,), generator=generator), upstream


def trie_of_columns() -> rx.TrieIndex:
    """One level: every other column."""
    return rx.TrieIndex.build(torch.arange(0, COLUMNS, 2)[:, None].tolist())


def assert_gradient_close(got: Tensor, expected: Tensor) -> None:
    """Row by row."""
    assert got.dtype == torch.float32
    error = (got.double() - expected).norm(dim=-1)
    assert (error <= TOLERANCE * expected.norm(dim=-1)).all(), float((error / expected.norm(dim=-1)).max())


def gradient(function: Callable[[Tensor], Tensor], of: Tensor, upstream: Tensor) -> Tensor:
    leaf = of.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf, upstream.to(of.dtype))
    return found


@pytest.mark.parametrize("support", ["vocab", "level", "trie", "temperature"])
@pytest.mark.parametrize("inplace", [False, True])
def test_token_logps(isa: str, support: str, inplace: bool) -> None:
    logits, targets, upstream = large_logits()
    options: dict[str, object] = {}
    if support == "level":  # a run of columns
        options = {"normalize": "level", "vocab": rx.SIDVocab([2000], offset=500), "levels": torch.tensor(0)}
        targets = 500 + targets % 2000
    elif support == "trie":  # a list of columns
        index, targets = trie_of_columns(), targets // 2 * 2
        options = {"normalize": "trie", "index": index, "nodes": torch.zeros_like(targets)}
    elif support == "temperature":
        options = {"temperature": 0.5}
    got = gradient(
        lambda leaf: rx.token_logps(leaf * 1, targets, inplace_backward=inplace, **options), logits, upstream
    )
    exact = gradient(lambda leaf: reference.token_logps(leaf, targets, **options), logits.double(), upstream)
    assert_gradient_close(got, exact)


@pytest.mark.parametrize("route", ["whole", "tiles", "shared", "shared tiles"])
def test_linear_token_logps(route: str) -> None:
    """The bias is all of the logits, so that no matrix product rounds them."""
    logits, targets, upstream = large_logits()
    bias, hidden, weight = logits[1], torch.ones(ROWS, 2), torch.zeros(COLUMNS, 2)
    options: dict[str, object] = {"logits_budget": 0} if "tiles" in route else {}
    if "shared" in route:
        options["rows"] = torch.arange(ROWS) // 3
        hidden = hidden[: ROWS // 3]
    got = gradient(lambda leaf: rx.linear_token_logps(hidden, weight, targets, bias=leaf, **options), bias, upstream)
    exact = gradient(lambda leaf: reference.token_logps(leaf.expand(ROWS, -1), targets), bias.double(), upstream)
    assert_gradient_close(got, exact)


def test_legal_mass(isa: str) -> None:
    logits, _, upstream = large_logits()
    index, nodes = trie_of_columns(), torch.zeros(ROWS, dtype=torch.int64)
    got = gradient(lambda leaf: rx.legal_mass(leaf, index, nodes), logits, upstream)
    exact = gradient(lambda leaf: reference.legal_mass(leaf, index, nodes), logits.double(), upstream)
    assert_gradient_close(got, exact)


@pytest.mark.parametrize("listed", [False, True])
def test_token_logps_cuda(shim: Shim, listed: bool) -> None:
    logits, targets, upstream = large_logits()
    lists: tuple[Tensor | None, ...] = (None, None, None)
    if listed:
        columns, targets = torch.arange(0, COLUMNS, 2, dtype=torch.int32), targets // 2 * 2
        lists = (columns, torch.zeros(ROWS, dtype=torch.int64), torch.full((ROWS,), len(columns)))
    call = Call(logits, targets, *lists, 1.0, 0.0, -100, 0, COLUMNS)
    logps, lse = shim.token_logps(*call)
    expected = torch.ops.raddpo.token_logps(*call.exact())
    torch.testing.assert_close(logps.double(), expected[0], rtol=1e-6, atol=4e-6)
    got = torch.full_like(logits, 777)
    shim.token_logps_backward(*call.backward(upstream, lse), out=got)
    exact = torch.ops.raddpo.token_logps_backward(*call.exact().backward(upstream.double(), expected[1]))
    assert_gradient_close(got, exact)


def test_legal_mass_cuda(shim: Shim) -> None:
    logits, _, upstream = large_logits()
    index, nodes = trie_of_columns(), torch.zeros(ROWS, dtype=torch.int64)
    with Recorder() as recorder:
        exact = gradient(lambda leaf: rx.legal_mass(leaf, index, nodes), logits.double(), upstream)
    ((_, (_, *lists)),) = recorder.calls["raddpo::legal_mass"]
    mass, got = shim.legal_mass(upstream, logits, *lists)
    expected = rx.legal_mass(logits.double(), index, nodes)
    torch.testing.assert_close(mass.double(), expected, rtol=1e-6, atol=4e-6)
    assert_gradient_close(got, exact)
