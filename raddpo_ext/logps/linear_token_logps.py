"""linear_token_logps: token log-probs from hidden states, with the language model's head fused in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._autograd import differentiable_once, refuse_transforms
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.logps.linear_parts import Part, parts_of
from raddpo_ext.logps.linear_product import WORTH_A_LOOK, Gradients, Plan, Product
from raddpo_ext.logps.linear_shared import SharedTokenLogps
from raddpo_ext.logps.support import support_of
from raddpo_ext.logps.token_logps import check_map, check_rows, check_targets, differentiable


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    vocab: SIDVocab | None = None,
    levels: Tensor | None = None,
    index: TrieIndex | None = None,
    nodes: Tensor | None = None,
    normalize: str = "vocab",
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    logits_budget: int = 2**30,
    accumulate_grad: bool = False,
    check: bool = False,
) -> Tensor:
    """:func:`token_logps` of the logits ``hidden @ weight.T + bias``, without holding more of them than need be.

    While the logits fit ``logits_budget`` bytes they are kept and the backward pass overwrites them by their gradient:
    three matrix products in all. Beyond it they are worked out tile by tile, and again backward: four. Under
    ``"level"`` only the level's rows of ``weight`` are multiplied, under ``"trie"`` only the rows that are children of
    some prefix. On the CPU ignored rows, and backward those without a gradient, are left out where that pays.
    Products run in the dtype of ``hidden`` and ``weight``, or in autocast's; tiles that add up to one gradient do so in
    float32.

    Args:
        hidden: ``[..., H]`` float32, bfloat16, float16 or float64: the states that predict the targets. Finite, also
            where the target is ignored.
        weight: ``[V, H]`` of the same dtype (any under autocast). A sharded ``DTensor`` (FSDP2) is gathered, and its
            gradient averaged over the ranks, as FSDP2 does; a DeepSpeed ZeRO-3 shard is refused.
        targets: int64 ``[...]``.
        bias: ``[V]``, sharded as ``weight`` or not, or None.
        rows: int64, of the shape of ``targets``: which row of ``hidden``, then ``[U, H]``, predicts each target. Under
            ``"vocab"`` a row is multiplied once, however many targets it has. Default: ``hidden`` has a row a target.
        vocab, levels, index, nodes, normalize, temperature, logit_softcap, ignore_index: see :func:`token_logps`.
        logits_budget: bytes of logits kept from the forward to the backward pass, and held at once beyond that; a tile
            has at least 256 rows and 1024 columns.
        accumulate_grad: add the gradient of ``weight``, a leaf, straight into ``weight.grad``. Hooks on ``weight`` do
            not see it. While ``torch.compile`` traces it is returned to autograd as ever.
        check: see :func:`token_logps`; NaN in ``hidden``, ``weight`` or ``bias`` raises.

    Returns:
        float32 ``[...]`` (float64 for float64), differentiable once in ``hidden``, ``weight`` and ``bias``, in
        reverse mode: anything else is an error.

    Raises:
        ValueError, TypeError: naming the argument and the value.
        RuntimeError: from a second backward pass.

    Source: Liger Kernel (arXiv 2410.10989) and Cut Cross-Entropy (arXiv 2411.09009) fuse the head with the loss.
    """
    _check_inputs(hidden, weight, targets, bias, rows)
    refuse_transforms("linear_token_logps", hidden, weight, bias)
    scale, softcap = check_map(temperature, logit_softcap)
    ignore_index = _check.integer(ignore_index, "ignore_index")
    budget = _check.integer(logits_budget, "logits_budget", 0)
    if rows is not None and (check or rows.device.type == "cpu") and not torch.compiler.is_compiling():
        outside = (rows < 0) | (rows >= len(hidden))
        if bool(outside.any()):
            raise ValueError(f"rows hold {int(rows[outside][0])}, outside [0, {len(hidden)}), the rows of hidden")
    if check:
        for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if value is not None and bool(value.isnan().any()):
                raise ValueError(f"{name} holds NaN, first at {value.isnan().nonzero()[0].tolist()}")
        check_targets(targets, weight.shape[0], ignore_index)
    if rows is not None and (normalize != "vocab" or torch.compiler.is_compiling()):
        hidden, rows = hidden[rows], None
    dtype = _compute_dtype(hidden, weight, bias)
    weight = _whole(weight, accumulate_grad)
    bias = None if bias is None else _whole(bias, False)
    if accumulate_grad and weight.requires_grad and not weight.is_leaf:
        raise ValueError("accumulate_grad needs weight to be a leaf: the result of an operation has no .grad to add to")
    support = support_of(targets, normalize, vocab, levels, index, nodes, weight.shape[0], ignore_index, check)
    if support is not None:
        if not torch.compiler.is_compiling() and targets.device.type == "cpu":
            check_targets(targets, weight.shape[0], ignore_index)
        support = support.flatten()
    size = hidden.shape[:-1].numel() * weight.shape[0]
    look = targets.device.type == "cpu" and not torch.compiler.is_compiling()
    look = look and size * weight.shape[1] >= WORTH_A_LOOK
    fits = size * dtype.itemsize <= budget
    if support is None and rows is None and fits and not (look or accumulate_grad or torch.compiler.is_compiling()):
        # No rows to leave out, no tiles: autograd's own product has the least overhead.
        options = (None, None, None, scale, softcap, ignore_index, 0, weight.shape[0])
        return differentiable(F.linear(hidden, weight, bias), targets, options, True, "linear_token_logps")
    flat_targets = targets if targets.dim() == 1 else targets.reshape(-1)
    inputs = (hidden, weight, bias)
    plan = Plan(
        dtype=dtype,
        scale=scale,
        softcap=softcap,
        ignore_index=ignore_index,
        budget=budget,
        wanted=torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs),
        accumulate=accumulate_grad and not torch.compiler.is_compiling(),
    )
    if rows is not None:
        if targets.device.type == "cpu":
            check_targets(targets, weight.shape[0], ignore_index)
        logps = SharedTokenLogps.apply(hidden, weight, bias, flat_targets, rows.reshape(-1), look, plan)
        return logps.view(targets.shape)
    flat_hidden = hidden if targets.dim() == 1 else hidden.reshape(-1, hidden.shape[-1])
    parts = parts_of(flat_targets, support, weight.shape[0], ignore_index, look)
    try:
        logps = _LinearTokenLogps.apply(flat_hidden, weight, bias, flat_targets, parts, plan)
    except RuntimeError:
        if not torch.compiler.is_compiling():
            check_targets(targets, weight.shape[0], ignore_index)
        raise
    return logps if targets.dim() == 1 else logps.view(targets.shape)


class _LinearTokenLogps(torch.autograd.Function):
    """The logits of the parts that fit the budget are kept, and overwritten by their gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, parts: list[Part], plan: Plan
    ) -> Tensor:
        factors = (hidden.to(plan.dtype), weight.to(plan.dtype), None if bias is None else bias.to(plan.dtype))
        dtype = torch.float64 if plan.dtype == torch.float64 else torch.float32
        logps = torch.where(targets == plan.ignore_index, 0.0, -torch.inf).to(dtype)
        lses: list[Tensor] = []
        kept: list[Tensor | None] = []
        room = plan.budget
        for part in parts:
            product = Product(part, plan, *factors, room)
            logp, lse, logits = product.forward()
            lses.append(lse)
            if plan.wanted and product.fits:
                room -= _nbytes(logits)
                kept.append(logits)
            else:
                kept.append(None)
            del logits
            if part.rows is None:
                logps = logp
            else:
                logps.index_copy_(0, part.rows, logp)
        if plan.wanted:
            ctx.save_for_backward(hidden, weight, bias, *factors, *lses, *kept)
            ctx.parts, ctx.plan, ctx.overwritten, ctx.op = parts, plan, False, "linear_token_logps"
            # Itself, as saved tensors come back as others after checkpointing or offloading.
            ctx.leaf = weight if plan.accumulate else None
        return logps

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, tensors: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *saved = tensors
        ctx.overwritten = True
        parts, plan = ctx.parts, ctx.plan
        factors: tuple[Tensor, Tensor, Tensor | None] = (saved[0], saved[1], saved[2])
        lses, kept = saved[3 : 3 + len(parts)], saved[3 + len(parts) :]
        room = plan.budget - sum(_nbytes(logits) for logits in kept if logits is not None)
        products = [
            Product(part, plan, *factors, room if logits is None else _nbytes(logits))
            for part, logits in zip(parts, kept, strict=True)
        ]
        owner = weight if ctx.leaf is None else ctx.leaf
        gradients = Gradients(products, plan, hidden, owner, bias, ctx.needs_input_grad)
        for product, lse, logits in zip(products, lses, kept, strict=True):
            part = product.part
            product.backward(grad if part.rows is None else grad[part.rows], lse, logits, gradients)
        return (*gradients.results(), None, None, None)


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()  # Tensor.nbytes is beyond torch.compile where shapes vary


def _check_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, rows: Tensor | None) -> None:
    for name, value, dims in (("hidden", hidden, None), ("weight", weight, 2), ("bias", bias, 1)):
        if name == "bias" and value is None:
            continue
        tensor = _check.float_tensor(value, name)
        if getattr(tensor, "ds_id", None) is not None and tensor.numel() == 0:
            raise ValueError(f"{name} is a DeepSpeed ZeRO-3 shard; gather it with deepspeed.zero.GatheredParameters")
        if tensor.dim() == 0 or dims not in (None, tensor.dim()):
            raise ValueError(f"{name} must have {dims or 'some'} dimensions, got shape {tuple(tensor.shape)}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must have one column a feature of hidden ({hidden.shape[-1]}), got shape {tuple(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight must have shape [V, H] with V, H >= 1, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have one entry a row of weight ({weight.shape[0]}), got shape {tuple(bias.shape)}")
    _check.int64_tensor(targets, "targets")
    if rows is None:
        check_rows(targets, hidden, "hidden")
        return
    _check.int64_tensor(rows, "rows")
    if rows.shape != targets.shape or not rows.device == targets.device == hidden.device:
        raise ValueError(
            f"rows must have the shape of targets, {tuple(targets.shape)}, and both be on the device of hidden, "
            f"{hidden.device}, got {tuple(rows.shape)} on {rows.device} and targets on {targets.device}"
        )
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape [U, H] with rows, got {tuple(hidden.shape)}")


def _compute_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {value.dtype}")
    return hidden.dtype


def _whole(weight: Tensor, accumulate_grad: bool) -> Tensor:
    """``weight``, or the bias, gathered if it is sharded: its gradient is then the ranks' mean, scattered again."""
    if not hasattr(weight, "placements"):
        return weight
    from torch.distributed.tensor import DTensor, Partial, Replicate

    assert isinstance(weight, DTensor)
    if accumulate_grad:
        raise ValueError("accumulate_grad must be False for a sharded weight: its gradient goes back through DTensor")
    mesh = weight.device_mesh
    replicated = weight.redistribute(placements=[Replicate()] * mesh.ndim)
    whole = replicated.to_local(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda grad: grad / mesh.size())
    return whole
