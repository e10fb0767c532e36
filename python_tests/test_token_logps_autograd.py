"""token_logps within autograd: rows and gradients in place, second passes, and what torch checks of an operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.logps_cases import DTYPES, Watch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

import raddpo_ext as rx

VOCAB = rx.SIDVocab([3, 2], offset=2, eos=0)
GAPS = rx.SIDVocab([3, 4], token_ids=[[5, -1, 2], [0, 7, 3, -1]], eos=8)
INDEX = rx.TrieIndex.build([[0, 0], [2, 1], [2, 0], [1, 0]], vocab=VOCAB)
SIDS = torch.tensor([[2, 5, 0], [4, 6, 0]])
OPTIONS: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "vocab": (torch.tensor([[1, 0, 8], [3, 3, 4]]), {}),
    "temperature": (torch.tensor([4, 0]), {"temperature": 0.7}),
    "softcap": (torch.tensor([[4, 0]]), {"logit_softcap": 1.5, "temperature": 1.3}),
    "ignore": (torch.tensor([4, 2, -5]), {"ignore_index": 2}),
    "level": (SIDS, {"normalize": "level", "vocab": VOCAB}),
    "levels": (torch.tensor(7), {"normalize": "level", "vocab": GAPS, "levels": torch.tensor(1)}),
    "gaps": (torch.tensor([[5, 8, 8], [2, 0, 8]]), {"normalize": "level", "vocab": GAPS, "logit_softcap": 2.0}),
    "trie": (SIDS, {"normalize": "trie", "index": INDEX, "nodes": INDEX.nodes(SIDS), "temperature": 2.0}),
}
OPTIONS["ignore"][0][-1] = 2


def in_torch(logits: Tensor, targets: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), -1).gather(-1, targets[..., None])[..., 0]


def logits_for(targets: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*targets.shape, 9, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


VIEWS: dict[str, Callable[[], Tensor]] = {
    "a row": lambda: torch.randn(2, 3, 40)[1, 1],
    "last positions": lambda: torch.randn(3, 7, 40)[:, -4:],
    "every other row": lambda: torch.randn(9, 40)[::2],
    "part of the vocabulary": lambda: torch.randn(4, 5, 60)[..., 7:47],
    "batch second": lambda: torch.randn(5, 3, 40).transpose(0, 1),
    "four dimensions": lambda: torch.randn(2, 3, 6, 40)[:, :, ::3],
    "rows far apart": lambda: torch.randn(2, 2, 2, 80)[..., :40],
    "one column": lambda: torch.randn(3, 40)[:, 5:6],
}


@pytest.mark.parametrize("name", VIEWS)
def test_strided_rows_are_not_copied(name: str) -> None:
    """One operator each way and nothing else; the gradient in place lies where the logits lay."""
    view = VIEWS[name]()
    targets = torch.randint(0, view.shape[-1], view.shape[:-1])
    logits = view.requires_grad_()
    expected = torch.autograd.grad(in_torch(logits, targets).square().sum(), logits)[0]
    for inplace in (False, True):
        with Watch() as watch:
            logps = rx.token_logps(logits, targets, inplace_backward=inplace)
        assert [call for call in watch.calls if call not in ("view", "detach", "unsqueeze")] == ["token_logps"]
        torch.testing.assert_close(logps, in_torch(logits, targets))
        place = logits.data_ptr(), logits.stride()
        (gradient,) = torch.autograd.grad(logps.square().sum(), logits)
        torch.testing.assert_close(gradient, expected)
        assert ((gradient.data_ptr(), gradient.stride()) == place) == inplace


@pytest.mark.parametrize("inplace", [False, True])
def test_other_layouts(inplace: bool) -> None:
    """Columns not consecutive, transposed dimensions, rows that share memory; strided targets and gradients."""
    base = torch.randn(4, 3, 2, 30, requires_grad=True)
    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x[..., ::3],
        lambda x: x.permute(3, 2, 1, 0),
        lambda x: x.permute(2, 1, 0, 3),
        lambda x: x[0, 0, :1].expand(5, 30),
        lambda x: x[:1, 0].expand(3, 2, 30),
        lambda x: x.flatten().as_strided((6, 20), (10, 1)),
    ]
    for view in views:
        shape = view(base).shape
        targets = torch.randint(0, shape[-1], shape[:-1][::-1]).permute(*range(len(shape) - 1)[::-1])
        weights = torch.randn(shape[:-1][::-1]).permute(*range(len(shape) - 1)[::-1])
        # A copy, as x.flatten() may be the leaf itself, which is in the test of leaves.
        got, expected = (
            torch.autograd.grad((op(view(base.clone()), targets, **options) * weights).sum(), base)[0]
            for op, options in ((rx.token_logps, {"inplace_backward": inplace}), (in_torch, {}))
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_beyond_int32(isa: str, inplace: bool) -> None:
    """Rows at 0, 2**30 and 2**31 elements and beyond, in memory that is mapped but for the most part never touched."""
    far, columns = 2**30, 1000
    storage = torch.empty(2 * far + 4 * columns, dtype=torch.bfloat16)
    values = torch.randn(3, 2, columns, requires_grad=True)
    logits = storage.as_strided((3, 2, columns), (far, 2 * columns, 1))
    logits.copy_(values.detach())
    targets = torch.randint(0, columns, (3, 2))
    logits.requires_grad_()
    logps = rx.token_logps(logits, targets, inplace_backward=inplace)
    expected = in_torch(values.bfloat16(), targets)
    torch.testing.assert_close(logps, expected)
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    torch.testing.assert_close(gradient.float(), torch.autograd.grad(expected.sum(), values)[0], rtol=1e-2, atol=1e-6)
    flat = storage.as_strided((3, columns), (far, 1)).detach()
    flat.copy_(values.detach()[:, 0])
    torch.testing.assert_close(rx.token_logps(flat, targets[:, 0]), expected[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_in_place_equals_the_fresh_one(isa: str, dtype: torch.dtype, name: str) -> None:
    """To the bit, and it aliases the logits: those of a leaf too."""
    targets, options = OPTIONS[name]
    upstream = torch.randn(targets.shape, dtype=torch.float64)
    logits = logits_for(targets, dtype)
    logps = rx.token_logps(logits, targets, **options)
    (fresh,) = torch.autograd.grad(logps, logits, upstream.to(logps.dtype))
    assert fresh.data_ptr() != logits.data_ptr()
    assert torch.equal(logits, logits_for(targets, dtype))
    logps = rx.token_logps(logits, targets, inplace_backward=True, **options)
    logps.backward(upstream.to(logps.dtype))
    assert logits.grad is not None
    assert logits.grad.data_ptr() == logits.data_ptr()
    assert torch.equal(logits.grad, fresh)
    assert torch.equal(logits, fresh)


def test_other_users_of_overwritten_logits() -> None:
    """Those whose backward pass comes later get autograd's error; those before are not disturbed."""
    x, targets = torch.randn(3, 9, requires_grad=True), torch.tensor([1, 2, 3])
    expected = torch.autograd.grad(in_torch(2 * x, targets).sum() + (2 * x).square().sum(), x)[0]
    logits = 2 * x
    loss = rx.token_logps(logits, targets, inplace_backward=True).sum() + logits.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)
    logits = 2 * x
    loss = logits.square().sum() + rx.token_logps(logits, targets, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = x.exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rx.token_logps(logits, targets, inplace_backward=True).sum().backward()
    logits = 2 * x
    both = [rx.token_logps(logits, targets, inplace_backward=True).sum() for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(both).backward()


def test_second_backward() -> None:
    """As often as wanted with a gradient of its own; once in place, and never through the gradient."""
    logits, targets = torch.randn(3, 9, requires_grad=True), torch.tensor([1, 2, 3])
    logps = rx.token_logps(logits, targets)
    first = torch.autograd.grad(logps.sum(), logits, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(logps.sum(), logits)[0], first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        logps.sum().backward()
    logps = rx.token_logps(2 * logits, targets, inplace_backward=True)
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the first backward pass overwrote the logits"):
        logps.sum().backward()
    for inplace in (False, True):
        logps = rx.token_logps(2 * logits, targets, inplace_backward=inplace)
        (gradient,) = torch.autograd.grad(logps.square().sum(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_saved(name: str) -> None:
    """Beside its inputs one number a row, and nothing where no gradient is wanted."""
    targets, options = OPTIONS[name]
    logits = logits_for(targets, torch.float32)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        with torch.no_grad():
            assert not rx.token_logps(logits, targets, **options).requires_grad
        assert not rx.token_logps(logits.detach(), targets, **options).requires_grad
        assert saved == []
        rx.token_logps(logits, targets, **options)
    own = [x for x in saved if x.data_ptr() not in (logits.data_ptr(), targets.data_ptr())]
    assert [x.numel() for x in own] == [targets.numel()]


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name: str) -> None:
    targets, options = OPTIONS[name]
    torch.autograd.gradcheck(lambda x: rx.token_logps(x, targets, **options), (logits_for(targets),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("listed", [False, True])
def test_opcheck(dtype: torch.dtype, listed: bool) -> None:
    ops = torch.ops.raddpo
    lists = [
        torch.tensor(x, dtype=t) for x, t in (([1, 3, 4, 0, 2], torch.int32), ([0, 3, 3], None), ([3, 2, 0], None))
    ]
    columns = lists if listed else [None] * 3
    options = (0.7, 2.0, -100, 0, 5)
    targets = torch.tensor([3, 0, -100])
    for shape in ((3, 5), (1, 3, 5)):
        logits = torch.randn(shape, dtype=dtype)
        where = targets.view(shape[:-1])
        logps, lse = ops.token_logps(logits, where, *columns, *options)
        torch.library.opcheck(ops.token_logps, (logits.clone().requires_grad_(), where, *columns, *options))
        torch.library.opcheck(ops.token_logps_backward, (logps, logits, where, lse, *columns, *options))
        torch.library.opcheck(ops.token_logps_backward_, (logps, logits, where, lse, *columns, None, *options))
    if not listed:
        logps, lse, where, live = logps[0], lse[0], targets, torch.tensor([0, 2])
        torch.library.opcheck(ops.token_logps_backward_, (logps, logits[0], where, lse, *columns, live, *options))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend: str) -> None:
    """Forward and backward in one graph each, for every support; a target out of the vocabulary raises there too."""
    for name in ("temperature", "levels", "gaps", "trie") if backend == "aot_eager" else ("softcap",):
        torch._dynamo.reset()
        targets, options = OPTIONS[name]
        for inplace in (False, True) if name == "temperature" else (False,):

            def loss(x: Tensor, inplace: bool = inplace, targets: Tensor = targets, options: Any = options) -> Tensor:
                return rx.token_logps(3 * x, targets, inplace_backward=inplace, **options).square().sum()

            got, expected = logits_for(targets, torch.float32), logits_for(targets, torch.float32)
            right = loss(expected)  # first, as this makes index.node_tokens
            right.backward()
            value = torch.compile(loss, fullgraph=True, backend=backend)(got)
            value.backward()
            torch.testing.assert_close(value, right)
            torch.testing.assert_close(got.grad, expected.grad)
    compiled = torch.compile(rx.token_logps, fullgraph=True, backend=backend)
    with pytest.raises(RuntimeError, match="targets hold 9"):
        compiled(torch.zeros(1, 9), torch.tensor([9]))
    assert math.isclose(float(compiled(torch.zeros(1, 9), torch.tensor([8]))), -math.log(9), rel_tol=1e-6)
