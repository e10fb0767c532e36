"""Runs a function on several ranks of a gloo process group, each in a process of its own."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def on_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[Any]:
    """What ``function(*arguments)`` returns on each rank.

    The ranks import the function's module anew, so it stands at the top level of one. If a rank raises, so does this,
    with that rank's traceback; ranks that then wait in vain are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (Path(folder), function, arguments, ranks), nprocs=ranks)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(ranks)]


def _rank(rank: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...], ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(function(*arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # on a busy machine a thread of torch's can outlive the interpreter, whose end then aborts the process
