"""linear_token_logps: token log-probs from hidden states, fused with the language model's head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._autograd import differentiable_once, refuse_transforms
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.logps.head import Head, check_states, checked_head
from raddpo_ext.logps.linear_parts import Part, parts_of
from raddpo_ext.logps.linear_product import MIN_SKIP_FLOPS, Gradients, Plan, Product
from raddpo_ext.logps.linear_shared import SharedTokenLogps
from raddpo_ext.logps.softmax_support import SoftmaxSupport, support_of
from raddpo_ext.logps.token_logps import Options, check_rows, check_targets, differentiable


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
    """Compute :func:`token_logps` of the logits ``hidden @ weight.T + bias`` without materialising all logits.

    Logits that fit ``logits_budget`` bytes are kept, and the backward pass overwrites them by their gradient: three
    matrix products in total. Beyond the budget they are computed tile by tile, and again in the backward pass: four
    products. ``"level"`` multiplies only the level's rows of ``weight``, ``"trie"`` only the rows of tokens that are
    children of some prefix. On the CPU, ignored rows and, in the backward pass, rows without a gradient are skipped
    where that saves time. Products run in the dtype of ``hidden`` and ``weight``, or in that of autocast. Gradients
    that are sums over tiles are accumulated in float32.

    Args:
        hidden: ``[..., H]`` float32, bfloat16, float16 or float64: the states that predict the targets. They
            must be finite, even where the target is ignored.
        weight: ``[V, H]`` in the same dtype (any under autocast). A sharded ``DTensor`` (FSDP2) is gathered, and its
            gradient is averaged over the ranks, as FSDP2 does. A DeepSpeed ZeRO-3 shard raises an error.
        targets: int64 ``[...]``.
        bias: ``[V]``, sharded as ``weight`` or not, or None.
        rows: int64, in the shape of ``targets``: the row of ``hidden`` that predicts each target. ``hidden`` then has
            the shape ``[U, H]``. With ``"vocab"`` each row is multiplied once, for any number of targets. Default:
            ``hidden`` has one row per target.
        vocab, levels, index, nodes, normalize, temperature, logit_softcap, ignore_index: see :func:`token_logps`.
        logits_budget: maximum bytes of logits that are kept for the backward pass, or of a tile of logits beyond that.
            A tile has at least 256 rows and 1024 columns, even if the budget is smaller.
        accumulate_grad: add the gradient of ``weight``, which must be a leaf, directly to ``weight.grad``. Hooks on
            ``weight`` do not see it. Under ``torch.compile`` autograd adds it as usual.
        check: see :func:`token_logps`; also raise for NaN in ``hidden``, ``weight`` or ``bias``.

    Returns:
        float32 ``[...]`` (float64 for float64), differentiable once in ``hidden``, ``weight`` and ``bias``, in reverse
        mode; other derivatives raise an error.

    Raises:
        ValueError, TypeError: naming the argument and the value.
        RuntimeError: from a second backward pass.

    Source: Liger Kernel (arXiv 2410.10989) and Cut Cross-Entropy (arXiv 2411.09009) fuse the head with the loss.

    Example:
        >>> hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])  # of a vocabulary of three tokens
        >>> rx.linear_token_logps(hidden, weight, torch.tensor([2, 0]))
        tensor([-0.4076, -1.0986])
    """
    # Check all arguments.
    head = _checked_head(hidden, weight, bias, temperature, logit_softcap)
    _check_rows(hidden, targets, rows)
    refuse_transforms("linear_token_logps", hidden, weight, bias)
    ignore_index = _check.integer(ignore_index, "ignore_index")
    budget = _check.integer(logits_budget, "logits_budget", 0)
    support = support_of(targets, normalize, vocab, levels, index, nodes, weight.shape[0], ignore_index, check)
    if _check.reads_values(targets, check):
        _check_values(hidden, head, targets, rows, ignore_index, check)
    dtype = _compute_dtype(hidden, head)
    head = _gathered(head, accumulate_grad)
    # Prepare what all routes need.
    compiling = torch.compiler.is_compiling()
    if rows is not None and (support is not None or compiling):
        hidden, rows = hidden[rows], None
    flops = hidden.numel() * weight.shape[0]
    plan = Plan(
        dtype=dtype,
        scale=head.scale,
        softcap=head.softcap,
        ignore_index=ignore_index,
        budget=budget,
        needs_grad=torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)),
        accumulate=accumulate_grad and not compiling,
        skip_ignored=targets.device.type == "cpu" and not compiling and flops >= MIN_SKIP_FLOPS,
    )
    # Choose the route.
    if rows is not None:
        return _by_rows(hidden, head, targets, rows, plan)
    if support is None and not (plan.skip_ignored or accumulate_grad or compiling) and _fits(hidden, head, plan):
        return _by_autograd(hidden, head, targets, plan)
    return _by_parts(hidden, head, targets, support, plan)


def _by_rows(hidden: Tensor, head: Head, targets: Tensor, rows: Tensor, plan: Plan) -> Tensor:
    """Several targets per state. Each state is multiplied by the head once."""
    logps = SharedTokenLogps.apply(hidden, head.weight, head.bias, targets.reshape(-1), rows.reshape(-1), plan)
    return logps.view(targets.shape)


def _by_autograd(hidden: Tensor, head: Head, targets: Tensor, plan: Plan) -> Tensor:
    """No rows to skip and no tiles. Autograd's own matrix product has the lowest overhead."""
    columns = head.weight.shape[0]
    options = Options(None, None, None, plan.scale, plan.softcap, plan.ignore_index, 0, columns)
    return differentiable(head.product(hidden), targets, options, True, "linear_token_logps")


def _by_parts(hidden: Tensor, head: Head, targets: Tensor, support: SoftmaxSupport | None, plan: Plan) -> Tensor:
    """One product per part, in tiles where it exceeds the budget.

    The parts are the rows that are not ignored or, with a support, the rows of each level or depth.
    """
    flat_targets = targets.reshape(-1)
    flat_hidden = hidden.reshape(-1, hidden.shape[-1])
    support = None if support is None else support.flatten()
    parts = parts_of(flat_targets, support, head.weight.shape[0], plan.ignore_index, plan.skip_ignored)
    logps = _LinearTokenLogps.apply(flat_hidden, head.weight, head.bias, flat_targets, parts, plan)
    return logps.view(targets.shape)


def _fits(hidden: Tensor, head: Head, plan: Plan) -> bool:
    """Whether all logits need at most the budget."""
    return hidden.shape[:-1].numel() * head.weight.shape[0] * plan.dtype.itemsize <= plan.budget


class _LinearTokenLogps(torch.autograd.Function):
    """Log-probs of the parts. Logits that fit the budget are kept, and the backward pass overwrites them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, parts: list[Part], plan: Plan
    ) -> Tensor:
        factors = (hidden.to(plan.dtype), weight.to(plan.dtype), None if bias is None else bias.to(plan.dtype))
        dtype = torch.float64 if plan.dtype == torch.float64 else torch.float32
        logps = torch.where(targets == plan.ignore_index, 0.0, -torch.inf).to(dtype)
        # Multiply each part, and keep its logits while the budget lasts.
        lses: list[Tensor] = []
        kept: list[Tensor | None] = []
        budget_left = plan.budget
        for part in parts:
            product = Product(part, plan, *factors, budget_left)
            logp, lse, logits = product.forward()
            lses.append(lse)
            if plan.needs_grad and product.fits:
                budget_left -= _nbytes(logits)
                kept.append(logits)
            else:
                kept.append(None)
            del logits
            if part.rows is None:
                logps = logp
            else:
                logps.index_copy_(0, part.rows, logp)
        if plan.needs_grad:
            ctx.save_for_backward(hidden, weight, bias, *factors, *lses, *kept)
            ctx.parts, ctx.plan, ctx.overwritten, ctx.op = parts, plan, False, "linear_token_logps"
            # Kept by reference: checkpointing and offloading replace saved tensors by other objects.
            ctx.leaf = weight if plan.accumulate else None
        return logps

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, tensors: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, hidden_factor, weight_factor, bias_factor, *of_parts = tensors
        ctx.overwritten = True
        parts, plan = ctx.parts, ctx.plan
        factors = (hidden_factor, weight_factor, bias_factor)
        lses, kept = of_parts[: len(parts)], of_parts[len(parts) :]
        # The kept logits are the parts' again; the other parts are multiplied once more, in the budget that is left.
        budget_left = plan.budget - sum(_nbytes(logits) for logits in kept if logits is not None)
        products = [
            Product(part, plan, *factors, budget_left if logits is None else _nbytes(logits))
            for part, logits in zip(parts, kept, strict=True)
        ]
        # Add up the gradients part by part.
        owner = weight if ctx.leaf is None else ctx.leaf
        gradients = Gradients(products, plan, hidden, owner, bias, ctx.needs_input_grad)
        for product, lse, logits in zip(products, lses, kept, strict=True):
            part = product.part
            product.backward(grad if part.rows is None else grad[part.rows], lse, logits, gradients)
        return (*gradients.results(), None, None, None)


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()  # torch.compile cannot trace Tensor.nbytes with dynamic shapes


def _checked_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, logit_softcap: float | None
) -> Head:
    """Check the head and the states against each other."""
    if check_states(hidden, "hidden").dim() == 0:
        raise ValueError(f"hidden must have at least one dimension, got shape {tuple(hidden.shape)}")
    head = checked_head(weight, bias, temperature, logit_softcap)
    head.check_hidden(hidden)
    return head


def _check_rows(hidden: Tensor, targets: Tensor, rows: Tensor | None) -> None:
    """Check the shapes of targets and rows."""
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


def _check_values(
    hidden: Tensor, head: Head, targets: Tensor, rows: Tensor | None, ignore_index: int, check: bool
) -> None:
    """Check what must be read: targets, rows and, if asked for, NaN."""
    check_targets(targets, head.weight.shape[0], ignore_index)
    if rows is not None:
        outside = (rows < 0) | (rows >= len(hidden))
        if bool(outside.any()):
            raise ValueError(f"rows hold {int(rows[outside][0])}, outside [0, {len(hidden)}), the rows of hidden")
    for name, value in (("hidden", hidden), ("weight", head.weight), ("bias", head.bias)):
        if check and value is not None and bool(value.isnan().any()):
            raise ValueError(f"{name} holds NaN, first at {value.isnan().nonzero()[0].tolist()}")


def _compute_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    """The type of the products: autocast's, or that of the states."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    head.check_dtype(hidden)
    return hidden.dtype


def _gathered(head: Head, accumulate_grad: bool) -> Head:
    """The head with gathered weights; raises ValueError if ``accumulate_grad`` is not possible."""
    head = head._replace(
        weight=_whole(head.weight, accumulate_grad), bias=None if head.bias is None else _whole(head.bias, False)
    )
    if accumulate_grad and head.weight.requires_grad and not head.weight.is_leaf:
        raise ValueError("accumulate_grad needs weight to be a leaf: the result of an operation has no .grad to add to")
    return head


def _whole(weight: Tensor, accumulate_grad: bool) -> Tensor:
    """``weight`` or bias, gathered if it is sharded. Its gradient is the mean over the ranks, sharded again."""
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
