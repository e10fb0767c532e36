"""Embeddings, read in chunks of rows: a catalogue's need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raddpo_ext import _check

CHUNK = 1 << 9  # rows: of 768 numbers, what the caches hold


def check_embeddings(x: Any) -> None:
    """Floating-point ``[N, D]``, a tensor on the CPU or an array."""
    if not isinstance(x, (Tensor, np.ndarray)):
        raise TypeError(f"x must be a tensor or a numpy array, got {type(x).__name__}")
    if isinstance(x, Tensor):
        _check.float_tensor(x, "x")
        if x.device.type != "cpu":
            raise ValueError(f"x must be on the CPU, got {x.device}")
    elif x.dtype.kind != "f":
        raise TypeError(f"x must hold floating-point numbers, got {x.dtype}")
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"x must have shape [N, D] with D at least 1, got {tuple(x.shape)}")


def rows_of(x: Tensor | np.ndarray, rows: slice | Tensor) -> Tensor:
    """Some rows in float32, not to be written to: a slice may share its memory with ``x``. Raises ValueError if their
    squares, which distances are made of, are not finite."""
    if isinstance(x, Tensor):
        part = x.detach()[rows].to(torch.float32)
    else:
        with np.errstate(over="ignore"):  # told of below
            part = torch.from_numpy(np.require(x[rows if isinstance(rows, slice) else rows.numpy()], np.float32, "W"))
    numbers = part.flatten()
    if not bool(torch.isfinite(numbers.dot(numbers))):  # the squares of all rows together, in one pass
        bad = ~torch.isfinite(part.square().sum(1))  # vector_norm would not square a single number
        first = rows.start or 0 if isinstance(rows, slice) else 0
        number = (lambda row: first + row) if isinstance(rows, slice) else (lambda row: int(rows[row]))
        _check.none(bad, lambda row: f"x[{number(row)}] must be finite in float32, squared too, got {x[number(row)]}")
    return part


def chunks(x: Tensor | np.ndarray) -> Iterator[tuple[slice, Tensor]]:
    """Slices of at most ``CHUNK`` rows, and these rows as :func:`rows_of` gives them."""
    for begin in range(0, len(x), CHUNK):
        rows = slice(begin, min(begin + CHUNK, len(x)))
        yield rows, rows_of(x, rows)
