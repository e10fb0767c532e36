"""Adds the gradient of a model's input embeddings to ``weight.grad`` row by row.

Autograd makes a dense gradient ``[V, H]`` of zeros and a few rows, and adds it to that of a tied head. With a large
vocabulary this takes as long as a part of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raddpo_ext._autograd import differentiable_once
from raddpo_ext._matmul import empty
from raddpo_ext.logps.linear_product import add_rows


@contextmanager
def adding_rows(model: Any) -> Iterator[None]:
    """Within it, the embeddings' gradient of a forward goes to ``weight.grad`` directly, and past hooks on the weight.

    Embeddings that are more than a lookup of a leaf's rows keep autograd's gradient.
    """
    embeddings = model.get_input_embeddings()
    if not _is_lookup(embeddings):
        yield
        return
    handle = embeddings.register_forward_hook(_replace_gradient, prepend=True)  # other hooks may change the output
    try:
        yield
    finally:
        handle.remove()


def is_unwatched(weight: Tensor) -> bool:
    """Whether a gradient that is added to ``weight.grad`` directly passes nobody by: a whole leaf without hooks."""
    hooks = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return weight.is_leaf and not hooks and not hasattr(weight, "placements")


def _is_lookup(embeddings: Any) -> bool:
    if type(embeddings) is not nn.Embedding or torch.compiler.is_compiling():
        return False
    options = embeddings.max_norm is not None or embeddings.scale_grad_by_freq or embeddings.sparse
    return not options and embeddings.weight.is_leaf and not hasattr(embeddings.weight, "placements")


def _replace_gradient(embeddings: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """A forward hook: the same output with another gradient."""
    if not output.requires_grad or not embeddings.weight.requires_grad:
        return None
    found: Tensor = _Rows.apply(output.detach(), embeddings.weight, args[0], embeddings.padding_idx)
    return found


class _Rows(torch.autograd.Function):
    """Returns the embeddings; their gradient is added to ``weight.grad``."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.leaf, ctx.padding_idx, ctx.overwritten, ctx.op = weight, padding_idx, False, "session_states"
        return output.view_as(output)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Any, grad: Tensor) -> tuple[None, ...]:
        weight, rows, values = ctx.leaf, saved[0].flatten(), grad.flatten(0, -2)
        if ctx.padding_idx is not None:
            values = values.masked_fill((rows == ctx.padding_idx)[:, None], 0)
        # Sum a token's places in float32: a large sum in bfloat16 would lose small terms.
        if values.dtype in (torch.bfloat16, torch.float16):
            rows, places = rows.unique(return_inverse=True)
            sums = values.new_zeros((len(rows), values.shape[1]), dtype=torch.float32)
            add_rows(sums, places, values)
            values = sums
        if weight.grad is None:
            weight.grad = empty(weight, weight.shape).zero_()
        add_rows(weight.grad, rows, values)
        return None, None, None, None
