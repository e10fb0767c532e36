"""Timing on a GPU: CUDA events around replays of a graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COPY_BYTES = 4 << 30
PRODUCT_SIZE = 8192
REPLAYS = 30
STEPS = 32  # at least, in a graph


def median_us(run: Callable[[], Any], inner: int, replays: int | None = None) -> float:
    """Median time of a run, in microseconds, over ``inner``."""
    for _ in range(3):
        run()
    times = []
    for _ in range(replays or REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * statistics.median(times) / inner


def graph_us(step: Callable[[Tensor], Any], sets: list[Tensor], least: int | None = None) -> float:
    """Time of a step in a graph that goes through the sets in turn, ``least`` (``STEPS``) steps or more."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(sets[0])
    torch.cuda.synchronize()
    steps = max(least or STEPS, len(sets))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(steps):
            step(sets[i % len(sets)])
    return median_us(graph.replay, steps)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a device-to-device copy."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (1e-6 * median_us(lambda: target.copy_(source), 1))


def product_rate() -> float:
    """Floating-point operations a second of a large bfloat16 matrix product on random data."""
    size = PRODUCT_SIZE
    x, y = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (1e-6 * median_us(lambda: x @ y, 1))
