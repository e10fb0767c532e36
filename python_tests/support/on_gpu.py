"""What the tests on a GPU share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import raddpo_ext as rx

#: How often a test that looks for a rare outcome runs again.
REPEATS = 100
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        not torch._C._dispatch_has_kernel_for_dispatch_key("raddpo::beam_step", "CUDA"),
        reason="the extension was built without CUDA",
    ),
]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error for whatever waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def moved(state: rx.BeamState, device: str) -> rx.BeamState:
    return rx.BeamState(*(part.to(device) for part in vars(state).values()))
