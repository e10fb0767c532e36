"""The operators of the package, and a recorder of their calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("raddpo::"))

Call = tuple[Any, tuple[Any, ...]]  # the overload and its arguments


class Recorder(TorchDispatchMode):
    """Records the calls of this package's operators by name, below autograd, with copies of the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "raddpo":
            assert not kwargs
            copies = tuple(arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args)
            self.calls.setdefault(func.name(), []).append((func, copies))
        return func(*args, **(kwargs or {}))
