"""Large float32 matrix products on the CPU, by whichever library of torch is faster.

torch multiplies float32 matrices with MKL, which keeps to AVX2 on processors that are not Intel's. Where these have
AVX-512, oneDNN, which is in torch too, takes about half of MKL's time. It multiplies in float32 as well; sums may
differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from raddpo_ext import _C

_SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)
_TILE = 4096  # rows or columns of the result of one product: oneDNN allocates its result, which stays in the cache
_MIN_FLOPS = 1 << 26  # below it, preparing a new shape takes longer than is saved
_MIN_FLOPS_RECURRING = 1 << 23  # below it, MKL is about as fast
_FEW = 16  # rows, or products per sum, below which MKL is as fast
FRESH = 1 << 25  #: Bytes from which malloc maps fresh pages for every call.


def linear(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    add: bool = False,
    recurs: bool = False,
) -> Tensor:
    """``left @ right.T + bias``, without gradient.

    Args:
        left: ``[N, K]``.
        right: ``[M, K]``.
        bias: ``[M]``.
        out: ``[N, M]``, to write to.
        add: add to ``out`` instead; without ``bias``.
        recurs: whether many products have these shapes, so that preparing them for oneDNN pays for smaller ones too.

    Returns:
        ``out``, or a new tensor.
    """
    is_differentiated = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if is_differentiated or not is_by_onednn(left, right, recurs):
        if bias is not None:
            return torch.addmm(bias, left, right.T, out=out)
        if out is not None and add:
            return out.addmm_(left, right.T)
        return torch.mm(left, right.T, out=out)
    rows, columns = len(left), len(right)
    if out is None and max(rows, columns) <= _TILE:
        return _onednn(left, right, bias)
    # Tile by tile along the longer side of the result.
    out = empty(left, (rows, columns)) if out is None else out
    for begin in range(0, max(rows, columns), _TILE):
        tile = slice(begin, begin + _TILE)
        if rows > columns:
            piece, place = _onednn(left[tile], right, bias), out[tile]
        else:
            piece, place = _onednn(left, right[tile], None if bias is None else bias[tile]), out[:, tile]
        place.add_(piece) if add else place.copy_(piece)
    return out


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised tensor; a large one on the CPU uses huge pages, see csrc/common/huge_pages.h."""
    out = like.new_empty(shape)
    if out.device.type == "cpu" and not torch.compiler.is_compiling() and out.nbytes >= FRESH:
        _C.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def is_by_onednn(left: Tensor, right: Tensor, recurs: bool = False) -> bool:
    """Whether ``left @ right.T`` is oneDNN's."""
    if left.device.type != "cpu" or not left.dtype == right.dtype == torch.float32:
        return False
    # Too little to do: the time goes into reading or writing one of the matrices, or into preparing a new shape.
    rows, inner = left.shape
    if inner < _FEW or (rows < _FEW and right.stride(1) > 1):
        return False
    min_rows, min_flops = (1, _MIN_FLOPS_RECURRING) if recurs else (2 * _FEW, _MIN_FLOPS)
    if 2 * max(rows, min_rows) * len(right) * inner < min_flops or not left.numel() or not right.numel():
        return False
    if torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled:
        return False
    return onednn_is_faster()


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is faster than MKL here, and torch has the operator that calls it."""
    if _C.best_isa() != "avx512" or not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    return not _is_intel() and _has_operator()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # where there is no /proc, leave it to MKL
        return True


def _has_operator() -> bool:
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return operator is not None and str(operator.default._schema) == _SCHEMA


def _onednn(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return product
