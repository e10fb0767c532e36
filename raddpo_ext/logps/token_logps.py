"""token_logps: log-probs of target tokens, in one read of the logits forward and one read and write backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._autograd import below_autograd, differentiable_once, refuse_transforms, refuse_transforms_of_operator
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.logps.head import check_transform
from raddpo_ext.logps.softmax_support import support_of


class Options(NamedTuple):
    """The operators' arguments after their tensors, in the order of csrc/schema.cpp. See csrc/token_logps."""

    columns: Tensor | None  # columns, begins and counts are each row's support, None for the whole vocabulary
    begins: Tensor | None
    counts: Tensor | None
    scale: float
    softcap: float  # 0 for none
    ignore_index: int
    first_column: int  # the token id of the logits' first column
    vocab_size: int


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab: SIDVocab | None = None,
    levels: Tensor | None = None,
    index: TrieIndex | None = None,
    nodes: Tensor | None = None,
    normalize: str = "vocab",
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    check: bool = False,
) -> Tensor:
    """Compute the log-probs ``z[t] - log(sum over j in support of exp(z[j]))`` of target tokens ``t``.

    Here ``z = logit_softcap * tanh(logits / logit_softcap) / temperature``. The cap is part of the model; the
    temperature is chosen by the caller. The forward pass saves only the log-sum-exp of each row. The backward pass
    writes ``g * (onehot - softmax)``, where ``g`` is the gradient of the log-prob, and exact zeros for a row with
    ``g = 0``. Log-probs are at most 0, in float32 (float64 for float64 logits).

    Args:
        logits: ``[..., V]`` float32, bfloat16, float16 or float64. Rows with any strides are read without a copy.
        targets: int64 ``[...]`` token ids in ``[0, V)``.
        vocab: levels and their tokens, for ``"level"``.
        levels: int64, broadcast to ``targets``: the level of each target; at level ``vocab.levels`` only ``eos`` is
            possible. Default: the target's position in the last dimension.
        index: the catalogue, for ``"trie"``.
        nodes: int64, shaped like ``targets``, for ``"trie"``: the node of each target's prefix,
            ``index.nodes(tokens)``.
        normalize: the support of the softmax. ``"vocab"``: all ``V`` tokens. ``"level"``: the codes of the target's
            level and, after the first level, ``eos``. ``"trie"``: the children of the prefix. A target outside its
            support has log-prob ``-inf`` and no gradient.
        temperature: positive.
        logit_softcap: positive, or None.
        ignore_index: a target of this value has log-prob 0 and no gradient.
        inplace_backward: write the gradient over ``logits``, whose values are then lost. For rows that share memory
            (``expand``) and under ``torch.compile``, the gradient gets its own storage instead.
        check: also raise ValueError for NaN logits, and on CUDA for invalid values of integer tensors (synchronises).
            Without it, on CUDA a target outside ``[0, V)`` has log-prob ``-inf``.

    Returns:
        ``[...]``, differentiable once, in reverse mode; other derivatives raise an error.

    Raises:
        ValueError, TypeError: naming the argument and the value.
        RuntimeError: from a second backward pass after ``inplace_backward``.

    Source: the gather - logsumexp identity; Liger Kernel (arXiv 2410.10989) writes gradients in place.

    Example:
        >>> logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
        >>> rx.token_logps(logits, torch.tensor([2, -100]))  # the second target is ignored
        tensor([-0.4076,  0.0000])
    """
    _check_logits(logits, targets)
    refuse_transforms("token_logps", logits)
    scale, softcap = check_transform(temperature, logit_softcap)
    ignore_index = _check.integer(ignore_index, "ignore_index")
    support = support_of(targets, normalize, vocab, levels, index, nodes, logits.shape[-1], ignore_index, check)
    if check:
        check_targets(targets, logits.shape[-1], ignore_index)
        if bool(logits.isnan().any()):
            raise ValueError(f"logits hold NaN, first at {logits.isnan().nonzero()[0].tolist()}")
    columns, begins, counts = (None, None, None) if support is None else support.lists
    options = Options(columns, begins, counts, scale, softcap, ignore_index, 0, logits.shape[-1])
    return differentiable(logits, targets, options, inplace_backward, "token_logps")


def differentiable(logits: Tensor, targets: Tensor, options: Options, inplace_backward: bool, op: str) -> Tensor:
    """Run the op with autograd on logits of any leading shape; ``op`` is its name in errors."""
    rows = _rows(logits)
    if torch.compiler.is_compiling():
        logps = torch.ops.raddpo.token_logps(rows, targets.contiguous(), *options)[0]
    else:
        try:
            inplace = inplace_backward and not _share_memory(rows)
            logps = _TokenLogps.apply(rows, targets.contiguous(), options, inplace, op)[0]
        except RuntimeError:
            # The operator's error does not name the target.
            check_targets(targets, logits.shape[-1], options.ignore_index)
            raise
    return logps if logps.shape == targets.shape else logps.view(targets.shape)


def _rows(logits: Tensor) -> Tensor:
    """``logits`` as ``[rows, V]`` or ``[outer, inner, V]``, as a view where their strides allow it."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if logits.dim() == 1:
        return logits[None]
    return logits if logits.dim() <= 3 else logits.flatten(0, -3)


def _share_memory(rows: Tensor) -> bool:
    """Whether two entries may have the same address."""
    # Walk from the smallest stride on: an entry may not begin within what the dimensions so far reach.
    reach = 1
    for stride, size in sorted(zip(rows.stride(), rows.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def check_targets(targets: Tensor, num_columns: int, ignore_index: int) -> None:
    """Raise ValueError for a target outside the vocabulary."""
    wrong = ((targets < 0) | (targets >= num_columns)) & (targets != ignore_index)
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        raise ValueError(f"targets{place} = {int(targets[wrong][0])} is outside [0, {num_columns})")


def _check_logits(logits: Tensor, targets: Tensor) -> None:
    """Check types and shapes of logits and targets."""
    _check.float_tensor(logits, "logits")
    _check.int64_tensor(targets, "targets")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {tuple(logits.shape)}")
    check_rows(targets, logits, "logits")


def check_rows(targets: Tensor, values: Tensor, name: str) -> None:
    """Raise ValueError unless there is one target per row of ``values``, on the same device."""
    if targets.shape != values.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of {name} without its last dimension, {tuple(values.shape[:-1])}, got "
            f"{tuple(targets.shape)}"
        )
    if targets.device != values.device:
        raise ValueError(f"targets must be on the device of {name}, {values.device}, got {targets.device}")


class _TokenLogps(torch.autograd.Function):
    """Log-probs and log-sum-exps with their gradient. In eager mode this avoids the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, options: Options, inplace_backward: bool, op: str
    ) -> tuple[Tensor, Tensor]:
        logps, lse = logps_and_lse(logits, targets, options)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(logits, targets, lse)
        ctx.options, ctx.inplace, ctx.overwritten, ctx.op = options, inplace_backward, False, op
        return logps, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None, None]:
        logits, targets, lse = saved
        if ctx.inplace:
            ctx.overwritten = True
            logits = logits.detach()  # an alias with no other reference: autograd takes it as the gradient uncopied
            overwrite_by_gradient(grad, logits, targets, lse, ctx.options)
        else:
            logits = torch.ops.raddpo.token_logps_backward(grad.contiguous(), logits, targets, lse, *ctx.options)
        return logits, None, None, None, None


def logps_and_lse(logits: Tensor, targets: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Run the op without autograd."""
    if torch.compiler.is_compiling():
        return torch.ops.raddpo.token_logps(logits, targets, *options)
    return below_autograd(torch.ops.raddpo.token_logps.default, logits, targets, *options)


def overwrite_by_gradient(
    grad: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, options: Options, live: Tensor | None = None
) -> None:
    """Overwrite the logits by their gradient.

    With ``live`` (CPU only), the gradients of these rows alone are written, into the first rows.
    """
    columns, begins, counts, *rest = options
    torch.ops.raddpo.token_logps_backward_(
        grad.contiguous(), logits, targets, lse, columns, begins, counts, live, *rest
    )
    torch.autograd.graph.increment_version(logits)


@torch.library.register_fake("raddpo::token_logps")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape[:-1], dtype=dtype), logits.new_empty(logits.shape[:-1], dtype=torch.float64)


@torch.library.register_fake("raddpo::token_logps_backward")
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("raddpo::token_logps_backward_")
def _(*_: Any) -> None:
    return None


def _differentiable_operator(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The operator's autograd kernel."""
    refuse_transforms_of_operator("token_logps", logits)
    if logits.requires_grad and torch.is_grad_enabled():
        return _TokenLogps.apply(logits, targets, Options(*options), False, "token_logps")
    return below_autograd(torch.ops.raddpo.token_logps.default, logits, targets, *options)


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("token_logps has no second derivative")


_library = torch.library.Library("raddpo", "FRAGMENT")
_library.impl("token_logps", _differentiable_operator, "Autograd")
torch.library.register_autograd("raddpo::token_logps_backward", _no_second_derivative)
