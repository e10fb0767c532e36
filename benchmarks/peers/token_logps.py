"""Token log-probs, forward and backward, by other libraries, beside those of :mod:`raddpo_ext.bench.token_logps_peers`.

Other libraries are imported where they are installed (see ``requirements.txt``) and none of their code is here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from raddpo_ext.bench.compare import Missing
from raddpo_ext.bench.token_logps_cases import BETA, BUDGET, CANDIDATES, GAMMA, Case, Problem, Step
from raddpo_ext.bench.token_logps_peers import (
    EXPRESSIONS,
    FP32_EXPRESSIONS,
    Method,
    bare_gemms,
    bare_level_gemms,
    bare_passes,
    bare_passes_in_place,
    columns,
    compiled,
    copy,
    head_slices,
    mask,
    ours,
    ours_in_place,
    torch_lce,
    torch_lce_auto,
)

TRL_TILE = 32768  # vocabulary rows a tile, as its trainers set it


def trl(problem: Problem) -> Step:
    """TRL's chunked log-probs, under its trainers' fused LM head."""
    try:
        import trl.trainer.utils  # noqa: F401  the backward pass imports it, in seconds
        from trl.kernels import ChunkedLogProbFunction
    except ImportError:
        raise Missing("trl.kernels (TRL 1.16) is not importable") from None
    head = problem.hidden, problem.weight, None, problem.targets
    options = 1.0, TRL_TILE, None, 1.0, ("log_probs",)  # temperature, tile, softcap, scale, outputs
    return lambda: problem.backward(ChunkedLogProbFunction.apply(*head, *options)[0])


def liger(problem: Problem, compiled: bool = False) -> Step:
    """Liger's fused linear SimPO, all pairs in one chunk. Its default of a pair a chunk is several times slower."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss
    except ImportError:
        raise Missing("liger_kernel.chunked_loss (Liger 0.8.5) is not importable") from None
    options = {"beta": BETA, "gamma": GAMMA, "compute_nll_loss": False, "chunk_size": CANDIDATES // 2}
    loss_of = LigerFusedLinearSimPOLoss(compiled=compiled, **options)
    targets = problem.targets.view(CANDIDATES, -1)

    def step() -> Tensor:
        loss = loss_of(problem.weight, problem.hidden.view(*targets.shape, -1), targets)[0]
        loss.backward()
        return loss.detach()

    return step


def liger_compiled(problem: Problem) -> Step:
    step = liger(problem, compiled=True)
    try:
        step()
    except RuntimeError as error:
        raise Missing(f"Liger's torch.compile does not work here: {str(error).splitlines()[0]}") from None
    return step


def verl(problem: Problem) -> Step:
    """verl's fused linear head in torch. Its module is loaded by path: the package would start Ray."""
    found = importlib.util.find_spec("verl")
    if found is None or found.origin is None:
        raise Missing("the package verl is not installed")
    path = Path(found.origin).parent / "utils" / "experimental" / "torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        raise Missing(f"verl's torch path cannot be loaded: {error}") from None
    head = module.FusedLinearForPPO()
    return lambda: problem.backward(head(problem.hidden, problem.weight, problem.targets)[0])


PEERS: dict[str, Method] = {
    "trl": trl,
    "liger": liger,
    "liger_compiled": liger_compiled,
    "verl": verl,
    "torch_lce": torch_lce,
    "torch_lce_auto": torch_lce_auto,
}


def methods(case: Case) -> dict[str, Method]:
    """What is timed for the case, ours first."""
    fp32 = {} if case.dtype == torch.float32 else FP32_EXPRESSIONS
    if case.section == "logits":
        floors = {"bare_passes": bare_passes, "bare_passes_in_place": bare_passes_in_place, "copy": copy}
        return {"ours": ours, "ours_in_place": ours_in_place, **EXPRESSIONS, **fp32, "compiled": compiled, **floors}
    if case.section == "level":
        by_level = {"mask": mask, "columns": columns, "head_slices": head_slices}
        return {"ours": ours, **by_level, "bare_level_gemms": bare_level_gemms}
    if case.logit_bytes > BUDGET:
        return {"ours": ours}  # plain torch would need several times the memory
    against: dict[str, Method] = {}
    if case.section == "sweep":
        against = {"gather_lse": EXPRESSIONS["gather_lse"]}
    elif case.section == "peers":
        against = {name: method for name, method in (EXPRESSIONS | fp32).items() if "log_softmax" not in name} | PEERS
    return {"ours": ours, **against, "bare_gemms": bare_gemms}
