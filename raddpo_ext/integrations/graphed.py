"""Captures a whole search of a retriever in a CUDA graph: one launch instead of about a thousand."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from raddpo_ext.integrations.base_model import base_model
from raddpo_ext.integrations.decoders import SharedPrefixDecoder
from raddpo_ext.logps.head import Head

COLUMNS = 64  # prompts are padded to a multiple of this, so that few shapes occur
MOST_GRAPHS = 16  # per retriever
_DEVICE = "cuda"
_WARM_UPS = 2  # runs before a capture, in which libraries initialise and choose their kernels
_capturing = threading.Lock()  # torch allows one capture at a time


def check_capturable(model: Any) -> None:
    """Raise ValueError for a model whose search cannot be captured."""
    base = base_model(model)
    reason = None
    if base.device.type != _DEVICE:
        reason = f"the model is on {base.device}"
    elif base.config.is_encoder_decoder:
        reason = f"{type(base).__name__} is an encoder-decoder"
    elif hasattr(model, "_orig_mod"):
        reason = "the model is compiled, and may capture graphs of its own"
    elif base.config._attn_implementation == "flex_attention":
        reason = "the model's attention is 'flex_attention', which is compiled for each mask: use 'sdpa'"
    elif torch.is_autocast_enabled(_DEVICE):
        reason = "autocast is on, and frees its copies of the weights when it ends: convert the model instead"
    if reason is not None:
        raise ValueError(f"cuda_graph = True, but {reason}")


class BufferedCache(DynamicCache):
    """A KV cache in buffers that are large enough for the whole search, so that adding tokens moves nothing.

    Args:
        room: number of tokens to be added after the prompt.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self.used: dict[int, int] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values ``[B, heads, T, D]`` of a layer; returns all that it holds. Overridden."""
        begin = self.get_seq_length(layer_idx)
        end = begin + key_states.shape[2]
        if begin == 0:  # the prompt
            self.buffers[layer_idx] = tuple(  # type: ignore[assignment]
                x.new_empty(*x.shape[:2], end + self.room, x.shape[3]) for x in (key_states, value_states)
            )
        keys, values = self.buffers[layer_idx]
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        self.used[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.used.get(layer_idx, 0)


class CapturedDecoder(SharedPrefixDecoder):
    """A :class:`SharedPrefixDecoder` that can be captured: no value on the GPU decides what is launched.

    Args:
        model, head, prompts, mask: see :class:`SharedPrefixDecoder`.
        fed: number of beams that are fed per query, over all steps.
    """

    def __init__(self, model: Any, head: Head | None, prompts: Tensor, mask: Tensor, fed: int) -> None:
        super().__init__(model, head, prompts, mask)
        self.cache = BufferedCache(fed)

    def prompt_mask(self) -> Any:
        """Overridden to make a mask always. Whether there is padding is a value on the GPU."""
        columns = self.mask.shape[1]
        options: Any = {"dtype": torch.bool, "device": self.mask.device}
        before = torch.ones(columns, columns, **options).tril()
        # Padding attends to itself, because a softmax over nothing is NaN.
        return self.attention_mask(before & self.mask[:, None] | torch.eye(columns, **options))


class _Graph:
    """A search that was captured with inputs of one shape."""

    def __init__(
        self, search: Callable[..., Any], model: Any, inputs: Sequence[Tensor], stream: Any, pool: Any
    ) -> None:
        self._search = search  # keeps the index alive: its addresses are in the graph, and its id is in the key
        # The graph holds their addresses. They are kept alive, and compared before every replay.
        self._weights = [*model.parameters(), *model.buffers()]
        self._addresses = self._current_addresses()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # restores the caller's stream, also if the capture fails
            self._inputs = [torch.empty_like(x, device=model.device).copy_(x) for x in inputs]
            # Capture after some ordinary runs.
            for _ in range(_WARM_UPS):
                search(*self._inputs)
            # "thread_local" lets other threads allocate memory meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._result = search(*self._inputs)

    def _current_addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights]

    @property
    def is_current(self) -> bool:
        """Whether the weights are still at the addresses that the graph holds."""
        return self._addresses == self._current_addresses()

    @property
    def pool(self) -> Any:
        return self._graph.pool()

    def replay(self, inputs: Sequence[Tensor]) -> Any:
        """Run the search on these inputs, which have the captured shapes; returns a copy of the result."""
        for buffer, given in zip(self._inputs, inputs, strict=True):
            buffer.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result._make(None if part is None else part.clone() for part in self._result)


class SearchGraphs:
    """The graphs of one retriever, one per shape of its calls; drops the least recently used one.

    The graphs share one memory pool, so together they need about as much memory as the largest one. Replays therefore
    run one after another, even from different threads and streams.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._stream: Any = None
        self._done: Any = None

    def clear(self) -> None:
        with self._lock:
            self._graphs.clear()

    def run(self, key: Hashable, search: Callable[..., Any], model: Any, *inputs: Tensor) -> Any:
        """``search(*inputs)``, captured at the first call with this key.

        Args:
            key: everything the search depends on except the values of its inputs. It may hold ids of objects that
                ``search`` keeps alive, because the graph keeps ``search``.
            search: returns a named tuple of tensors and None; what it launches must depend on shapes only.
            model: the model whose weights it reads.
            inputs: prompts and mask on the CPU, see :class:`CapturedDecoder`, and other tensors that change between
                calls, wherever they are. They are copied into buffers of the graph.
        """
        # A graph must be usable whether or not later calls are in inference mode.
        with self._lock, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(model.device):
            if self._stream is None:
                self._stream, self._done = torch.cuda.Stream(), torch.cuda.Event()
            current = torch.cuda.current_stream()
            current.wait_event(self._done)  # the last replay, maybe on another stream
            graph = self._graphs.pop(key, None)
            if graph is None or not graph.is_current:
                del graph  # frees its memory for the new one
                graph = self._capture(search, model, inputs, current)
            self._graphs[key] = graph
            result = graph.replay(inputs)
            self._done.record()
            return result

    def _capture(self, search: Callable[..., Any], model: Any, inputs: Sequence[Tensor], current: Any) -> _Graph:
        """A new graph, in the memory pool of the others, after dropping the oldest graphs."""
        while len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        pool = next(iter(self._graphs.values())).pool if self._graphs else None
        with _capturing:
            # The capture has a stream of its own: order it with the caller's, before and after.
            self._stream.wait_stream(current)
            try:
                graph = _Graph(search, model, inputs, self._stream, pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    f"cuda_graph = True, but a search with {type(model).__name__} could not be captured because of "
                    "the error above; set cuda_graph = False"
                ) from error
            current.wait_stream(self._stream)
        return graph
