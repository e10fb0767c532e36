"""Token log-probs with their gradients: from logits, and from hidden states through a language model's head."""

from __future__ import annotations

import torch
from torch import Tensor

from raddpo_ext.bench import token_logps_peers as peers
from raddpo_ext.bench.compare import Comparison, Run
from raddpo_ext.bench.token_logps_cases import Case, Problem


def comparison(device: torch.device, *, case: Case, compiled: bool = True) -> Comparison:
    """Log-probs with their gradients.

    The floor from logits reads them twice and writes them once. The floor from hidden states is the three products for
    the logits and both gradients. Both write into memory that exists already.
    """
    # Every method makes the log-probs and new gradients of the leaves.
    problem = Problem(case, device)

    def call(method: peers.Method) -> Run:
        step = method(problem)

        def run() -> tuple[Tensor | None, ...]:
            """The log-probs and fresh gradients of the leaves."""
            return step(), *(leaf.grad for leaf in problem.leaves.values())

        return run

    plain = call(peers.EXPRESSIONS["log_softmax"])
    # From logits.
    if not case.hidden:
        found = Comparison(
            f"token_logps and gradient, {case.rows} x {case.vocab} logits",
            {"ours": call(peers.ours), "log_softmax, gather": plain},
            {"log-sum-exp and a pass": peers.bare_passes_in_place(problem)},
            before=problem.reset,
        )
        if compiled:
            found.offer("torch.compile of these", lambda: call(peers.compiled))
        return found
    # From hidden states.
    found = Comparison(
        f"linear_token_logps and gradients, {case.rows} rows H={case.hidden} V={case.vocab}",
        {"ours": call(peers.ours), "matmul, log_softmax, gather": plain},
        {"three bare matmuls": peers.bare_gemms(problem)},
        before=problem.reset,
    )
    found.offer("F.linear_cross_entropy", lambda: call(peers.torch_lce))
    return found
