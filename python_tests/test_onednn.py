"""use_onednn: linear layers with torch's results and gradients, by oneDNN where it is faster."""

from __future__ import annotations

import copy
import pickle
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.beam_cases import generator_of
from support.matmul import products_by_onednn
from torch import Tensor, nn

import raddpo_ext as rx
from raddpo_ext import _matmul
from raddpo_ext.integrations.onednn import OneDNNLinear


def layer(columns: int = 6, inner: int = 5, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inner, columns, bias)


def swapped(model: Any) -> Any:
    """A copy with its layers by oneDNN."""
    with products_by_onednn():
        return rx.use_onednn(copy.deepcopy(model))


def counted() -> AbstractContextManager[mock.Mock]:
    """Counts the products by oneDNN."""
    return mock.patch.object(_matmul, "_onednn", wraps=_matmul._onednn)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    *[st.integers(1, 12)] * 2,
    *[st.booleans()] * 3,
    st.sampled_from(["rows", "columns"]),
)
def test_equals_float64(
    shape: list[int], columns: int, inner: int, bias: bool, learns_input: bool, learns_weight: bool, layout: str
) -> None:
    given = torch.randn(*shape, inner, generator=generator_of(1))
    if layout == "columns":
        given = given.mT.contiguous().mT
    grad = torch.randn(*shape, columns, generator=generator_of(2))
    plain = layer(columns, inner, bias).requires_grad_(learns_weight)
    mine, right = swapped(plain), copy.deepcopy(plain).double()
    found = []
    for module, x, dy in ((mine, given, grad), (right, given.double(), grad.double())):
        x = x.clone().requires_grad_(learns_input)
        with products_by_onednn():
            out = module(x)
            if out.requires_grad:
                out.backward(dy)
        found.append([out, x.grad, *(p.grad for p in module.parameters())])
    assert not (given.numel() and found[0][0]._is_view())  # FSDP2 would warn
    for got, expected in zip(*found, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_exactly_the_linear_layers() -> None:
    class Adapted(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": Adapted(2, 3), "c": nn.Sequential(nn.Linear(3, 3), nn.ReLU())})
    kept = [(name, p.data_ptr()) for name, p in model.named_parameters()]
    with products_by_onednn(False):
        assert rx.use_onednn(model) is model
    assert type(model["a"]) is nn.Linear  # not where MKL is as fast
    with products_by_onednn():
        assert rx.use_onednn(model) is model
        rx.use_onednn(model)
    assert [type(m) for m in (model["a"], model["b"], model["c"][0])] == [OneDNNLinear, Adapted, OneDNNLinear]
    assert [(name, p.data_ptr()) for name, p in model.named_parameters()] == kept
    assert type(rx.use_onednn(copy.deepcopy(model), False)["a"]) is nn.Linear
    again = pickle.loads(pickle.dumps(model["c"]))
    torch.testing.assert_close(again.state_dict(), model["c"].state_dict(), rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        rx.use_onednn(3)


@pytest.mark.parametrize("reason", ["", "bfloat16", "float64", "autocast", "vector", "disabled", "meta", "subclass"])
def test_when_it_is_used(reason: str) -> None:
    """Everything else is torch's, and gives torch's results."""
    plain, x = layer(), torch.randn(3, 5)
    context: AbstractContextManager[Any] = nullcontext()
    if reason in ("bfloat16", "float64", "meta"):
        to = reason if reason == "meta" else getattr(torch, reason)
        plain, x = plain.to(to), x.to(to)
    elif reason == "vector":
        x = x[0]
    elif reason == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    elif reason == "subclass":
        x = x.as_subclass(type("Marked", (Tensor,), {}))
    mine = swapped(plain)
    torch._C._set_mkldnn_enabled(reason != "disabled")
    try:
        with context, products_by_onednn(), counted() as calls:
            found = mine(x)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert bool(calls.call_count) == (not reason)
    with context:
        expected = plain(x)
    assert type(found) is type(expected)
    if reason != "meta":
        torch.testing.assert_close(found, expected)


def test_within_compile_and_export_it_is_torch() -> None:
    plain, x = layer(), torch.randn(3, 5)
    mine = swapped(plain)
    with products_by_onednn(), counted() as calls:
        compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), plain(x))
        torch.testing.assert_close(torch.export.export(mine, (x,)).module()(x), plain(x))
    assert not calls.call_count


def test_other_derivatives_are_errors() -> None:
    mine, x = swapped(layer()), torch.randn(3, 5, requires_grad=True)
    with products_by_onednn():
        (first,) = torch.autograd.grad(mine(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="use_onednn has no second derivative"):
            first.sum().backward()
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises(NotImplementedError, match="use_onednn has no forward-mode derivative"),
        ):
            mine(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))
        with pytest.raises(NotImplementedError, match=r"use_onednn does not work within vmap"):
            torch.func.vmap(mine)(torch.randn(2, 3, 5))


def test_checkpoints_and_accumulation() -> None:
    """A layer run again in the backward pass, twice, with hooks on its weight."""
    plain, x = layer(), torch.randn(3, 5)
    mine, seen = swapped(plain), []
    mine.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    with products_by_onednn():
        for _ in range(2):
            torch.utils.checkpoint.checkpoint(mine, x, use_reentrant=False).square().sum().backward()
            plain(x).square().sum().backward()
    assert len(seen) == 2
    for got, expected in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-5)


class TestWithTransformers:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("transformers")

    @pytest.mark.parametrize("family", ["qwen3", "gpt2", "t5"])
    def test_a_search_finds_the_same(self, family: str) -> None:
        """The head is still the package's own product, not the model's."""
        from support import tiny_models

        model = tiny_models.seeded(getattr(tiny_models, family)).eval()
        vocab = rx.SIDVocab([4, 4], offset=8)
        index = rx.TrieIndex.build(torch.cartesian_prod(torch.arange(4), torch.arange(4)), vocab=vocab)
        prompts = torch.randint(0, 8, (2, 5), generator=generator_of(0))
        options: dict[str, Any] = {"beam_width": 6}
        expected = rx.SIDRetriever(model, index, **options).retrieve(prompts)
        mine = swapped(model)
        with products_by_onednn(), counted() as calls:
            found = rx.SIDRetriever(mine, index, **options).retrieve(prompts)
        assert calls.call_count
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.sids, expected.sids)

    def test_the_service_does_so_by_itself(self, tmp_path: Path) -> None:
        from support.tiny_models import llama, seeded

        from raddpo_ext.serve.config import ServeConfig
        from raddpo_ext.serve.model import load_model

        seeded(llama).save_pretrained(tmp_path)
        for onednn, kind in ((True, OneDNNLinear), (False, nn.Linear)):
            with products_by_onednn(onednn):
                assert type(load_model(ServeConfig(model=tmp_path)).lm_head) is kind

    def test_a_session_s_gradients_are_the_same(self) -> None:
        from support.tiny_models import llama, seeded, session_rows

        from raddpo_ext.integrations.transformers import SessionCollator, session_states

        model = seeded(llama)
        packed = SessionCollator(embeddings=False)(session_rows(6))["packed"]
        ways = ((False, model), (True, swapped(model)))
        found = []
        for onednn, one in ways:
            with products_by_onednn(onednn), counted() as calls:
                states = session_states(one, packed)
                rx.RADDPOLoss()(sessions=packed.sessions, **states._asdict()).loss.backward()
            assert bool(calls.call_count) == onednn
            found.append({name: p.grad for name, p in one.named_parameters()})
        assert list(found[0]) == list(found[1])
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)

    def test_adapters_go_on_top(self) -> None:
        """PEFT wraps the layers, before or after."""
        peft = pytest.importorskip("peft")
        from support.tiny_models import llama, seeded

        ids = torch.randint(0, 8, (2, 5), generator=generator_of(0))
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(seeded(llama), config).eval()
        expected = adapted(ids).logits
        torch.manual_seed(0)
        for mine in (swapped(adapted), peft.get_peft_model(swapped(seeded(llama)), config).eval()):
            with products_by_onednn(), counted() as calls:
                torch.testing.assert_close(mine(ids).logits, expected, rtol=1e-4, atol=1e-4)
            assert calls.call_count
