"""The operator ``session_loss`` behind rad_dpo_loss and multilabel_contrastive_loss.

This file names its arguments and results, gives their shapes to ``torch.compile`` and adds autograd. Arguments must be
valid: the public functions check them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._autograd import loss_operator

# The operator takes positions in these tuples. Their order is that of the enums in csrc/session_loss/session_loss.h.
PROTECT = ("winner", "positives", "none")
AGGREGATION = ("negatives", "margins")
WEIGHTING = ("loss", "reward")
POSITIVES = ("winner", "each", "pooled")
REDUCTION = ("mean", "sum", "none")
#: The metrics whose sums and counts are the rows of the operator's totals, in the order of the enum Total there.
TOTALS = (
    "preference",
    "sft",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "pair_weights",
    "detached",
    "dropped_pairs",
)


class Arguments(NamedTuple):
    """The operator's arguments, in the order of csrc/schema.cpp. Each default leaves the loss unchanged."""

    logps: Tensor
    tokens: Tensor
    lengths: Tensor
    offsets: Tensor
    num_positives: Tensor
    pair_offsets: Tensor
    num_pairs: int
    ref_logps: Tensor | None = None
    pair_weights: Tensor | None = None
    detach: Tensor | None = None
    level_weights: Tensor | None = None
    divisors: Tensor | None = None
    session_divisor: float = 0.0
    token_divisor: float = 0.0
    beta: float = 1.0
    gamma: float = 0.0
    sft_weight: float = 0.0
    label_smoothing: float = 0.0
    length_normalized: bool = False
    protect: int = PROTECT.index("none")
    aggregation: int = AGGREGATION.index("negatives")
    weighting: int = WEIGHTING.index("loss")
    positives: int = POSITIVES.index("winner")
    reduction: int = REDUCTION.index("mean")
    need_gradient: bool = False


class Results(NamedTuple):
    """The operator's results. ``gradient`` and ``scales`` are saved for the backward pass."""

    loss: Tensor
    preference: Tensor
    sft: Tensor
    rewards: Tensor
    margins: Tensor
    accuracy: Tensor
    kept: Tensor
    totals: Tensor
    gradient: Tensor
    scales: Tensor


class BackwardArguments(NamedTuple):
    """The arguments of ``session_loss_backward``, in the order of csrc/schema.cpp."""

    grad_loss: Tensor | None
    grad_preference: Tensor | None
    grad_sft: Tensor | None
    logps: Tensor
    gradient: Tensor
    scales: Tensor
    lengths: Tensor
    offsets: Tensor
    num_positives: Tensor
    level_weights: Tensor | None
    sft_weight: float


def session_loss(arguments: Arguments) -> Results:
    """Run the operator."""
    try:
        return _operator(arguments)
    except RuntimeError:
        if arguments.pair_weights is not None and arguments.pair_weights.device.type == "cpu":
            check_weights(arguments.pair_weights, "pair_weights")  # the operator's error does not name the entry
        raise


def pair_weights(weights: Any, num_pairs: int, device: torch.device) -> Tensor | None:
    """Check the argument ``pair_weights``, but not its values, and return it contiguous and without gradient."""
    if weights is None:
        return None
    _check.float_tensor(weights, "pair_weights")
    if weights.shape != (num_pairs,):
        raise ValueError(f"pair_weights must have shape {(num_pairs,)}, got {tuple(weights.shape)}")
    if weights.device != device:
        raise ValueError(f"pair_weights must be on {device}, got {weights.device}")
    return (weights.detach() if weights.requires_grad else weights).contiguous()


def check_weights(weights: Tensor, name: str) -> None:
    """Raise ValueError for the first weight that is not finite and at least 0."""
    if weights.numel():
        smallest, largest = weights.aminmax()  # NaN if any weight is NaN
        if not (float(smallest) >= 0 and float(largest) < math.inf):
            _check.none(
                ~((weights >= 0) & (weights < math.inf)),
                lambda i: f"{name}[{i}] must be finite and at least 0, got {float(weights[i])}",
            )


@torch.library.register_fake("raddpo::session_loss")
def empty_results(*arguments: Any) -> Results:
    a = Arguments(*arguments)
    candidates, columns = a.logps.shape
    loss = a.num_positives.shape if a.reduction == REDUCTION.index("none") else ()
    new = a.logps.new_empty
    return Results(
        loss=new(loss),
        preference=new(loss),
        sft=new(loss),
        rewards=new(candidates),
        margins=new(a.num_pairs),
        accuracy=new(()),
        kept=new(a.num_pairs, dtype=torch.bool),
        totals=new((*loss, len(TOTALS), 2), dtype=torch.float64),
        gradient=new((candidates if a.need_gradient else 0, columns)),
        scales=new(2),
    )


@torch.library.register_fake("raddpo::session_loss_backward")
def _(*arguments: Any) -> Tensor:
    return torch.empty_like(BackwardArguments(*arguments).logps)


_operator = loss_operator(
    "session_loss",
    Arguments,
    Results,
    losses=3,
    saved=lambda a, r: (r.gradient, r.scales, a.lengths, a.offsets, a.num_positives, a.level_weights),
    weight="sft_weight",
    called="session_loss (rad_dpo_loss, multilabel_contrastive_loss)",
)
