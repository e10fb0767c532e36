"""A language model's head and the transform of its logits: one definition for training and decoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext import _check


class Head(NamedTuple):
    """The logits are ``transform(hidden @ weight.T + bias)``: capped by ``logit_softcap``, divided by ``temperature``.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]``, or None.
        temperature, logit_softcap: see :func:`raddpo_ext.token_logps`.
    """

    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    logit_softcap: float | None = None

    @property
    def scale(self) -> float:
        return 1.0 / self.temperature

    @property
    def softcap(self) -> float:
        """0 for none."""
        return 0.0 if self.logit_softcap is None else self.logit_softcap

    def rows(self, chosen: Tensor | slice) -> Head:
        """The head restricted to these tokens."""
        bias = None if self.bias is None else self.bias[chosen]
        return self._replace(weight=self.weight[chosen], bias=bias)

    def product(self, hidden: Tensor) -> Tensor:
        """``hidden @ weight.T + bias`` in the dtype of its operands."""
        return F.linear(hidden, self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """The transformed logits of all tokens, float32 ``[..., V]``."""
        logits = self.product(hidden).float()
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits * self.scale

    def transform_(self, logits: Tensor) -> Tensor:
        """Transform the result of ``product`` to logits in place, without gradient."""
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.temperature == 1 else logits.mul_(self.scale)

    def check_hidden(self, hidden: Tensor) -> None:
        """Raise ValueError for states on another device or with another number of features."""
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if value is not None and value.device != hidden.device:
                raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {value.device}")
        if hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"weight must have one column per feature of hidden ({hidden.shape[-1]}), got shape "
                f"{tuple(self.weight.shape)}"
            )

    def check_dtype(self, hidden: Tensor) -> None:
        """Raise TypeError unless weight and bias have the dtype of the states."""
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if value is not None and value.dtype != hidden.dtype:
                raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {value.dtype}")


def checked_head(
    weight: Tensor, bias: Tensor | None = None, temperature: float = 1.0, logit_softcap: float | None = None
) -> Head:
    """Check a user's arguments and make a head of them.

    Raises:
        ValueError, TypeError: naming the argument and the value.
    """
    for name, value, dims in (("weight", weight, 2), ("bias", bias, 1)):
        if name == "bias" and value is None:
            continue
        tensor = check_states(value, name)
        if tensor.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight must have shape [V, H] with V, H >= 1, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must have one entry per row of weight ({weight.shape[0]}), got shape {tuple(bias.shape)}"
        )
    check_transform(temperature, logit_softcap)
    return Head(weight, bias, float(temperature), None if logit_softcap is None else float(logit_softcap))


def check_states(value: Tensor | None, name: str) -> Tensor:
    """Check that ``value`` is a float tensor and not a shard of one."""
    tensor = _check.float_tensor(value, name)
    if getattr(tensor, "ds_id", None) is not None and tensor.numel() == 0:
        raise ValueError(f"{name} is a DeepSpeed ZeRO-3 shard; gather it with deepspeed.zero.GatheredParameters")
    return tensor


def check_transform(temperature: float, logit_softcap: float | None) -> tuple[float, float]:
    """Check the arguments and return the factor on the logits and their cap, 0 for none."""
    scale = 1.0 / _check.positive(temperature, "temperature")
    return scale, 0.0 if logit_softcap is None else _check.positive(logit_softcap, "logit_softcap")


def transform_and_derivative(logits: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """The capped and scaled logits, and the derivative of this transform."""
    if softcap == 0:
        return logits * scale, torch.full_like(logits, scale)
    capped = torch.tanh(logits / softcap)
    return capped * (softcap * scale), (1 - capped * capped) * scale
