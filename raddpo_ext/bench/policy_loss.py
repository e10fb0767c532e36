"""The policy loss with its gradient, beside elementwise torch."""

from __future__ import annotations

import torch

from raddpo_ext.bench.compare import Comparison
from raddpo_ext.bench.policy_loss_cases import Batch, Case
from raddpo_ext.bench.policy_loss_peers import bare_bytes, ours, vectorised


def comparison(device: torch.device, *, case: Case) -> Comparison:
    batch = Batch(case, device)
    sizes = f"{batch.sessions.num_sessions} groups of {batch.sessions.num_candidates} rows"
    return Comparison(
        f"policy_loss ({case.preset}{' with KL' * case.ref}) and gradient, {sizes}",
        {"ours": ours(batch), "elementwise torch": vectorised(batch)},
        {"its bytes, copied": bare_bytes(batch)},
    )
