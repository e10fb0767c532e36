"""Group advantages, beside a loop over groups in Python."""

from __future__ import annotations

import torch

from raddpo_ext.bench import group_advantages_peers as peers
from raddpo_ext.bench.compare import Comparison, Run
from raddpo_ext.bench.group_advantages_cases import Batch, Case, Step


def comparison(device: torch.device, *, case: Case) -> Comparison:
    batch = Batch(case, device)

    def call(step: Step) -> Run:
        return lambda: (step(),)

    found = Comparison(
        f"group_advantages ({case.credit}), {batch.sessions.num_sessions} groups of {case.rows} rows",
        {"ours": call(peers.ours(batch)), "loop over groups": call(peers.loop(batch))},
        {"its bytes, copied": peers.bare_bytes(batch)},
    )
    found.offer("vectorised torch", lambda: call(peers.vectorised(batch)))
    return found
