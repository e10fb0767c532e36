"""The operator behind policy_loss: its arguments and results by name, their shapes for ``torch.compile``, autograd.

Arguments must be valid: the public function checks them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext._autograd import loss_operator
from raddpo_ext.losses.session_loss import check_weights

# The operator takes positions in these tuples. Their order is that of the enums in csrc/policy_loss/policy_loss.h.
OBJECTIVE = ("reinforce", "clip", "cispo", "sapo", "ecpo", "gbpo")
RATIO = ("token", "sequence", "item")
KL = ("k1", "k2", "k3")
AGGREGATE = ("sequence", "token", "constant")
REDUCTION = ("mean", "sum", "none")
COUNT = ("active", "all")


class Arguments(NamedTuple):
    """The operator's arguments, in the order of csrc/schema.cpp."""

    logps: Tensor
    tokens: Tensor
    lengths: Tensor
    offsets: Tensor
    num_positives: Tensor
    advantages: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    weights: Tensor | None = None
    gates: Tensor | None = None
    level_weights: Tensor | None = None
    divisors: Tensor | None = None
    row_divisor: float = 0.0
    token_divisor: float = 0.0
    low: float = 0.0
    high: float = 0.0
    dual_clip: float = 0.0
    delta: float = 0.0
    kl_weight: float = 0.0
    nll_weight: float = 0.0
    max_length: float = 1.0
    objective: int = OBJECTIVE.index("reinforce")
    ratio: int = RATIO.index("token")
    divergence: int = KL.index("k1")
    aggregate: int = AGGREGATE.index("sequence")
    reduction: int = REDUCTION.index("mean")
    use_experts: bool = True
    protect: bool = False
    count_all: bool = False
    need_gradient: bool = False


class Options(NamedTuple):
    """Those of the arguments that are options of the user, in their order there."""

    low: float
    high: float
    dual_clip: float
    delta: float
    kl_weight: float
    nll_weight: float
    max_length: float
    objective: int
    ratio: int
    divergence: int
    aggregate: int
    reduction: int
    use_experts: bool
    protect: bool
    count_all: bool


class Results(NamedTuple):
    """The operator's results. ``counts`` are the divisors of a mean; the last three are saved for the backward pass."""

    loss: Tensor
    policy: Tensor
    kl: Tensor
    nll: Tensor
    ratios: Tensor
    clipped: Tensor
    approx_kl: Tensor
    counts: Tensor
    counted: Tensor
    gradient: Tensor
    scales: Tensor


class BackwardArguments(NamedTuple):
    """The arguments of ``policy_loss_backward``, in the order of csrc/schema.cpp."""

    grad_loss: Tensor
    logps: Tensor
    gradient: Tensor
    scales: Tensor
    counted: Tensor
    lengths: Tensor
    offsets: Tensor
    num_positives: Tensor
    level_weights: Tensor | None
    nll_weight: float


def policy_loss(arguments: Arguments) -> Results:
    """Run the operator."""
    try:
        return _operator(arguments)
    except RuntimeError:
        if arguments.logps.device.type == "cpu":
            check_values(arguments)  # the operator's error does not name the entry
        raise


def check_values(a: Arguments) -> None:
    """Raise ValueError for the first weight, advantage or gate of a row that is not as documented."""
    if a.weights is not None:
        check_weights(a.weights, "weights")
    within = torch.arange(a.logps.shape[1], device=a.logps.device) < a.lengths[:, None]
    for values, name in ((a.advantages, "advantages"), (a.gates, "gates")):
        if values is None:
            continue
        bad = (~values.isfinite() & (within if values.dim() == 2 else a.lengths > 0)).nonzero()
        if len(bad):
            place = bad[0].tolist()
            raise ValueError(f"{name}{place} must be finite, got {float(values[tuple(place)])}")
    if a.gates is not None:
        _check_products(a, within)


def _check_products(a: Arguments, within: Tensor) -> None:
    assert a.gates is not None
    advantages = a.advantages if a.advantages.dim() == 2 else a.advantages[:, None]
    bad = ((advantages.double() * a.gates).abs() == math.inf) & within
    if bad.any():
        row, level = bad.nonzero()[0].tolist()
        raise ValueError(f"advantages times gates[{row}, {level}] must be finite, got {float(a.gates[row, level])}")


@torch.library.register_fake("raddpo::policy_loss")
def empty_results(*arguments: Any) -> Results:
    a = Arguments(*arguments)
    candidates, levels = a.logps.shape
    loss = a.num_positives.shape if a.reduction == REDUCTION.index("none") else ()
    new = a.logps.new_empty
    return Results(
        loss=new(loss),
        policy=new(loss),
        kl=new(loss),
        nll=new(loss),
        ratios=new(candidates),
        clipped=new(2),
        approx_kl=new(()),
        counts=new(2, dtype=torch.float64),
        counted=new(a.num_positives.shape, dtype=torch.bool),
        gradient=new((candidates if a.need_gradient else 0, levels)),
        scales=new(2),
    )


@torch.library.register_fake("raddpo::policy_loss_backward")
def _(*arguments: Any) -> Tensor:
    return torch.empty_like(BackwardArguments(*arguments).logps)


_operator = loss_operator(
    "policy_loss",
    Arguments,
    Results,
    losses=1,
    saved=lambda a, r: (r.gradient, r.scales, r.counted, a.lengths, a.offsets, a.num_positives, a.level_weights),
    weight="nll_weight",
    called="policy_loss",
)
