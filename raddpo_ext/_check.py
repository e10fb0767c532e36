"""Argument checks shared by the public functions. Every error names the argument and the value."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def integer(value: Any, name: str, minimum: int | None = None, maximum: int = 2**63 - 1) -> int:
    """``value`` as an int in ``[minimum, maximum]``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    if number > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {number}")
    return number


def width(value: Any, name: str) -> int:
    """``value`` as a positive number of beams or results. Kernels count both in 32 bits."""
    return integer(value, name, 1, 2**31 - 1)


def number(value: Any, name: str) -> float:
    """``value`` as a finite float."""
    if not isinstance(value, (float, int, numbers.Real)):  # the abstract class last: it is slow
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not -math.inf < number < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite, got {value}")
    return number


def positive(value: Any, name: str) -> float:
    """``value`` as a finite float above 0."""
    if number(value, name) <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return float(value)


def not_negative(value: Any, name: str) -> float:
    """``value``, a finite number of at least 0."""
    if number(value, name) < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return float(value)


def instance(value: Any, name: str, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


def choice(value: Any, name: str, choices: tuple[str, ...]) -> int:
    """The position of ``value`` in ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return choices.index(value)


def reads_values(tensor: Tensor, check: bool) -> bool:
    """Whether checks that depend on values run: on the CPU, but that no graph can hold them, or when asked for."""
    return check or (tensor.device.type == "cpu" and not torch.compiler.is_compiling())


def int64_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {_kind(value)}")


def float_tensor(value: Any, name: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        known = f"{', '.join(names)} or {last}" if names else last
        raise TypeError(f"{name} must be a {known} tensor, got {_kind(value)}")
    return value


def _kind(value: Any) -> Any:
    return value.dtype if isinstance(value, Tensor) else type(value).__name__


def integer_tensor(value: Any, name: str, dim: int) -> Tensor:
    """A torch tensor, numpy array or nested list of integers as an int64 tensor of ``dim`` dimensions."""
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(integer_array(value, name, dim).astype(np.int64))
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    if tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got shape {tuple(tensor.shape)}")
    return tensor.to(torch.int64)


def integer_array(value: Any, name: str, dim: int) -> np.ndarray:
    """A torch tensor, numpy array or nested list of integers as a C-contiguous numpy array in native byte order.

    Keeps the integer type.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():  # numpy lacks some of these types, such as bfloat16
            raise TypeError(f"{name} must hold integers, got {value.dtype}")
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array of integers: {error}") from None
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    if array.ndim != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got shape {array.shape}")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def lengths(value: Any, rows: int, minimum: int, maximum: int) -> Tensor:
    """The argument ``lengths`` as int64 ``[rows]`` in ``[minimum, maximum]``."""
    tensor = integer_tensor(value, "lengths", 1)
    if len(tensor) != rows:
        raise ValueError(f"lengths must have one entry per row of sids ({rows}), got {len(tensor)}")
    none(
        (tensor < minimum) | (tensor > maximum),
        lambda row: f"lengths[{row}] = {int(tensor[row])} is outside [{minimum}, {maximum}]",
    )
    return tensor


def widths(value: int | Sequence[int], levels: int, maximum: int) -> list[int]:
    """The argument ``beam_width`` as one width per level. A list has ``levels`` to ``maximum`` entries."""
    if isinstance(value, Sequence):
        if not levels <= len(value) <= maximum:
            entries = f"{levels}" if levels == maximum else f"{levels} to {maximum}"
            raise ValueError(
                f"beam_width must be an integer or have one entry per level ({entries}), got {list(value)}"
            )
        return [width(entry, f"beam_width[{i}]") for i, entry in enumerate(value)][:levels]
    return [width(value, "beam_width")] * levels


def none(bad: Tensor, message: Callable[[int], str]) -> None:
    """Raise ValueError with the message for the first true entry of ``bad``, a boolean vector."""
    if bool(bad.any()):
        raise ValueError(message(int(bad.nonzero()[0, 0])))
