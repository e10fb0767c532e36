"""The operator behind policy_loss: its arguments and results by name, their shapes for ``torch.compile``, autograd.

Arguments must be valid: the public function checks them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext._autograd import below_autograd, differentiable_once, refuse_transforms_of_operator

# The operator takes positions in these tuples. Their order is that of the enums in csrc/policy_loss/policy_loss.h.
OBJECTIVE = ("reinforce", "clip", "cispo", "sapo", "ecpo", "gbpo")
RATIO = ("token", "sequence", "item")
KL = ("k1", "k2", "k3")
AGGREGATE = ("sequence", "token", "constant")
REDUCTION = ("mean", "sum", "none")


class Arguments(NamedTuple):
    """The operator's arguments, in the order of csrc/schema.cpp."""

    logps: Tensor
    tokens: Tensor
    lengths: Tensor
    offsets: Tensor
    num_positives: Tensor
    advantages: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    weights: Tensor | None
    gates: Tensor | None
    level_weights: Tensor | None
    divisors: Tensor | None
    row_divisor: float
    token_divisor: float
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
    need_gradient: bool


class Results(NamedTuple):
    """The operator's results. The last three are saved for the backward pass."""

    loss: Tensor
    policy: Tensor
    kl: Tensor
    nll: Tensor
    ratios: Tensor
    clipped: Tensor
    approx_kl: Tensor
    counted: Tensor
    gradient: Tensor
    scales: Tensor


class BackwardArguments(NamedTuple):
    """The arguments of ``policy_loss_backward``, in the order of csrc/schema.cpp."""

    grad_loss: Tensor
    gradient: Tensor
    scales: Tensor
    counted: Tensor
    lengths: Tensor
    offsets: Tensor
    num_positives: Tensor
    level_weights: Tensor | None
    nll_weight: float


def policy_loss(arguments: Arguments) -> Results:
    """Run the operator. In eager mode this calls its autograd kernel directly, past the dispatcher."""
    if torch.compiler.is_compiling():
        return Results(*torch.ops.raddpo.policy_loss.default(*arguments))
    return Results(*_differentiable(*arguments))


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
        counted=new(a.num_positives.shape, dtype=torch.bool),
        gradient=new((candidates if a.need_gradient else 0, levels)),
        scales=new(2),
    )


@torch.library.register_fake("raddpo::policy_loss_backward")
def _(*arguments: Any) -> Tensor:
    return torch.empty_like(BackwardArguments(*arguments).gradient)


class _PolicyLoss(torch.autograd.Function):
    """The operator with its gradient. Its arguments are one tuple, because each argument of ``apply`` costs time."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, a: Arguments) -> Results:
        results = Results(*below_autograd(torch.ops.raddpo.policy_loss.default, *a))
        _, *others = results
        ctx.save_for_backward(
            logps,  # not read: with it, differentiating the gradient is an error rather than 0
            results.gradient,
            results.scales,
            results.counted,
            a.lengths,
            a.offsets,
            a.num_positives,
            a.level_weights,
        )
        ctx.nll_weight, ctx.overwritten, ctx.op = a.nll_weight, False, "policy_loss"
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Any, loss: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        if loss is None:
            return None, None
        arguments = BackwardArguments._make((loss, *saved[1:], ctx.nll_weight))
        return below_autograd(torch.ops.raddpo.policy_loss_backward.default, *arguments), None


def _differentiable(*arguments: Any) -> tuple[Tensor, ...]:
    """The operator's autograd kernel."""
    a = Arguments(*arguments)
    refuse_transforms_of_operator("policy_loss", a.logps)
    if a.need_gradient:
        return _PolicyLoss.apply(a.logps, a)
    return below_autograd(torch.ops.raddpo.policy_loss.default, *a)


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("policy_loss has no second derivative")


_library = torch.library.Library("raddpo", "FRAGMENT")
_library.impl("policy_loss", _differentiable, "Autograd")
torch.library.register_autograd("raddpo::policy_loss_backward", _no_second_derivative)
