"""The operators' derivatives: the first one in reverse mode. Any other is an error that names the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_library = torch.library.Library("raddpo", "FRAGMENT")
OVERWRITTEN = (
    "the first backward pass overwrote the logits with their gradient; for a second one, call the function again, or "
    "use token_logps with inplace_backward=False"
)


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """Raise in forward mode and within transforms of ``torch.func``, which would treat the operator as a constant.

    While ``torch.compile`` traces, the operator's autograd kernel does this check.
    """
    if not torch.compiler.is_compiling():
        refuse_transforms_of_operator(op, *tensors)


def refuse_transforms_of_operator(op: str, *tensors: Tensor | None) -> None:
    """Like :func:`refuse_transforms`, for an operator's autograd kernel."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{op} does not work within vmap, grad, jvp and other transforms of torch.func; use torch.autograd.grad"
        )
    # No tensor has a tangent outside of forward mode.
    if forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(f"{op} has no forward-mode derivative; use reverse mode, torch.autograd.grad")


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Wrap ``backward(ctx, saved, *grads)`` so that differentiating its results is an error.

    ``torch.autograd.function.once_differentiable`` would return constants if ``grads`` are constants: a second
    derivative of 0. ``ctx`` has ``op``, a name, and ``overwritten``.
    """

    def wrapper(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if ctx.overwritten:
            raise RuntimeError(OVERWRITTEN)
        saved = ctx.saved_tensors  # read once: checkpointing does not give them twice
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        if getattr(ctx, "leaf", None) is not None:
            raise RuntimeError(f"{ctx.op} with accumulate_grad has no second derivative, so create_graph must be False")
        # The results are constants, wrapped so that differentiating them raises an error.
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        given = [position for position, result in enumerate(results) if result is not None]
        refusing = _NoDerivative.apply(ctx.op, len(given), *(results[i] for i in given), *grads, *saved)
        every: list[Tensor | None] = [None] * len(results)
        for position, result in zip(given, refusing, strict=True):
            every[position] = result
        return tuple(every)

    return wrapper


class _NoDerivative(torch.autograd.Function):
    """Returns the first ``count`` tensors unchanged, as a function of all tensors whose derivative is an error."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{ctx.op} has no second derivative")


def below_autograd(op: Any, *arguments: Any) -> Any:
    """Call the operator without its autograd kernel, which saves the time to dispatch there."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def loss_operator(
    op: str,
    arguments: Any,
    results: Any,
    *,
    losses: int,
    saved: Callable[[Any, Any], tuple[Tensor | None, ...]],
    weight: str,
    called: str,
) -> Callable[[Any], Any]:
    """Register the autograd kernel of an operator that computes its losses' gradient in the forward pass.

    Args:
        op: its name. ``{op}_backward`` takes the losses' gradients, the log-probs, what is saved, and a weight.
        arguments: named tuple of its arguments, which begin with ``logps`` and have ``need_gradient``.
        results: named tuple of its results, which begin with the losses. The others have no gradient.
        losses: their number.
        saved: the tensors to save, of the arguments and the results.
        weight: the argument that is a number to save.
        called: what the user called, for errors.

    Returns:
        A function of the arguments. In eager mode it runs the autograd kernel directly: the dispatcher would add 15 us.
    """
    forward_op, backward_op = getattr(torch.ops.raddpo, op).default, getattr(torch.ops.raddpo, f"{op}_backward").default

    class Loss(torch.autograd.Function):
        """Gives the losses their derivative. It takes tuples, because each argument of ``apply`` costs time."""

        @staticmethod
        def forward(ctx: Any, logps: Tensor, given: Any, found: Any) -> Any:
            # The log-probs too: without them, differentiating the gradient would give 0 rather than an error.
            ctx.save_for_backward(logps, *saved(given, found))
            ctx.weight, ctx.overwritten, ctx.op = getattr(given, weight), False, called
            ctx.set_materialize_grads(False)
            return found[:losses]

        @staticmethod
        @differentiable_once
        def backward(ctx: Any, kept: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
            if all(grad is None for grad in grads):
                return None, None, None
            return below_autograd(backward_op, *grads, *kept, ctx.weight), None, None

    def differentiable(given: Any) -> Any:
        """The autograd kernel. That of ``torch.library.register_autograd`` takes 150 us with this many arguments."""
        refuse_transforms_of_operator(called, given.logps)
        found = results(*below_autograd(forward_op, *given))
        if given.need_gradient:
            return results(*Loss.apply(given.logps, given, found), *found[losses:])
        return found

    def no_second_derivative(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(f"{called} has no second derivative")

    def call(given: Any) -> Any:
        return results(*forward_op(*given)) if torch.compiler.is_compiling() else differentiable(given)

    _library.impl(op, lambda *values: differentiable(arguments(*values)), "Autograd")
    torch.library.register_autograd(f"raddpo::{op}_backward", no_second_derivative)
    return call
