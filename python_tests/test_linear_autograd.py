"""linear_token_logps within autograd: weight.grad, tied and frozen weights, autocast, checkpointing, compilation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.logps_cases import Case, Watch, run, tiles
from test_token_logps_autograd import OPTIONS
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import raddpo_ext as rx

TARGETS = torch.tensor([[1, 0, 8], [3, 3, 4]])
BUDGETS = [0, 2**30]
SUPPORTS = ["vocab", "gaps", "trie"]


def in_torch(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.log_softmax(logits.double(), -1).gather(-1, targets[..., None])[..., 0].to(torch.float32)


def head(targets: Tensor = TARGETS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = Case(targets, 9, {}, 0).head(5, dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SUPPORTS)
def test_accumulate_grad(dtype: torch.dtype, budget: int, name: str) -> None:
    """Into a gradient that is not there yet, and twice more into the same storage, as autograd would."""
    targets, options = OPTIONS[name]
    hidden, weight, bias = head(targets, dtype)
    logps = rx.linear_token_logps(hidden, weight, targets, bias=bias, logits_budget=budget, **options)
    expected = torch.autograd.grad(logps.square().sum(), (hidden, weight, bias))
    options = options | {"logits_budget": budget, "accumulate_grad": True}
    places = set()
    for times in (1, 2, 3):
        hidden.grad = bias.grad = None
        with tiles(1, 2, times == 2):
            rx.linear_token_logps(hidden, weight, targets, bias=bias, **options).square().sum().backward()
        assert weight.grad is not None
        assert weight.grad.dtype == dtype
        places.add(weight.grad.data_ptr())
        close = {"rtol": 5e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(weight.grad, times * expected[1], **close)
        torch.testing.assert_close(hidden.grad, expected[0], **close)
        torch.testing.assert_close(bias.grad, expected[2], **close)
    assert len(places) == 1


def test_accumulate_grad_makes_one_gradient() -> None:
    """No second one beside weight.grad: autograd gets none to add."""
    hidden, weight, _ = Case(torch.randint(0, 5000, (4,)), 5000, {}, 0).head(8)
    weight.requires_grad_()
    weight.grad = torch.zeros_like(weight)
    with Watch() as watch:
        rx.linear_token_logps(hidden, weight, torch.tensor([1, 2, 3, 4]), accumulate_grad=True).sum().backward()
    assert watch.most_bytes < weight.nbytes
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("accumulate", [False, True])
def test_tied_embedding(accumulate: bool) -> None:
    """The head's weight is the embedding's too, and other losses add to its gradient."""
    table, tokens = nn.Embedding(9, 5), torch.tensor([[1, 2, 3], [4, 5, 5]])

    def loss(op: Any, **options: Any) -> Tensor:
        hidden = torch.tanh(table(tokens))
        return -op(hidden, table.weight, TARGETS, **options).sum() + table.weight.square().sum()

    (expected,) = torch.autograd.grad(loss(in_torch), table.weight)
    for times in (1, 2):
        loss(rx.linear_token_logps, accumulate_grad=accumulate).backward()
        torch.testing.assert_close(table.weight.grad, times * expected)


def test_accumulate_grad_with_a_frozen_weight() -> None:
    hidden, weight, _ = head()
    rx.linear_token_logps(hidden, weight.detach(), TARGETS, accumulate_grad=True).sum().backward()
    assert hidden.grad is not None
    with pytest.raises(ValueError, match="accumulate_grad needs weight to be a leaf"):
        rx.linear_token_logps(hidden, 2 * weight, TARGETS, accumulate_grad=True)
    assert not rx.linear_token_logps(hidden.detach(), 2 * weight.detach(), TARGETS, accumulate_grad=True).requires_grad


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(budget: int, name: str) -> None:
    """Anew for each row of the Jacobian, as the logits are overwritten."""
    targets, options = OPTIONS[name]
    for sizes in ((1, 2, False), (100, 100, True)):
        hidden, weight, bias = head(targets, torch.float64)

        class Anew(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Tensor:
                ctx.save_for_backward(*inputs)
                return _logps(inputs).detach()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
                with torch.enable_grad():
                    leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                    return torch.autograd.grad(_logps(leaves), leaves, grad)

        def _logps(inputs: Any, targets: Tensor = targets, options: Any = options) -> Tensor:
            h, w, b = inputs
            return rx.linear_token_logps(h, w, targets, bias=b, logits_budget=budget, **options)

        with tiles(*sizes):
            torch.autograd.gradcheck(Anew.apply, (hidden, weight, bias))


@pytest.mark.parametrize("budget", BUDGETS)
def test_second_backward(budget: int) -> None:
    hidden, weight, _ = head()
    logps = rx.linear_token_logps(hidden, weight, TARGETS, logits_budget=budget)
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the first backward pass overwrote the logits"):
        logps.sum().backward()
    logps = rx.linear_token_logps(hidden, weight, TARGETS, logits_budget=budget)
    (gradient,) = torch.autograd.grad(logps.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_changed_weight_is_noticed() -> None:
    hidden, weight, _ = head()
    logps = rx.linear_token_logps(hidden, weight, TARGETS)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@pytest.mark.parametrize("name", SUPPORTS)
def test_what_is_saved(name: str) -> None:
    """Within the budget the logits, beyond it the log-sum-exps alone, and nothing where no gradient is wanted."""
    targets, options = OPTIONS[name]
    hidden, weight, _ = head(targets)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        with torch.no_grad():
            rx.linear_token_logps(hidden, weight, targets, **options)
        rx.linear_token_logps(hidden.detach(), weight.detach(), targets, **options)
        assert saved == []
        for budget in BUDGETS:
            saved.clear()
            rx.linear_token_logps(hidden, weight, targets, logits_budget=budget, **options)
            own = [x.numel() for x in saved if x.data_ptr() not in (hidden.data_ptr(), weight.data_ptr())]
            assert sum(own) == targets.numel() if budget == 0 else sum(own) > targets.numel()


@pytest.mark.parametrize("autocast_type", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SUPPORTS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_autocast(autocast_type: torch.dtype, name: str, accumulate: bool) -> None:
    """Float32 parameters, products in autocast's type, float32 gradients: as F.linear does."""
    targets, options = OPTIONS[name]
    inputs = head(targets)

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return rx.token_logps(F.linear(hidden, weight, bias), targets, **options)

    upstream = torch.randn(targets.shape)
    case = Case(targets, 9, options, 0)
    with torch.autocast("cpu", autocast_type):
        expected = run(plain, inputs, case, upstream)
        for budget in BUDGETS:
            got = run(rx.linear_token_logps, inputs, case, upstream, logits_budget=budget)
            eps = torch.finfo(autocast_type).eps
            assert got[0].dtype == torch.float32
            torch.testing.assert_close(got[0], expected[0], rtol=eps, atol=eps)
            for mine, right in zip(got[1], expected[1], strict=True):
                assert mine.dtype == torch.float32
                torch.testing.assert_close(mine, right, rtol=2 * eps, atol=2 * eps)
        hidden, weight, bias = (x.detach().clone().requires_grad_() for x in inputs)
        logps = rx.linear_token_logps(hidden, weight, targets, bias=bias, accumulate_grad=accumulate, **options)
    logps.backward(upstream)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected[1][1], rtol=2 * eps, atol=2 * eps)
    with torch.autocast("cpu", autocast_type):
        double = rx.linear_token_logps(*(x.detach().double() for x in inputs[:2]), targets, **options)
    assert double.dtype == torch.float64


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant", "offloaded"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_checkpointing(kind: str, accumulate: bool, budget: int) -> None:
    """Around the head, whose forward pass then runs twice; or with what it saves put elsewhere."""
    hidden, weight, bias = head()

    def loss(hidden: Tensor) -> Tensor:
        options = {"bias": bias, "logits_budget": budget, "accumulate_grad": accumulate}
        return rx.linear_token_logps(torch.tanh(hidden), weight, TARGETS, **options).square().sum()

    expected = torch.autograd.grad(in_torch(torch.tanh(hidden), weight, TARGETS, bias).square().sum(), (hidden, weight))
    if kind == "offloaded":
        with saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
            value = loss(hidden)
    else:
        value = checkpoint(loss, hidden, use_reentrant=kind == "reentrant")
    value.backward()
    torch.testing.assert_close(hidden.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vocab", "levels", "gaps", "trie"])
def test_compiles_whole(name: str) -> None:
    """Forward and backward in one graph each, for every support, budget and kind of gradient, and where shapes vary."""
    torch._dynamo.reset()
    targets, options = OPTIONS[name]
    targets = targets[None].repeat_interleave(3, 0)
    if "nodes" in options:
        options = options | {"nodes": options["nodes"][None].repeat_interleave(3, 0)}

    def loss(h: Tensor, w: Tensor, b: Tensor, targets: Tensor, options: Any) -> Tensor:
        return rx.linear_token_logps(2 * h, w, targets, bias=b, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    runs = {"vocab": [(2**30, 3), (2**30, 2)], "gaps": [(0, 3), (2**30, 3)]}
    for budget, size in runs.get(name, [(2**30, 3)]):
        part = targets if size == 3 else targets[:size, :, :size]
        some = options | {"logits_budget": budget, "accumulate_grad": budget == 0}
        got, expected = head(part), head(part)
        with tiles(1, 4, False):
            loss(*expected, part, some).backward()  # first, as this makes index.node_tokens
            compiled(*got, part, some).backward()
        for mine, right in zip(got, expected, strict=True):
            torch.testing.assert_close(mine.grad, right.grad, rtol=1e-5, atol=1e-4)


def test_long_rows_agree_in_float32() -> None:
    """A vocabulary in 150 tiles: their log-sum-exps add up without losing precision."""
    case = Case(torch.tensor([3, 70_000, 149_999]), 150_000, {}, 0)
    hidden, weight, _ = case.head(4)
    whole = rx.linear_token_logps(hidden.double(), weight.double(), case.targets)
    tiled = rx.linear_token_logps(hidden, weight, case.targets, logits_budget=0)
    torch.testing.assert_close(tiled.double(), whole, rtol=0, atol=2e-5)
    assert math.isclose(float(tiled.exp().sum()), float(whole.exp().sum()), rel_tol=2e-5)
