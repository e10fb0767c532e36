"""Row log-sum-exp: the lower bound on the time of every op that must read its logits once."""

from __future__ import annotations

import torch
from torch import Tensor

from raddpo_ext._autograd import refuse_transforms


def row_lse(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row, float32 ``[N]``, of contiguous float32, bfloat16 or float16 logits ``[N, V]``.

    A row of ``-inf`` gives ``-inf``, a row with a NaN or ``+inf`` NaN. No gradient.
    """
    refuse_transforms("row_lse", logits)
    return torch.ops.raddpo.row_lse(logits.detach())


@torch.library.register_fake("raddpo::row_lse")
def _(logits: Tensor) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=torch.float32)
