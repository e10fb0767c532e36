"""legal_mass against the reference, its gradient, and against the log-probs that it joins."""

from __future__ import annotations

import math
import re
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cuda_on_cpu.shim import Shim
from support.operator_calls import Recorder
from support.session_cases import on, settings_of_machine
from support.strategies import Catalogue, catalogues
from support.tolerances import close
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference
from raddpo_ext.reference.token_logps import child_tokens

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF, torch.float64)


def logits_for(index: rx.TrieIndex, rows: int, columns: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of logits, a few of them far from zero or with ``-inf``, and nodes, -1 and leaves among them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    logits[::5] += 50
    logits[torch.rand(rows, columns, generator=generator) < 0.1] = -math.inf
    nodes = torch.randint(-1, index.num_nodes, (rows,), generator=generator)
    nodes[::3] = 0
    return logits.to(dtype), nodes


def gradient_of(function: Any, logits: Tensor, index: rx.TrieIndex, nodes: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    mass = function(leaf, index, nodes)
    weight = torch.linspace(-1, 2, max(mass.numel(), 1), dtype=mass.dtype)[: mass.numel()]
    (grad,) = torch.autograd.grad(mass, leaf, weight.view(mass.shape))
    return mass.detach(), grad


def assert_close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """A value, and a gradient rounded to the type of the logits."""
    (mass, grad), (true_mass, true_grad) = got, expected
    torch.testing.assert_close(mass.double(), true_mass, **close("legal_mass", mass.dtype))
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(grad.dtype, 0.0)
    limits = close("legal_mass.grad", mass.dtype)
    torch.testing.assert_close(grad.double(), true_grad, rtol=limits["rtol"] + rounding, atol=limits["atol"])


@settings(max_examples=60)
@given(catalogues(), st.integers(0, 2**32), st.sampled_from(DTYPES), settings_of_machine(), st.integers(0, 40))
def test_equals_the_reference(
    catalogue: Catalogue, seed: int, dtype: torch.dtype, machine: tuple[str, int], rows: int
) -> None:
    index = rx.TrieIndex.build(**catalogue.arguments())
    logits, nodes = logits_for(index, rows, catalogue.columns, seed, dtype)
    expected = gradient_of(reference.legal_mass, logits.double(), index, nodes)
    with on(machine):
        got = gradient_of(rx.legal_mass, logits, index, nodes)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(got, expected)


INDEX = rx.TrieIndex.build([[0, 1], [0, 2], [1, 0], [3, 3]], vocab=rx.SIDVocab([5, 5], offset=4))
TOKENS = torch.tensor([[4, 10], [4, 11], [7, 12]])
NODES = INDEX.nodes(TOKENS)
LOGITS = torch.randn(3, 2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_joins_the_log_probs_of_vocabulary_and_trie() -> None:
    vocabulary = rx.token_logps(LOGITS, TOKENS)
    trie = rx.token_logps(LOGITS, TOKENS, normalize="trie", index=INDEX, nodes=NODES)
    torch.testing.assert_close(trie + rx.legal_mass(LOGITS, INDEX, NODES), vocabulary)


def test_is_the_expectation_of_a_reward_for_legal_tokens() -> None:
    """The gradient of the probability to draw a legal token, by REINFORCE over the whole vocabulary."""
    logits = LOGITS.clone().requires_grad_()
    rx.legal_mass(logits, INDEX, NODES).exp().sum().backward()
    probs = LOGITS.softmax(-1)
    legal = torch.zeros_like(probs)
    for place in range(3):
        for level in range(2):
            legal[place, level, child_tokens(INDEX, int(NODES[place, level]))] = 1
    mean = (probs * legal).sum(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, probs * (legal - mean))


def test_gradcheck() -> None:
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rx.legal_mass(x, INDEX, NODES), logits)
    (grad,) = torch.autograd.grad(rx.legal_mass(logits, INDEX, NODES).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="legal_mass has no second derivative"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="legal_mass does not work within vmap"):
        torch.func.vmap(lambda x: rx.legal_mass(x, INDEX, NODES))(LOGITS.expand(2, -1, -1, -1))


def test_impossible_and_bad_rows() -> None:
    """No children, children of -inf, NaN and +inf; none of them touches another row."""
    logits = LOGITS[0, :1].repeat(6, 1)
    nodes = torch.tensor([0, -1, INDEX.num_nodes - 1, 0, 0, 0])
    logits[3, 4:9] = -math.inf
    logits[4, 19] = math.nan
    logits[5, 19] = math.inf
    mass, grad = gradient_of(rx.legal_mass, logits, INDEX, nodes)
    assert mass[1:4].tolist() == [-math.inf] * 3
    assert not grad[1:4].any()
    assert mass[4:].isnan().all()
    assert mass[0].isfinite()
    assert grad[0].isfinite().all()


def test_any_strides_and_shapes() -> None:
    expected = gradient_of(rx.legal_mass, LOGITS, INDEX, NODES)
    strided = torch.stack([LOGITS, LOGITS], -1)[..., 1]
    for got, right in zip(gradient_of(rx.legal_mass, strided, INDEX, NODES), expected, strict=True):
        assert torch.equal(got, right)
    assert rx.legal_mass(LOGITS[0, 0], INDEX, NODES[0, 0]) == expected[0][0, 0]
    assert rx.legal_mass(LOGITS[:0], INDEX, NODES[:0]).shape == (0, 2)


def test_compiles() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    assert len(INDEX.node_tokens)
    compiled = torch.compile(lambda x: rx.legal_mass(x * 2, INDEX, NODES).sum(), fullgraph=True, dynamic=False)
    for function in (compiled, lambda x: rx.legal_mass(x * 2, INDEX, NODES).sum()):
        logits = LOGITS.clone().requires_grad_()
        function(logits).backward()
        expected = gradient_of(lambda x, *_: rx.legal_mass(x * 2, INDEX, NODES).sum()[None], LOGITS, INDEX, NODES)
        torch.testing.assert_close(logits.grad, -expected[1])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": LOGITS.long()}, TypeError, "logits must be a float32, bfloat16, float16 or float64 tensor"),
        ({"logits": LOGITS[..., :0]}, ValueError, "logits must have shape [..., V] with V >= 1, got (3, 2, 0)"),
        ({"logits": LOGITS[..., :9]}, ValueError, "index has token 13, beyond the 9 columns of the logits"),
        ({"nodes": NODES[0]}, ValueError, "nodes must have the shape of logits without its last dimension, (3, 2)"),
        ({"nodes": NODES.int()}, TypeError, "nodes must be an int64 tensor, got torch.int32"),
        ({"nodes": NODES + 100}, ValueError, "nodes must be in [-1, 8), got 100"),
        ({"nodes": NODES.to("meta")}, ValueError, "nodes must be on the device of logits, cpu, got meta"),
        ({"index": None}, ValueError, "needs index"),
        ({"logits": LOGITS * math.nan, "check": True}, ValueError, "logits hold NaN, first at [0, 0, 0]"),
    ],
)
def test_refuses(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rx.legal_mass(**({"logits": LOGITS, "index": INDEX, "nodes": NODES} | changed))


@settings(max_examples=20)
@given(catalogues(), st.integers(0, 2**32), st.sampled_from(DTYPES[:3]), st.sampled_from([(0, 0), (2, 3)]))
def test_cuda_kernel(shim: Shim, catalogue: Catalogue, seed: int, dtype: torch.dtype, order: tuple[int, int]) -> None:
    """Run on the CPU by a shim, with the very arguments of the operators."""
    index = rx.TrieIndex.build(**catalogue.arguments())
    logits, nodes = logits_for(index, 7, catalogue.columns, seed, dtype)
    expected = gradient_of(reference.legal_mass, logits.double(), index, nodes)
    with Recorder() as recorder:
        gradient_of(rx.legal_mass, logits, index, nodes)
    ((_, forward),) = recorder.calls["raddpo::legal_mass"]
    ((_, (grad, *_)),) = recorder.calls["raddpo::legal_mass_backward"]
    shim.set_order(*order)
    assert_close(shim.legal_mass(grad, *forward), expected)
