"""Checks and converts the arguments that the losses over sessions have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.losses import session_loss
from raddpo_ext.losses.session import SessionBatch


def check_input(value: Any, name: str, sessions: Any, dim: int) -> None:
    """Check the differentiable argument against the sessions."""
    _check.instance(value, name, Tensor)
    _check.instance(sessions, "sessions", SessionBatch)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")
    if value.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimension{'s' * (dim > 1)}, got shape {tuple(value.shape)}")
    if value.device != sessions.device:
        raise ValueError(f"{name} must be on the device of sessions, {sessions.device}, got {value.device}")


def constant(value: Any, name: str, like: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Check the dtype, shape and device of ``value``, and return it contiguous and without gradient."""
    _check.instance(value, name, Tensor)
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")
    return (value.detach() if value.requires_grad else value).contiguous()


def floats(value: Any, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
    """Like :func:`constant` for any floating-point dtype, which becomes that of ``like``."""
    given = constant(value, name, like, _check.float_tensor(value, name).dtype, shape)
    return given if given.dtype == like.dtype else given.to(like.dtype)


def check_nan(logps: Tensor, name: str, sessions: SessionBatch) -> None:
    """Raise ValueError for the first NaN within the lengths."""
    bad = (logps.isnan() & sessions.mask()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(f"{name}[{row}, {column}] is NaN")


def pair_weights(weights: Any, like: Tensor, sessions: SessionBatch, check: bool) -> Tensor | None:
    """Check ``weights``, and return them as the operator takes them, in the dtype of ``like``."""
    weights = session_loss.pair_weights(weights, sessions.num_pairs, sessions.device)
    if weights is None:
        return None
    if check:
        session_loss.check_weights(weights, "pair_weights")
    return weights.to(like.dtype)


def level_weights(weights: Any, like: Tensor, check: bool) -> Tensor | None:
    """Check ``level_weights``, numbers or a tensor, and return them in the dtype of ``like``."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        if not isinstance(weights, Sequence):
            raise TypeError(f"level_weights must be a sequence or a tensor of numbers, got {weights!r}")
        numbers = [_check.not_negative(weight, f"level_weights[{i}]") for i, weight in enumerate(weights)]
        # Filled on the device one by one: copying the list to a GPU would synchronise.
        given = torch.cat([like.new_full((1,), number) for number in numbers]) if numbers else like.new_empty(0)
        return constant(given, "level_weights", like, like.dtype, like.shape[1:])
    weights = constant(weights.to(like.dtype), "level_weights", like, like.dtype, like.shape[1:])
    if _check.reads_values(weights, check):
        session_loss.check_weights(weights, "level_weights")
    return weights


def divisors(
    normalizer: Sequence[Any] | Tensor | None, reduction: str, like: Tensor, check: bool, first: str = "sessions"
) -> dict[str, Any]:
    """The divisors of preference and SFT that replace the counts: a float64 tensor ``[2]``, or two numbers.

    ``first``: what the first one counts, for the error.
    """
    if normalizer is None:
        return {}
    if reduction != "mean":
        raise ValueError(
            f"normalizer must be None with reduction={reduction!r}, which does not divide, got {normalizer!r}"
        )
    # Two numbers go to the operator as numbers, tensors as one tensor: reading them would synchronise.
    values = list(normalizer) if isinstance(normalizer, Sequence | Tensor) else [normalizer]
    if len(values) != 2:
        raise ValueError(f"normalizer must be ({first}, tokens), got {normalizer!r}")
    if not any(isinstance(value, Tensor) for value in values):
        sessions, tokens = (_check.positive(value, f"normalizer[{i}]") for i, value in enumerate(values))
        return {"session_divisor": sessions, "token_divisor": tokens}
    divisors = torch.stack([_divisor(value, f"normalizer[{i}]", like) for i, value in enumerate(values)])
    if _check.reads_values(divisors, check):
        _check.none(
            ~((divisors > 0) & (divisors < math.inf)),
            lambda i: f"normalizer[{i}] must be finite and positive, got {float(divisors[i])}",
        )
    return {"divisors": divisors}


def _divisor(value: Any, name: str, like: Tensor) -> Tensor:
    """A positive number or a tensor of one element as a float64 scalar on the device of ``like``."""
    if not isinstance(value, Tensor):
        return torch.full((), _check.positive(value, name), dtype=torch.float64, device=like.device)
    if value.numel() != 1 or value.device != like.device:
        raise ValueError(f"{name} must be a number or a tensor of one element on {like.device}, got {value!r}")
    return value.detach().reshape(()).to(torch.float64)
