"""legal_mass: the probability that the vocabulary's softmax gives to the children of a prefix, in one read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._autograd import below_autograd, differentiable_once, refuse_transforms, refuse_transforms_of_operator
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.logps.softmax_support import support_of


def legal_mass(logits: Tensor, index: TrieIndex, nodes: Tensor, *, check: bool = False) -> Tensor:
    """Compute ``log M``, where ``M`` is the probability of the tokens that can follow a prefix in the catalogue.

    This is ``logsumexp of the children's logits - logsumexp of all logits``: with it, :func:`token_logps` over the
    trie and over the vocabulary differ by ``log p_vocab = log p_trie + log M``. The gradient is the softmax over the
    children minus the softmax over the vocabulary. ``M`` is the exact expectation of a reward of 1 for a legal token;
    a loss with ``-mean(log M)`` lowers the share of invalid SIDs under unconstrained decoding, without sampling them.

    Args:
        logits: ``[..., V]`` float32, bfloat16 or float16, and float64 on the CPU.
        index: the catalogue, on the same device.
        nodes: int64 ``[...]``: the node of each prefix, ``index.nodes(tokens)``. A node without children and -1, which
            is no node, have ``M = 0``: ``-inf`` without gradient.
        check: also raise ValueError for NaN logits, and on CUDA for invalid nodes (synchronises).

    Returns:
        ``[...]`` at most 0, float32 (float64 for float64 logits), differentiable once, in reverse mode. NaN for a row
        with a NaN or ``+inf``.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [0, 2], [2, 1]])
        >>> nodes = index.nodes(torch.tensor([[0, 1]]))  # of the prefixes () and (0)
        >>> rx.legal_mass(torch.zeros(1, 2, 4), index, nodes).exp()
        tensor([[0.5000, 0.5000]])
    """
    _check.float_tensor(logits, "logits")
    refuse_transforms("legal_mass", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {tuple(logits.shape)}")
    if logits.dtype == torch.float64 and logits.device.type == "cuda":
        raise TypeError("logits must be float32, bfloat16 or float16 on CUDA, got torch.float64")
    _check.int64_tensor(nodes, "nodes")
    if nodes.shape != logits.shape[:-1]:
        raise ValueError(
            f"nodes must have the shape of logits without its last dimension, {tuple(logits.shape[:-1])}, got "
            f"{tuple(nodes.shape)}"
        )
    if nodes.device != logits.device:
        raise ValueError(f"nodes must be on the device of logits, {logits.device}, got {nodes.device}")
    support = support_of(nodes, "trie", None, None, index, nodes, logits.shape[-1], -100, check)
    assert support is not None
    if check and bool(logits.isnan().any()):
        raise ValueError(f"logits hold NaN, first at {logits.isnan().nonzero()[0].tolist()}")
    columns, begins, counts = support.flatten().lists
    rows = logits.reshape(-1, logits.shape[-1]).contiguous()
    op = torch.ops.raddpo.legal_mass if torch.compiler.is_compiling() else _differentiable
    mass, _ = op(rows, columns, begins.contiguous(), counts.contiguous())
    return mass.view(nodes.shape)


class _LegalMass(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *lists: Tensor) -> tuple[Tensor, Tensor]:
        mass, lse = below_autograd(torch.ops.raddpo.legal_mass.default, logits, *lists)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(logits, lse, *lists)
        ctx.overwritten, ctx.op = False, "legal_mass"
        return mass, lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        logits, lse, *lists = saved
        return torch.ops.raddpo.legal_mass_backward(grad.contiguous(), logits, lse, *lists), None, None, None


def _differentiable(logits: Tensor, *lists: Tensor) -> tuple[Tensor, Tensor]:
    """The operator's autograd kernel."""
    refuse_transforms_of_operator("legal_mass", logits)
    if logits.requires_grad and torch.is_grad_enabled():
        return _LegalMass.apply(logits, *lists)
    return below_autograd(torch.ops.raddpo.legal_mass.default, logits, *lists)


@torch.library.register_fake("raddpo::legal_mass")
def _(logits: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    dtype, rows = torch.float64 if logits.dtype == torch.float64 else torch.float32, logits.shape[0]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((2, rows), dtype=torch.float64)


@torch.library.register_fake("raddpo::legal_mass_backward")
def _(grad: Tensor, logits: Tensor, *_: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("legal_mass has no second derivative")


_library = torch.library.Library("raddpo", "FRAGMENT")
_library.impl("legal_mass", _differentiable, "Autograd")
torch.library.register_autograd("raddpo::legal_mass_backward", _no_second_derivative)
