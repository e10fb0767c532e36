"""CUDA graphs played on the CPU: a capture records every operator with its very tensors, a replay runs them again.

As on a GPU, what Python decided while it captured is fixed for good, results appear where the captured ones lie, and a
capture refuses to wait for a value.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raddpo_ext.integrations import graphed

_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}


def _storages(values: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, torch.Tensor)}


class Tape(TorchDispatchMode):
    """Stands for ``torch.cuda.CUDAGraph``."""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.made: set[int] = set()  # storages that are on the GPU; an index's header is not

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _WAITS and _storages(args) & self.made:
            raise RuntimeError(f"{func} waits for the GPU")
        outputs = func(*args, **(kwargs or {}))
        self.made |= _storages(outputs) - _storages([args, kwargs])
        self.calls.append((func, args, kwargs or {}, outputs))
        return outputs

    def replay(self) -> None:
        Tape.replays += 1
        for func, args, kwargs, outputs in self.calls:
            inputs = _storages([args, kwargs])
            for old, new in zip(tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in inputs:
                    old.copy_(new)

    def pool(self) -> int:
        return 0


class _Stream:
    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass


@contextmanager
def _capture(tape: Tape, **options: Any) -> Any:
    with tape:
        yield


def play_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets ``cuda_graph=True`` run on the CPU."""
    cuda = {
        "CUDAGraph": Tape,
        "graph": _capture,
        "Stream": _Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": _Stream,
        "Event": lambda: SimpleNamespace(record=lambda: None),
        "device": lambda device: nullcontext(),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphed, "_DEVICE", "cpu")
    monkeypatch.setattr(Tape, "replays", 0)
