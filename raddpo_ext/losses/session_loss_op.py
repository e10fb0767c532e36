"""The operators behind the session losses: their arguments, checked and converted, fake kernels and autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._autograd import below_autograd as _below_autograd
from raddpo_ext._autograd import differentiable_once, refuse_transforms_of_operator
from raddpo_ext.losses.session import SessionBatch

_NAMES = "session_loss (rad_dpo_loss, multilabel_contrastive_loss)"  # in errors about derivatives
REDUCTION = ("mean", "sum", "none")


def call(
    logps: Tensor, sessions: SessionBatch, ref_logps: Tensor | None, pair_weights: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """The operator. Run at once, its autograd kernel need not be reached through the dispatcher, which takes 15 us."""
    layout = (sessions.tokens, sessions.lengths, sessions.offsets, sessions.num_positives, sessions.pair_offsets)
    contiguous = [tensor.contiguous() for tensor in (logps, *layout)]
    arguments = (*contiguous, sessions.num_pairs, ref_logps, pair_weights, *rest)
    if torch.compiler.is_compiling():
        return torch.ops.raddpo.session_loss.default(*arguments)
    try:
        return _differentiable(*arguments)
    except RuntimeError:
        if pair_weights is not None and pair_weights.device.type == "cpu":
            _check_weights(pair_weights, "pair_weights")  # names what the operator only refuses
        raise


def check_input(value: Any, name: str, sessions: Any, dim: int) -> None:
    _check.instance(value, name, Tensor)
    _check.instance(sessions, "sessions", SessionBatch)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")
    if value.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimension{'s' * (dim > 1)}, got shape {tuple(value.shape)}")
    if value.device != sessions.device:
        raise ValueError(f"{name} must be on the device of sessions, {sessions.device}, got {value.device}")


def constant(value: Any, name: str, like: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """``value``, a tensor of this type and shape on the device of ``like``, contiguous and without gradient."""
    _check.instance(value, name, Tensor)
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")
    return (value.detach() if value.requires_grad else value).contiguous()


def positive(value: Any, name: str) -> float:
    value = _check.number(value, name)
    if value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    return value


def not_negative(value: Any, name: str) -> float:
    value = _check.number(value, name)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value


def _reads_values(tensor: Tensor, check: bool) -> bool:
    """Whether values are checked: not where that synchronises, nor in a graph, which cannot depend on them."""
    return check or (tensor.device.type == "cpu" and not torch.compiler.is_compiling())


def _check_weights(weights: Tensor, name: str) -> None:
    """Raises for the first weight that is not finite and at least 0."""
    if weights.numel():
        least, most = weights.aminmax()  # NaN if there is one
        if not (float(least) >= 0 and float(most) < math.inf):
            _check.none(
                ~((weights >= 0) & (weights < math.inf)),
                lambda i: f"{name}[{i}] = {float(weights[i])} is not finite and at least 0",
            )


def check_nan(logps: Tensor, name: str, sessions: SessionBatch) -> None:
    bad = (logps.isnan() & sessions.mask()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(f"{name}[{row}, {column}] is NaN")


def pair_weights(weights: Any, like: Tensor, sessions: SessionBatch, check: bool) -> Tensor | None:
    if weights is None:
        return None
    _check.instance(weights, "pair_weights", Tensor)
    if not weights.is_floating_point():
        raise TypeError(f"pair_weights must hold floating-point numbers, got {weights.dtype}")
    weights = constant(weights, "pair_weights", like, weights.dtype, (sessions.num_pairs,)).to(like.dtype)
    if check:
        _check_weights(weights, "pair_weights")
    return weights


def level_weights(weights: Any, like: Tensor, check: bool) -> Tensor | None:
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        if not isinstance(weights, Sequence):
            raise TypeError(f"level_weights must be a sequence or a tensor of numbers, got {weights!r}")
        numbers = [not_negative(weight, f"level_weights[{i}]") for i, weight in enumerate(weights)]
        # One by one on the device: a copy of the list would wait for a GPU.
        given = torch.cat([like.new_full((1,), number) for number in numbers]) if numbers else like.new_empty(0)
        return constant(given, "level_weights", like, like.dtype, like.shape[1:])
    weights = constant(weights.to(like.dtype), "level_weights", like, like.dtype, like.shape[1:])
    if _reads_values(weights, check):
        _check_weights(weights, "level_weights")
    return weights


def divisors(
    normalizer: Sequence[Any] | Tensor | None, reduction: str, like: Tensor, check: bool
) -> tuple[Tensor | None, float, float]:
    """Divisors of preference and SFT: a float64 tensor ``[2]``, or two numbers, 0 for the counts."""
    if normalizer is None:
        return None, 0.0, 0.0
    if reduction != "mean":
        raise ValueError(f"normalizer must be None with reduction={reduction!r}, which divides nothing")
    values = list(normalizer) if isinstance(normalizer, Sequence | Tensor) else [normalizer]
    if len(values) != 2:
        raise ValueError(f"normalizer must be (sessions, tokens), got {normalizer!r}")
    if not any(isinstance(value, Tensor) for value in values):
        return None, positive(values[0], "normalizer[0]"), positive(values[1], "normalizer[1]")
    divisors = torch.stack([_divisor(value, f"normalizer[{i}]", like) for i, value in enumerate(values)])
    if _reads_values(divisors, check):
        _check.none(
            ~((divisors > 0) & (divisors < math.inf)),
            lambda i: f"normalizer[{i}] must be finite and above 0, got {float(divisors[i])}",
        )
    return divisors, 0.0, 0.0


def _divisor(value: Any, name: str, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.full((), positive(value, name), dtype=torch.float64, device=like.device)
    if value.numel() != 1 or value.device != like.device:
        raise ValueError(f"{name} must have one element, on {like.device}, got {value!r}")
    return value.detach().reshape(()).to(torch.float64)


@torch.library.register_fake("raddpo::session_loss")
def _(logps: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    num_positives, num_pairs, reduction, need_gradient = (arguments[i] for i in (3, 5, 22, 23))
    loss = (num_positives.shape[0],) if reduction == REDUCTION.index("none") else ()
    gradient = logps.shape if need_gradient else (0, logps.shape[1])
    shapes = (loss, loss, loss, logps.shape[:1], (num_pairs,), (), gradient, (2,))
    return tuple(logps.new_empty(shape) for shape in shapes)


@torch.library.register_fake("raddpo::session_loss_backward")
def _(loss: Tensor | None, preference: Tensor | None, sft: Tensor | None, logps: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(logps)


class _SessionLoss(torch.autograd.Function):
    """Of the log-probs and the rest of the operator's arguments, in one tuple: each argument of its own would cost."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, arguments: tuple) -> tuple[Tensor, ...]:
        outputs = _below_autograd(torch.ops.raddpo.session_loss.default, logps, *arguments)
        _, lengths, offsets, num_positives = arguments[:4]
        gradient, scales = outputs[6:]
        ctx.save_for_backward(logps, gradient, scales, lengths, offsets, num_positives, arguments[9])
        ctx.sft_weight, ctx.overwritten, ctx.op = arguments[15], False, _NAMES
        ctx.mark_non_differentiable(*outputs[3:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        if all(grad is None for grad in grads[:3]):
            return None, None
        arguments = (*grads[:3], *saved, ctx.sft_weight)
        return _below_autograd(torch.ops.raddpo.session_loss_backward.default, *arguments), None


def _differentiable(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator's autograd kernel. ``torch.library.register_autograd`` makes one that takes 150 us, for so many
    arguments."""
    refuse_transforms_of_operator(_NAMES, arguments[0])
    need_gradient = arguments[-1]
    if need_gradient:
        return _SessionLoss.apply(arguments[0], arguments[1:])
    return _below_autograd(torch.ops.raddpo.session_loss.default, *arguments)


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(f"{_NAMES} has no second derivative")


_library = torch.library.Library("raddpo", "FRAGMENT")
_library.impl("session_loss", _differentiable, "Autograd")
torch.library.register_autograd("raddpo::session_loss_backward", _no_second_derivative)
