"""The session loss with its gradient, beside vectorised torch."""

from __future__ import annotations

import torch

from raddpo_ext.bench.compare import Comparison
from raddpo_ext.bench.session_loss_cases import Batch, Case
from raddpo_ext.bench.session_loss_peers import bare_bytes, ours, vectorised


def comparison(device: torch.device, *, case: Case) -> Comparison:
    batch = Batch(case, device)
    sizes = f"{case.sessions} sessions, {len(batch.logps):,} candidates, {len(batch.weights):,} pairs"
    return Comparison(
        f"rad_dpo_loss and gradient, {sizes}",
        {"ours": ours(batch), "vectorised torch": vectorised(batch)},
        {"its bytes, copied": bare_bytes(batch)},
    )
