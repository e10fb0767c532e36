"""``torch.cuda`` for the fake device: streams that only know whether they are busy, graphs that are tapes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..cuda_on_cpu.shim import compiler
from .tensor import CUDA, FakeTensor, State, register_factories, wait

PROPERTIES = SimpleNamespace(
    name="fake", major=9, minor=0, multi_processor_count=4, total_memory=1 << 34, L2_cache_size=1 << 10
)


class Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.busy = False
        self.device, self.device_index, self.device_type = CUDA, 0, 1
        self.cuda_stream = self.stream_id = id(self)

    def synchronize(self) -> None:
        wait("Stream.synchronize")
        self.busy = False

    def query(self) -> bool:
        return not self.busy

    def wait_stream(self, stream: Stream) -> None:
        self.busy |= stream.busy

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event


class Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timed, self.at = enable_timing, None

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        wait("Event.synchronize")

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        if not (self.timed and other.timed and self.at and other.at):
            raise RuntimeError("Both events must be created with enable_timing=True and recorded")
        return max(1e-3, 1e3 * (other.at - self.at))


class CUDAGraph:
    """A capture records each operator with its very tensors; a replay runs them again and writes where they lie."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def record(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [
            (place, x)
            for place, x in enumerate(tree_leaves(outputs))
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in inputs
        ]
        if made or func._schema.is_mutable:  # the rest are views, which follow their memory
            self.calls.append((func, args, kwargs, made))

    @torch.no_grad()
    def replay(self) -> None:
        assert State.capture is None, "a graph cannot be replayed while another is captured"
        for func, args, kwargs, made in self.calls:
            outputs = func(*args, **kwargs)
            outputs = [outputs] if isinstance(outputs, Tensor) else tree_leaves(outputs)
            for place, old in made:
                old.copy_(outputs[place])

    def pool(self) -> tuple[int, int]:
        return (0, id(self))

    def reset(self) -> None:
        self.calls = []


_LOCAL = threading.local()
_DEFAULT = Stream()


def current_stream(device: Any = None) -> Stream:
    return getattr(_LOCAL, "stream", _DEFAULT)


@contextmanager
def stream(one: Stream | None) -> Iterator[None]:
    before = current_stream()
    _LOCAL.stream = one or before
    try:
        yield
    finally:
        _LOCAL.stream = before


@contextmanager
def graph(captured: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Any:
    if State.capture is not None:
        raise RuntimeError("a capture is under way")
    wait("a capture's begin")
    with globals()["stream"](stream or Stream()):
        State.capture = captured
        try:
            yield
        finally:
            State.capture = None


def synchronize(device: Any = None) -> None:
    wait("torch.cuda.synchronize")


def _all_done() -> None:
    current_stream().busy = _DEFAULT.busy = False


def _sleep(cycles: int) -> None:
    current_stream().busy = True


class Profile:
    """The kernels that ran, named as torch's profiler names them."""

    def __init__(self, **_: Any) -> None:
        self.events: list[Any] = []

    def __enter__(self) -> Profile:
        self.before = dict(State.calls)
        return self

    def __exit__(self, *_: Any) -> None:
        for name, count in State.calls.items():
            if count := count - self.before.get(name, 0):
                for kind in ("float, (raddpo::Normalize)0", "float, (raddpo::Normalize)1"):
                    key = f"void raddpo::cuda::(anonymous namespace)::{name}_kernel<{kind}>(raddpo::cuda::Arguments)"
                    self.events.append(SimpleNamespace(key=key, count=count, device_time_total=1.0 * count))

    def key_averages(self) -> list[Any]:
        return self.events


def set_sync_debug_mode(mode: Any) -> None:
    names = ["default", "warn", "error"]
    State.sync_debug_mode = names[mode] if isinstance(mode, int) else mode
    assert State.sync_debug_mode in names


def _compile(model: Any = None, **_: Any) -> Any:
    def refused(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the fake device compiles nothing")

    return (lambda model: refused) if model is None else refused


def _moved(make: Any) -> Any:
    """torch.tensor and its kin, which make the values on the host and copy them."""

    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if device is None:
            device = torch.utils._device.CURRENT_DEVICE or "cpu"
            if args and isinstance(args[0], FakeTensor):
                device = CUDA
        if torch.device(device).type != "cuda":
            return make(*args, device=device, **kwargs)
        if args and isinstance(args[0], FakeTensor):
            return make(*args, **kwargs)
        gradient = kwargs.pop("requires_grad", False)
        with torch.device("cpu"):
            values = make(*args, device="cpu", **kwargs)
        return values.to(CUDA).requires_grad_(gradient)

    return made


def _pin_memory(self: Tensor, device: Any = None) -> Tensor:
    if isinstance(self, FakeTensor):
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")
    pinned = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype).copy_(self)  # not where rows overlap
    State.pinned.add(pinned.untyped_storage().data_ptr())
    return pinned


def _is_pinned(self: Tensor, device: Any = None) -> bool:
    return not isinstance(self, FakeTensor) and self.untyped_storage().data_ptr() in State.pinned


def _register_guard() -> None:
    program = compiler()
    if program is None:
        raise RuntimeError("the fake device needs a C++ compiler (g++, or the one named by CXX)")
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-isystem{torch_folder / 'include'}"]
        libraries = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        source = Path(__file__).with_name("guard.cpp")
        subprocess.run([program, *flags, str(source), *libraries, "-o", str(library)], check=True)
        ctypes.CDLL(str(library), mode=os.RTLD_NOW)


def install() -> None:
    """Puts the fake device in place of ``torch.cuda``, for good."""
    import torch._dynamo  # looks at torch.cuda as it is, once

    _register_guard()
    torch.__future__.set_swap_module_params_on_conversion(True)
    State.on_wait = _all_done
    State.library = register_factories()
    nothing = lambda *_, **__: None  # noqa: E731
    number = lambda *_, **__: 0  # noqa: E731
    cuda: dict[str, Any] = {
        "_lazy_init": nothing, "init": nothing, "is_initialized": lambda: True, "is_available": lambda: True,
        "device_count": lambda: 1, "current_device": number, "set_device": nothing, "_is_in_bad_fork": lambda: False,
        "get_device_properties": lambda *_: PROPERTIES, "get_device_name": lambda *_: PROPERTIES.name,
        "get_device_capability": lambda *_: (9, 0), "is_bf16_supported": lambda *_, **__: True,
        "memory_allocated": number, "max_memory_allocated": number, "memory_reserved": number,
        "max_memory_reserved": number, "reset_peak_memory_stats": nothing, "empty_cache": nothing,
        "ipc_collect": nothing, "mem_get_info": lambda *_: (1 << 28, 1 << 34), "memory_stats": lambda *_: {},
        "manual_seed": nothing, "manual_seed_all": nothing, "seed_all": nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(), "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": nothing, "set_rng_state_all": nothing,
        "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "stream": stream,
        "current_stream": current_stream, "default_stream": lambda *_: _DEFAULT, "device": lambda *_: nullcontext(),
        "graph_pool_handle": lambda: (0, 0), "synchronize": synchronize, "_sleep": _sleep,
        "set_sync_debug_mode": set_sync_debug_mode, "is_current_stream_capturing": lambda: State.capture is not None,
    }  # fmt: skip
    for name, value in cuda.items():
        setattr(torch.cuda, name, value)
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _moved(getattr(torch, name)))
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = _pin_memory, _is_pinned
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda *_, **__: CUDA
    torch.accelerator.device_count = lambda: 1
    torch.accelerator.current_device_index = number
    torch.profiler.profile, torch.compile = Profile, _compile
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    torch._C._dispatch_has_kernel_for_dispatch_key = lambda name, key: (
        (key == "CUDA" and name.startswith("raddpo::")) or has_kernel(name, key)
    )
