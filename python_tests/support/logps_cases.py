"""What the tests of token_logps and linear_token_logps share: random cases, the float64 truth, who holds how much."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import raddpo_ext as rx
from raddpo_ext.logps import linear_product

from .beam_cases import generator_of
from .strategies import Catalogue, catalogues
from .tolerances import TOLERANCE, close

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (1,), (5,), (0,), (2, 3), (2, 0, 3), (2, 1, 3), (2, 1, 2, 2)]


@dataclass
class Case:
    """Targets ``[...]``, the number of columns, and the options of a call."""

    targets: Tensor
    columns: int
    options: dict[str, Any]
    seed: int

    def logits(self, dtype: torch.dtype = torch.float32, hidden: float = 0.0) -> Tensor:
        """``[..., V]``, a share of them -inf."""
        generator = generator_of(self.seed)
        logits = 3 * torch.randn(*self.targets.shape, self.columns, generator=generator)
        logits[torch.rand(logits.shape, generator=generator) < hidden] = -math.inf
        return logits.to(dtype)

    def head(self, features: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states, weight and bias."""
        generator = generator_of(self.seed)
        hidden = torch.randn(*self.targets.shape, features, generator=generator)
        weight = 2 * torch.randn(self.columns, features, generator=generator) / features**0.5
        return hidden.to(dtype), weight.to(dtype), torch.randn(self.columns, generator=generator).to(dtype)

    def upstream(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A gradient of the log-probs, a third of it 0."""
        generator = generator_of(self.seed + 1)
        values = torch.randn(self.targets.shape, generator=generator, dtype=torch.float64)
        return (values * (torch.rand(values.shape, generator=generator) > 1 / 3)).to(dtype)


@st.composite
def cases(draw: st.DrawFn, normalize: tuple[str, ...] = ("vocab", "level", "trie")) -> Case:
    """Every support, with tokens inside and outside it and ignored ones, whatever their number."""
    kind = draw(st.sampled_from(normalize))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = generator_of(seed)
    options: dict[str, Any] = {"normalize": kind}
    tables = ("contiguous", "overlapping", "scattered", "lexicographic", "gaps")
    catalogue = draw(catalogues(tables if kind == "level" else ("none", *tables), most_items=12))
    columns = catalogue.columns
    if kind == "vocab":
        columns = draw(st.sampled_from([1, 2, 17, 64, 100, 1025]))
        targets = torch.randint(0, columns, draw(st.sampled_from(SHAPES)), generator=generator)
    elif kind == "level":
        targets = _of_levels(draw, catalogue, options, generator)
    else:
        targets = _of_nodes(draw, catalogue, options, generator)
    ignore_index = draw(st.sampled_from([-100, -100, 0, columns - 1, *targets.flatten()[:1].tolist()]))
    stray = torch.rand(targets.shape, generator=generator)
    targets = torch.where(stray < 0.2, torch.randint(0, columns, targets.shape, generator=generator), targets)
    targets = torch.where(stray > 0.85, ignore_index, targets)
    options["ignore_index"] = ignore_index
    options["temperature"] = draw(st.sampled_from([1.0, 1.0, 0.6, 2.5]))
    options["logit_softcap"] = draw(st.sampled_from([None, None, 2.0, 30.0]))
    return Case(targets, columns, options, seed)


def _of_levels(draw: st.DrawFn, catalogue: Catalogue, options: dict[str, Any], generator: torch.Generator) -> Tensor:
    vocab = catalogue.vocab
    assert vocab is not None
    options["vocab"] = vocab
    last = vocab.levels + (vocab.eos is not None)
    if draw(st.booleans()):
        shape: tuple[int, ...] = (*draw(st.sampled_from([(), (3,), (2, 2), (0,)])), last)
        levels = torch.arange(last)
    else:
        shape = draw(st.sampled_from(SHAPES))
        wide = draw(st.booleans()) and shape
        levels = torch.randint(0, last, shape[-1:] if wide else shape, generator=generator)
        options["levels"] = levels
    columns, begins, counts = vocab.level_columns("cpu")
    levels = levels.expand(shape)
    chosen = begins[levels] + (torch.rand(shape, generator=generator) * counts[levels]).long()
    return columns[chosen].long()


def _of_nodes(draw: st.DrawFn, catalogue: Catalogue, options: dict[str, Any], generator: torch.Generator) -> Tensor:
    options["index"] = index = rx.TrieIndex.build(**catalogue.arguments())
    if draw(st.booleans()):  # as training has them: whole SIDs, padded
        most = max(map(len, catalogue.tokens()))
        tokens = torch.tensor([[*row, *[catalogue.columns - 1] * (most - len(row))] for row in catalogue.tokens()])
        options["nodes"] = index.nodes(tokens)
        return tokens
    nodes = torch.randint(-1, index.num_nodes, draw(st.sampled_from(SHAPES)), generator=generator)
    options["nodes"] = nodes
    first, count = index.child_ranges(nodes)
    chosen = first + (torch.rand(nodes.shape, generator=generator) * count).long()
    return torch.where(count > 0, index.node_tokens[chosen.clamp(0, index.num_nodes - 1)].long(), 0).clamp(min=0)


# Each leaf that asks for it gets a gradient.
Result = tuple[Tensor, list[Tensor]]


def run(op: Callable[..., Tensor], inputs: tuple[Tensor, ...], case: Case, upstream: Tensor, **options: Any) -> Result:
    """The log-probs and the gradients of the inputs, of ``op(*inputs, targets)``; a third input is the bias."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    if len(leaves) == 3:
        options["bias"] = leaves[2]
    logps = op(*leaves[:2], case.targets, **case.options, **options)
    return logps.detach(), list(torch.autograd.grad(logps, leaves, upstream.to(logps.dtype)))


def truth(op: Callable[..., Tensor], inputs: tuple[Tensor, ...], case: Case, upstream: Tensor) -> Result:
    """The same in float64. A log-prob of -inf has no gradient."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    options = case.options | ({"bias": leaves[2]} if len(leaves) == 3 else {})
    logps = op(*leaves[:2], case.targets, **options)
    total = torch.where((logps > -math.inf) & (logps != 0), logps * upstream.double(), 0.0).sum()
    total = total + sum((0 * leaf.nan_to_num()).sum() for leaf in leaves)  # an ignored batch has gradients too
    return logps.detach(), list(torch.autograd.grad(total, leaves))


def assert_result_close(got: Result, expected: Result, op: str) -> None:
    """The gradients to half a unit in the last place of their type, beside the tolerance."""
    torch.testing.assert_close(got[0].double(), expected[0], **close(op))
    rtol, atol = TOLERANCE[f"{op}.grad", torch.float32]
    for mine, right in zip(got[1], expected[1], strict=True):
        low = mine.dtype in (torch.bfloat16, torch.float16)
        half = torch.finfo(mine.dtype).eps / 2 if low else 0.0
        tiny = torch.finfo(mine.dtype).smallest_normal * half
        torch.testing.assert_close(mine.double(), right, rtol=rtol + half, atol=atol + tiny)


@contextmanager
def tiles(rows: int, columns: int, look: bool, huge: int = 1 << 25) -> Iterator[None]:
    """Lets small shapes take the paths of large ones."""
    module = sys.modules["raddpo_ext.logps.linear_token_logps"]
    worth = 0 if look else 1 << 60
    sizes = {"_MIN_ROWS": rows, "_MIN_COLUMNS": columns, "FRESH": huge, "MIN_SKIP_FLOPS": worth}
    with mock.patch.multiple(linear_product, **sizes), mock.patch.object(module, "MIN_SKIP_FLOPS", worth):
        yield


class Watch(TorchDispatchMode):
    """Counts the operators that run, and the bytes that they hold at once in storages of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.most_bytes = 0
        self._held: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket.__name__)
        if func._schema.is_mutable or any(a.alias_info for a in func._schema.returns):
            return result
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._held[StorageWeakRef(storage)] = storage.nbytes()
        self._held = {ref: size for ref, size in self._held.items() if not ref.expired()}
        self.most_bytes = max(self.most_bytes, sum(self._held.values()))
        return result

    @property
    def products(self) -> int:
        return sum(name in ("mm", "addmm", "addmm_") for name in self.calls)
