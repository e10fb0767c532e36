"""Random calls of the token_logps ops, and when results count as equal: for the CPU, the shim and a GPU alike."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .tolerances import TOLERANCE, close

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MAPS = [(1.0, 0.0), (1 / 0.7, 0.0), (1.0, 5.0), (0.5, 30.0)]  # scale, softcap
SUPPORTS = ["vocab", "runs", "lists", "part"]


class Call(NamedTuple):
    """``torch.ops.raddpo.token_logps(*call)``."""

    logits: Tensor
    targets: Tensor
    columns: Tensor | None
    begin: Tensor | None
    count: Tensor | None
    scale: float
    softcap: float
    ignore_index: int
    first_column: int
    vocab_size: int

    def backward(self, grad: Tensor, lse: Tensor) -> tuple[object, ...]:
        return (grad, self.logits, self.targets, lse, *self[2:])

    def to(self, device: str) -> Call:
        return Call(*(part.to(device) if isinstance(part, Tensor) else part for part in self))

    def exact(self) -> Call:
        return self._replace(logits=self.logits.double())


def strided(values: Tensor, shift: int, gap: int) -> Tensor:
    """``values`` in a storage of their own: it begins ``shift`` elements late, with ``gap`` more after each row.

    The storage between holds 777, see :func:`assert_kept`.
    """
    *leading, cols = values.shape
    storage = values.new_full((math.prod(leading) * (cols + gap) + shift + 8,), 777.0)
    steps = [math.prod(leading[d + 1 :]) * (cols + gap) for d in range(len(leading))]
    view = storage.as_strided(values.shape, (*steps, 1), shift)
    view.copy_(values)
    return view


def assert_kept(view: Tensor) -> None:
    """Nothing was written outside of a view by :func:`strided`."""
    storage = view.new_empty(0).set_(view.untyped_storage(), 0, (view.untyped_storage().nbytes() // view.itemsize,))
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert (storage[outside] == 777).all()


def random_call(
    rows: int | tuple[int, int],
    cols: int,
    dtype: torch.dtype,
    support: str,
    map_: tuple[float, float],
    seed: int,
    shift: int = 0,
    gap: int = 0,
) -> Call:
    """Rows with targets in their support, out of it, ignored and out of the vocabulary; some logits are -inf."""
    generator = torch.Generator().manual_seed(seed)
    shape = rows if isinstance(rows, tuple) else (rows,)
    logits = 3 * torch.randn(*shape, cols, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = -math.inf
    number = math.prod(shape)
    targets = torch.randint(0, cols, (number,), generator=generator)
    columns = begin = count = None
    first_column, vocab_size = (5, cols + 11) if support == "part" else (0, cols)
    if support in ("runs", "lists"):
        lists = [_columns(support, cols, generator) for _ in range(number)]
        for row, list_ in enumerate(lists):
            if len(list_) and row % 4 < 3:
                targets[row] = list_[int(torch.randint(0, len(list_), (), generator=generator))]
        columns = torch.cat([torch.tensor([cols - 1]), *lists]).int()
        count = torch.tensor([len(list_) for list_ in lists])
        begin = count.cumsum(0) - count + 1
        begin, count = begin.view(shape), count.view(shape)
    targets += first_column
    if support == "part":
        targets[::5] = torch.randint(0, vocab_size, (len(targets[::5]),), generator=generator)
    targets[torch.rand(number, generator=generator) < 0.2] = -100
    return Call(
        strided(logits.to(dtype), shift, gap),
        targets.view(shape),
        columns,
        begin,
        count,
        *map_,
        -100,
        first_column,
        vocab_size,
    )


def _columns(support: str, cols: int, generator: torch.Generator) -> Tensor:
    """Ascending; a run, now and then empty, or any columns, which may come out as a run or as all."""
    low, high = sorted(torch.randint(0, cols + 1, (2,), generator=generator).tolist())
    if support == "runs":
        return torch.arange(low, high)
    share = float(torch.rand((), generator=generator))
    return (torch.rand(cols, generator=generator) < share**2).nonzero().flatten()


def random_grad(call: Call, seed: int) -> Tensor:
    """Of the log-probs, zero here and there."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(call.targets.shape, generator=generator, dtype=torch.float64)
    grad[torch.rand(grad.shape, generator=generator) < 0.15] = 0
    return grad.to(torch.float64 if call.logits.dtype == torch.float64 else torch.float32)


def assert_forward_close(got: tuple[Tensor, Tensor], call: Call) -> None:
    """Against the CPU's op in float64; where its results are infinite or NaN, so are these."""
    expected = torch.ops.raddpo.token_logps(*call.exact())
    assert got[0].dtype == (torch.float64 if call.logits.dtype == torch.float64 else torch.float32)
    assert got[1].dtype == torch.float64
    for name, one, other in zip(("token_logps", "token_logps.lse"), got, expected, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, **close(name), equal_nan=True)
    assert not (got[0] > 0).any()


def assert_backward_close(got: Tensor, call: Call, grad: Tensor, lse: Tensor) -> None:
    """The same of the logits' gradient; exactly zero where float64's is, as that of most rows and columns."""
    expected = torch.ops.raddpo.token_logps_backward(*call.exact().backward(grad.double(), lse.double()))
    got = got.cpu()
    assert got.dtype == call.logits.dtype
    assert (got[expected == 0] == 0).all()
    logits = call.logits.double()
    z = call.scale * (call.softcap * torch.tanh(logits / call.softcap) if call.softcap else logits)
    size = (z - lse.double()[..., None]).exp()
    columns = call.targets - call.first_column
    size += torch.arange(size.shape[-1]) == columns[..., None]
    info = torch.finfo(got.dtype)
    allowed = (
        TOLERANCE["token_logps.grad terms", torch.float32].rtol * call.scale * size * grad.double().abs()[..., None]
        + info.smallest_normal
    )
    if got.dtype in (torch.bfloat16, torch.float16):
        allowed += info.eps / 2 * expected.abs() + info.smallest_normal * info.eps
    far = ((got.double() - expected).abs() > allowed).nonzero()
    assert len(far) == 0, (far[0], got[tuple(far[0])], expected[tuple(far[0])])
    assert (got.isnan() == expected.isnan()).all()
