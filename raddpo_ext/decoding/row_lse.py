"""Row log-sum-exp: the lower bound on the time of every op that must read its logits once."""

from __future__ import annotations

import torch
from torch import Tensor

from raddpo_ext._autograd import refuse_transforms


def row_lse(logits: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Log-sum-exp of each row, float32 ``[N]``, of contiguous float32, bfloat16 or float16 logits ``[N, V]``.

    A row of ``-inf`` gives ``-inf``, a row with a NaN or ``+inf`` NaN. No gradient. ``out``: contiguous float32
    ``[N]``, to write to.
    """
    refuse_transforms("row_lse", logits)
    if out is None:
        out = logits.new_empty(len(logits), dtype=torch.float32)
    torch.ops.raddpo.row_lse(logits.detach(), out)
    return out


@torch.library.register_fake("raddpo::row_lse")
def _(logits: Tensor, out: Tensor) -> None:
    return None
