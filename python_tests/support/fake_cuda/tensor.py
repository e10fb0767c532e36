"""The tensors of the fake device, and what a real one would refuse of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)

# What reads a value, or a number of results, back to the host. `isin` does so unless one side is small.
SYNCHRONISES = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "isin", "bincount", "histc",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "tensor_split", "repeat_interleave", "multinomial",
}  # fmt: skip
COPIES = {"copy_", "_to_copy", "_copy_from"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}
TAKES_SCALARS = {"fill_", "fill", "masked_fill", "masked_fill_", "index_put", "index_put_", "_index_put_impl_"}


_DEVICE = torch.ops.prim.device.default


class State:
    """What forbids waiting, and who records; of the process, as on a real device."""

    sync_debug_mode = "default"
    capture: Any = None  # the graph that is being captured
    calls: ClassVar[dict[str, int]] = {}  # how often each raddpo operator ran
    pinned: ClassVar[set[int]] = set()  # addresses of pinned storages
    on_wait: Callable[[], None] = staticmethod(lambda: None)


def wait(what: str) -> None:
    """The host waits for the device here, unless that is forbidden."""
    if State.capture is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {what} waits for the device")
    if State.sync_debug_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
    State.on_wait()


class Facts(NamedTuple):
    """Of an operator; asked of it once, as every call passes here."""

    name: str
    ours: bool
    mutable: bool


@cache
def facts_of(func: Any) -> Facts:
    return Facts(func.overloadpacket.__name__, func.namespace == "raddpo", func._schema.is_mutable)


def _unwrap(x: Any, given: dict[int, FakeTensor], host: dict[int, Tensor]) -> Any:
    """The CPU's tensors in place of the device's; notes which there were, and which lay on the host."""
    if isinstance(x, FakeTensor):
        given[id(x.elem)] = x
        return x.elem
    if isinstance(x, Tensor):
        host[id(x)] = x
    elif isinstance(x, (tuple, list)):
        return type(x)([_unwrap(one, given, host) for one in x])
    elif isinstance(x, dict):
        return {name: _unwrap(one, given, host) for name, one in x.items()}
    return x


class FakeTensor(torch.Tensor):
    """A CPU tensor's memory and shape under the device's name and dispatch keys; ``elem`` is the CPU's tensor."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> FakeTensor:
        self = torch.Tensor._make_subclass(cls, elem, False, dispatch_device=True, device_for_backend_keys=CUDA)
        self.elem = elem
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return CUDA
        facts = facts_of(func)
        kwargs = dict(kwargs or {})
        given: dict[int, FakeTensor] = {}  # by the identity of the CPU's tensor
        host: dict[int, Tensor] = {}
        plain_args, plain_kwargs = _unwrap(args, given, host), _unwrap(kwargs, given, host)
        if host and facts.name not in COPIES:
            check_devices(func, facts, args, kwargs)
        check_waits(func, facts, args, kwargs)
        target = kwargs.get("device") or CUDA
        if "device" in kwargs:
            plain_kwargs["device"] = torch.device("cpu")
        plain_kwargs.pop("pin_memory", None)
        outputs = func(*plain_args, **plain_kwargs)
        if facts.ours:
            State.calls[facts.name] = State.calls.get(facts.name, 0) + 1
        if State.capture is not None:
            State.capture.record(func, plain_args, plain_kwargs, outputs)
        if facts.mutable:
            for wrapped in given.values():
                if wrapped.shape != wrapped.elem.shape or wrapped.stride() != wrapped.elem.stride():
                    wrapped.data = FakeTensor(wrapped.elem)  # it was resized
        on_device = torch.device(target).type == "cuda"

        def wrap(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return type(x)(map(wrap, x))
            if not isinstance(x, Tensor) or id(x) in host:
                return x
            return given[id(x)] if id(x) in given else FakeTensor(x) if on_device else x

        return wrap(outputs)

    def __getitem__(self, index: Any) -> Any:
        """torch copies a list of indices to the device itself, where no kernel of ours is asked: it is made here."""
        return super().__getitem__(tuple(map(_index, index)) if isinstance(index, tuple) else _index(index))

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.detach().cpu()!r} on {CUDA}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return on_device, (self.detach().cpu(),)


def _index(one: Any) -> Any:
    return torch.tensor(one).to(CUDA) if isinstance(one, list) else one


def on_device(values: Tensor) -> Tensor:
    return values.to(CUDA)


def check_devices(func: Any, facts: Facts, args: Any, kwargs: Any) -> None:
    """All tensors lie on the device, but for what CUDA's own kernels take from the host."""
    name = facts.name
    schema = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    scalars = torch.Tag.pointwise in func.tags or name in TAKES_SCALARS or name.startswith("_foreach")
    for argument, value in schema.items():
        for x in tree_leaves(value):
            if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
                continue
            if (scalars and x.dim() == 0) or (facts.ours and argument == "header"):
                continue
            if name in INDEXES and argument == "indices":
                wait(f"{func} copies its indices to the device")
                continue
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(argument {argument} of {func})"
            )


def check_waits(func: Any, facts: Facts, args: Any, kwargs: Any) -> None:
    name = facts.name
    if name in COPIES:
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        ends = {isinstance(args[0], FakeTensor), target_of(name, args, kwargs)}
        if len(ends) == 2:
            host = args[0] if not isinstance(args[0], FakeTensor) else args[1] if name == "copy_" else None
            pageable = host is None or host.untyped_storage().data_ptr() not in State.pinned
            if blocking or (State.capture is not None and pageable):
                wait(f"{func} copies between host and device")
    elif name in SYNCHRONISES and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
        wait(str(func))
    elif name in INDEXES:
        masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
        fills = name != "index" and len(tree_leaves(args[1])) == 1 and args[2].numel() == 1  # a masked_fill
        if masks and not fills:
            wait(f"{func} counts the True of a mask")


def target_of(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a copy's other end lies on the device."""
    if name == "copy_":
        return isinstance(args[1], FakeTensor)
    return torch.device(kwargs.get("device") or CUDA).type == "cuda"


def register_factories() -> torch.library.Library:
    """Everything that makes a tensor on a device begins with one of these two; valid as long as the result lives."""
    library = torch.library.Library("aten", "IMPL", "CUDA")

    def empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
              memory_format: Any = None) -> Tensor:  # fmt: skip
        options = {} if memory_format is None else {"memory_format": memory_format}
        return FakeTensor(torch.empty(size, dtype=dtype, device="cpu", **options))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
                      pin_memory: Any = None) -> Tensor:  # fmt: skip
        return FakeTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    library.impl("empty.memory_format", empty)
    library.impl("empty_strided", empty_strided)
    return library
