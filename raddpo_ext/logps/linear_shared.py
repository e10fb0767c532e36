"""Log-probs of several targets per row of the hidden states. Each row is multiplied by the head once.

A log-prob is the target's logit minus the row's log-sum-exp. Only the log-sum-exp needs the whole row of logits. Its
gradient is the softmax of the row times the sum of the targets' gradients. The targets' own logits and their
contributions to the gradients are inner products of single rows, computed one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raddpo_ext._autograd import differentiable_once
from raddpo_ext.logps.head import transform_and_derivative
from raddpo_ext.logps.linear_parts import Part
from raddpo_ext.logps.linear_product import Gradients, Plan, Product


class SharedTokenLogps(torch.autograd.Function):
    """``(hidden [U, H], weight, bias, targets [T], rows [T], plan) -> [T]``, normalized over the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        plan: Plan,
    ) -> Tensor:
        factors = (hidden.to(plan.dtype), weight.to(plan.dtype), None if bias is None else bias.to(plan.dtype))
        # Targets outside the vocabulary have log-prob -inf. They take token 0 for the products.
        counted = targets != plan.ignore_index
        known = counted & (targets >= 0) & (targets < weight.shape[0])
        part = _softmax_part(hidden, weight.shape[0], rows, plan.skip_ignored)
        dtype = torch.float64 if plan.dtype == torch.float64 else torch.float32
        lse, kept = torch.full(hidden.shape[:1], -torch.inf, dtype=torch.float64, device=hidden.device), None
        safe = torch.where(known, targets, 0)
        own: Tensor | None = None
        # The log-sum-exp of each row of the hidden states, and the targets' logits if all logits are kept.
        if part is not None:
            product = Product(part, plan, *factors, plan.budget)
            _, part_lse, logits = product.forward()
            lse = part_lse if part.rows is None else lse.index_copy_(0, part.rows, part_lse)
            if product.fits:
                own = logits[rows if part.rows is None else torch.searchsorted(part.rows, rows), safe].to(dtype)
                kept = logits
        # Otherwise the targets' logits as inner products.
        if own is None:
            own = _own_logits(*factors, safe, rows, dtype)
        logit, derivative = transform_and_derivative(own, plan.scale, plan.softcap)
        logps = (logit - lse[rows]).clamp(max=0).to(dtype)
        logps = torch.where(known & (logit > -torch.inf), logps, -torch.inf).masked_fill(~counted, 0.0)
        if plan.needs_grad:
            ctx.save_for_backward(
                hidden, weight, bias, *factors, lse, kept, safe, rows, derivative, logps.isfinite() & counted
            )
            ctx.part, ctx.plan, ctx.overwritten, ctx.op = part, plan, False, "linear_token_logps"
            ctx.leaf = weight if plan.accumulate else None
        return logps

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, tensors: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *factors, lse, kept, targets, rows, derivative, live = tensors
        hidden_factor, weight_factor, bias_factor = factors
        ctx.overwritten = True
        part, plan = ctx.part, ctx.plan
        grad = grad.masked_fill(~live, 0.0)
        # The softmax of a row gets the sum of its targets' gradients.
        totals = grad.new_zeros(lse.shape).index_put_((rows,), grad, accumulate=True)
        budget = plan.budget if kept is None else kept.numel() * kept.element_size()
        products = [] if part is None else [Product(part, plan, hidden_factor, weight_factor, bias_factor, budget)]
        owner = weight if ctx.leaf is None else ctx.leaf
        gradients = Gradients(products, plan, hidden, owner, bias, ctx.needs_input_grad)
        for product in products:
            chosen = slice(None) if part.rows is None else part.rows
            product.backward(totals[chosen], lse[chosen], kept, gradients)
        # The targets' own logits.
        gradients.add_pairs(rows, targets, grad * derivative, hidden_factor, weight_factor)
        return (*gradients.results(), None, None, None)


def _softmax_part(hidden: Tensor, columns: int, rows: Tensor, skip_unused: bool) -> Part | None:
    """A part with every row of ``hidden``, or with ``skip_unused`` only the rows that occur in ``rows``.

    Each target is a column beyond the last, so that only the softmax is computed.
    """
    used = None
    if skip_unused:
        seen = torch.zeros(len(hidden), dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
        used = None if bool(seen.all()) else seen.nonzero()[:, 0]
    count = len(hidden) if used is None else len(used)
    if count == 0:
        return None
    beyond = torch.full((count,), columns, dtype=torch.int64, device=hidden.device)
    return Part(used, 0, columns, None, beyond, -1, None, None, num_targets=columns + 1)


def _own_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor, dtype: torch.dtype
) -> Tensor:
    """The targets' logits, rounded like the products: a log-prob near 0 is then an exact difference."""
    products = hidden.index_select(0, rows).to(dtype).mul_(weight.index_select(0, targets)).sum(-1)
    return (products if bias is None else products + bias[targets]).to(hidden.dtype).to(dtype)
