"""A model's ``torch.nn.Linear`` layers by oneDNN, where that is faster than torch's choice."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raddpo_ext import _matmul
from raddpo_ext._autograd import differentiable_once, refuse_transforms

Model = TypeVar("Model", bound=nn.Module)


def use_onednn(model: Model, enabled: bool = True) -> Model:
    """Let a model's linear layers multiply float32 matrices by oneDNN on the CPU, where that is faster.

    torch multiplies by MKL, which keeps to AVX2 on processors that are not Intel's. Where these have AVX-512,
    oneDNN takes about half of the time, forward and backward. Elsewhere the model is left as it is. Results differ from
    MKL's by float32 rounding.

    Every layer of exactly the class ``torch.nn.Linear`` becomes an :class:`OneDNNLinear`, in place: parameters, hooks
    and ``state_dict`` stay. A layer uses oneDNN if its product is large enough; it does not within ``torch.compile``,
    under autocast, in other dtypes, and for parameters that are not plain tensors (DTensor). Gradients are the same,
    but the layers have no second derivative, no forward-mode derivative, and do not work within ``torch.func``: each is
    an error that names this function.

    Call it on the loaded model, before or after :class:`raddpo_ext.SIDRetriever` or a trainer gets it. Libraries that
    replace layers by their exact class (quantization) come first.

    Args:
        model: any module, on any device.
        enabled: False gives the layers their class back.

    Returns:
        ``model``.

    Raises:
        TypeError: it is not a ``torch.nn.Module``.

    Example:
        >>> import torch
        >>> import raddpo_ext as rx
        >>> model = rx.use_onednn(torch.nn.Sequential(torch.nn.Linear(256, 1024)))
        >>> model(torch.ones(2, 256)).shape
        torch.Size([2, 1024])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    before, after = (nn.Linear, OneDNNLinear) if enabled else (OneDNNLinear, nn.Linear)
    if not enabled or _matmul.onednn_is_faster():
        for module in model.modules():
            if type(module) is before:
                module.__class__ = after
    return model


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer and nothing more: no adapter, no quantized weight."""
    return type(module) in (nn.Linear, OneDNNLinear)


class OneDNNLinear(nn.Linear):
    """A ``torch.nn.Linear`` that multiplies by oneDNN; made by :func:`use_onednn`."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        plain = type(input) is Tensor and type(weight) is nn.Parameter and input.dim() > 1
        if not plain or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        rows = input.flatten(0, -2)
        if not _matmul.is_by_onednn(rows, weight, recurs=True):
            return super().forward(input)
        refuse_transforms("use_onednn", rows, weight, bias)
        # As torch's own: not a view, on which an operation in place would pass FSDP2's hooks by.
        found: Tensor = torch.ops.aten._unsafe_view(_Linear.apply(rows, weight, bias), (*input.shape[:-1], len(weight)))
        return found


class _Linear(torch.autograd.Function):
    """``rows @ weight.T + bias``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.op, ctx.overwritten = "use_onednn", False
        return _matmul.linear(rows, weight, bias, recurs=True)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = saved
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            _matmul.linear(grad, weight.T, recurs=True) if of_rows else None,
            _matmul.linear(grad.T, rows.T, recurs=True) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )
