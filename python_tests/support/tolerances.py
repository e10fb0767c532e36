"""How close is close enough: one table for all tests."""

from __future__ import annotations

from typing import NamedTuple

import torch

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


class Tolerance(NamedTuple):
    rtol: float
    atol: float


# Of an op: against the float64 result on the same inputs, already rounded to their type. The dtype is that of the sums:
# float32 for inputs of half precision too, whose gradients may be off by half a unit in their last place on top.
TOLERANCE = {
    ("row_lse", F32): Tolerance(1e-6, 2e-6),
    ("beam_step", F32): Tolerance(1e-6, 4e-6),
    ("beam_search", F32): Tolerance(2e-6, 1e-5),
    ("sample_step", F32): Tolerance(2e-6, 2e-5),
    ("sample_search", F32): Tolerance(2e-6, 4e-5),
    ("token_logps", F32): Tolerance(1e-6, 4e-6),
    ("token_logps.lse", F32): Tolerance(1e-6, 2e-6),
    ("token_logps.grad", F32): Tolerance(1e-5, 1e-6),
    # Relative to g * scale * (onehot + softmax), which a gradient is the difference of.
    ("token_logps.grad terms", F32): Tolerance(6e-6, 0.0),
    ("legal_mass", F64): Tolerance(1e-12, 1e-12),
    ("legal_mass", F32): Tolerance(1e-6, 1e-5),
    ("legal_mass.grad", F64): Tolerance(1e-12, 1e-12),
    ("legal_mass.grad", F32): Tolerance(2e-5, 1.2e-5),  # a difference of softmax weights, times at most 2
    ("linear_token_logps", F32): Tolerance(2e-6, 2e-5),
    ("linear_token_logps.grad", F32): Tolerance(2e-5, 2e-5),
    # The absolute one times the largest reward, if that is above 1.
    ("session_loss", F64): Tolerance(1e-12, 1e-12),
    ("session_loss", F32): Tolerance(1e-5, 2e-6),
    ("group_advantages", F64): Tolerance(1e-12, 1e-10),
    ("group_advantages", F32): Tolerance(1e-6, 1e-6),
    ("policy_loss", F64): Tolerance(1e-11, 1e-12),
    ("policy_loss", F32): Tolerance(2e-6, 2e-6),
    # A weight's place among the others decides the last bit of its sigmoid.
    ("similarity_weighting", F32): Tolerance(0.0, 1e-6),
    # Of a whole model: log-probs of SIDs against plain forwards, or by another way through the same model.
    ("model", F32): Tolerance(0.0, 2e-5),
    ("model", BF16): Tolerance(0.05, 0.3),
    ("token_merger", F32): Tolerance(1e-5, 1e-6),
    ("token_merger", BF16): Tolerance(0.02, 0.1),  # a sum of rounded products
    # Parameters after steps of training, relative to the largest entry of each.
    ("training", F32): Tolerance(1e-6, 1e-6),
}


def close(op: str, dtype: torch.dtype = F32) -> dict[str, float]:
    """As arguments of ``torch.testing.assert_close``."""
    return TOLERANCE[op, dtype]._asdict()
