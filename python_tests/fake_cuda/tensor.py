"""The tensors of the fake device, and what a real one would refuse of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

# What reads a value, or a number of results, back to the host. `isin` does so unless one side is small.
SYNCHRONISES = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "isin", "bincount", "histc",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "tensor_split", "repeat_interleave", "multinomial",
}  # fmt: skip
COPIES = {"copy_", "_to_copy", "_copy_from"}
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_"}
TAKES_SCALARS = {"fill_", "fill", "masked_fill", "masked_fill_", "index_put", "index_put_", "_index_put_impl_"}


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
        if func is torch.ops.prim.device.default:
            return CUDA
        kwargs = dict(kwargs or {})
        check_devices(func, args, kwargs)
        check_waits(func, args, kwargs)
        target = torch.device(kwargs.get("device") or CUDA)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        given = {id(x.elem): x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)}
        plain_args, plain_kwargs = tree_map_only(FakeTensor, lambda x: x.elem, (args, kwargs))
        outputs = func(*plain_args, **plain_kwargs)
        if func.namespace == "raddpo":
            name = func.overloadpacket.__name__
            State.calls[name] = State.calls.get(name, 0) + 1
        if State.capture is not None:
            State.capture.record(func, plain_args, plain_kwargs, outputs)
        for wrapped in given.values():
            if wrapped.shape != wrapped.elem.shape or wrapped.stride() != wrapped.elem.stride():
                wrapped.data = FakeTensor(wrapped.elem)  # it was resized
        plain = {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}

        def wrap(x: Tensor) -> Tensor:
            if id(x) in given:
                return given[id(x)]
            return x if id(x) in plain or target.type != "cuda" else FakeTensor(x)

        return tree_map_only(Tensor, wrap, outputs)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.detach().cpu()!r} on {CUDA}"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return on_device, (self.detach().cpu(),)


def on_device(values: Tensor) -> Tensor:
    return values.to(CUDA)


def check_devices(func: Any, args: Any, kwargs: Any) -> None:
    """All tensors lie on the device, but for what CUDA's own kernels take from the host."""
    name = func.overloadpacket.__name__
    if name in COPIES:
        return
    schema = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    scalars = torch.Tag.pointwise in func.tags or name in TAKES_SCALARS or name.startswith("_foreach")
    for argument, value in schema.items():
        for x in tree_leaves(value):
            if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
                continue
            if (scalars and x.dim() == 0) or (func.namespace == "raddpo" and argument == "header"):
                continue
            if name in INDEXES and argument == "indices":
                wait(f"{func} copies its indices to the device")
                continue
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(argument {argument} of {func})"
            )


def check_waits(func: Any, args: Any, kwargs: Any) -> None:
    name = func.overloadpacket.__name__
    if name in COPIES:
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        ends = {isinstance(args[0], FakeTensor), target_of(func, args, kwargs)}
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


def target_of(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a copy's other end lies on the device."""
    if func.overloadpacket.__name__ == "copy_":
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
