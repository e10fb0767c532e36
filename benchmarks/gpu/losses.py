"""Losses on a GPU with their gradients beside torch, ``torch.compile``, TRL's and Liger's Triton kernels.

A call goes from the leaves to their gradients and is timed with events, launches by the host included, as a trainer
meets it; ``graph_us`` of ours alone shows what is left without them. All methods are first checked to give one value
and one gradient. Libraries that cannot be imported are named in the result (``benchmarks/peers/requirements.txt``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.gpu.timing import graph_us, median_us
from benchmarks.harness.report import markdown
from benchmarks.peers.token_logps import PEERS
from benchmarks.peers.token_logps_timing import TOLERANCE
from raddpo_ext.bench.compare import Missing
from raddpo_ext.bench.session_loss_cases import Batch
from raddpo_ext.bench.session_loss_cases import Case as SessionCase
from raddpo_ext.bench.token_logps_cases import CANDIDATES, Case, Problem, Step
from raddpo_ext.bench.token_logps_peers import (
    EXPRESSIONS,
    FLOORS,
    Method,
    bare_gemms,
    log_softmax_fp32,
    ours,
    plain,
)

VOCAB = 151_936
BF16 = torch.bfloat16
# SimPO over 16 candidates of 4 tokens, and of 16 such sessions; then the mean cross-entropy of as many tokens.
CASES = [
    *(
        Case("peers", rows, VOCAB, 1024, dtype, length=rows // CANDIDATES)
        for rows in (64, 1024)
        for dtype in (torch.float32, BF16)
    ),
    *(Case("sft", rows, VOCAB, 1024, BF16) for rows in (64, 1024, 4096)),
]


def mean_of(logps: Callable[[Problem], Tensor]) -> Method:
    """The mean cross-entropy from the log-probs."""

    def prepare(problem: Problem) -> Step:
        def step() -> Tensor:
            loss = -logps(problem).float().mean()
            loss.backward()
            return loss.detach()

        return step

    return prepare


def liger_cross_entropy(problem: Problem) -> Step:
    """Liger's fused linear cross-entropy: Triton, in chunks it chooses itself."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Missing(f"Liger is not importable: {error}") from None
    loss_of = LigerFusedLinearCrossEntropyLoss()

    def step() -> Tensor:
        loss = loss_of(problem.weight, problem.hidden, problem.targets)
        loss.backward()
        return loss.detach()

    return step


def trl_logps(problem: Problem) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    head = problem.hidden, problem.weight, None, problem.targets
    return ChunkedLogProbFunction.apply(*head, 1.0, 32768, None, 1.0, ("log_probs",))[0]


def trl_cross_entropy(problem: Problem) -> Step:
    try:
        import trl.kernels
    except ImportError as error:
        raise Missing(f"TRL is not importable: {error}") from None
    assert trl.kernels
    return mean_of(trl_logps)(problem)


def methods(case: Case) -> dict[str, Method]:
    compiled = torch.compile(log_softmax_fp32)
    if case.section == "sft":
        return {
            "ours": mean_of(lambda p: rx.linear_token_logps(p.hidden, p.weight, p.targets)),
            "torch": mean_of(lambda p: log_softmax_fp32(p.logits, p.targets)),
            "compiled": mean_of(lambda p: compiled(p.logits, p.targets)),
            "trl": trl_cross_entropy,
            "liger": liger_cross_entropy,
            "bare_gemms": bare_gemms,
        }
    names = ("trl", "liger", "liger_compiled", "torch_lce")
    peers = {"torch": plain(log_softmax_fp32), **EXPRESSIONS, "compiled": plain(compiled)}
    return {"ours": ours, **peers, **{name: PEERS[name] for name in names}, "bare_gemms": bare_gemms}


@dataclass
class Call:
    value: dict[str, Tensor]
    peak_bytes: int


def called(problem: Problem, step: Step) -> Call:
    """Value and gradients of one call, and the most memory it held over what was there before."""
    problem.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = {"value": step()}
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return Call(value | {name: leaf.grad for name, leaf in problem.leaves.items() if leaf.grad is not None}, peak)


def measure(case: Case, prepared: Mapping[str, Method]) -> dict[str, Any]:
    problem = Problem(case, "cuda")
    expected: dict[str, Tensor] = {}
    times: dict[str, float] = {}
    peaks: dict[str, int] = {}
    unavailable: dict[str, str] = {}
    for name, method in prepared.items():
        try:
            step = method(problem)
            call = called(problem, step)
        except Missing as missing:
            unavailable[name] = str(missing)
            continue
        except RuntimeError as error:  # a peer's kernel that does not compile or fit there
            unavailable[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        expected = expected or {what: value.clone() for what, value in call.value.items()}
        if name not in FLOORS:
            for what, value in expected.items():
                error = float((call.value[what].float() - value.float()).norm() / value.float().norm())
                if error > TOLERANCE[case.dtype]:
                    unavailable[name] = f"{what} differs from ours by {error:.2g}"
            if name in unavailable:
                continue

        def run(step: Step = step) -> None:
            problem.reset()
            step()

        times[name], peaks[name] = median_us(run, 1), call.peak_bytes
    problem.clear()
    flops = 6 * case.rows * case.vocab * case.hidden
    return {"case": case.name, "us": times, "peak_bytes": peaks, "unavailable": unavailable, "flops": flops}


def measure_sessions(case: SessionCase, bandwidth: float) -> dict[str, Any]:
    """``rad_dpo_loss`` and its gradient, replayed from a graph and called; the launches of each way."""
    batch = Batch(case, "cuda")
    sessions, weights = batch.sessions, batch.weights
    logps = [batch.logps.detach().clone().requires_grad_() for _ in range(4)]

    def step(leaf: Tensor) -> None:
        leaf.grad = None
        rx.rad_dpo_loss(leaf, sessions, positives=case.positives, pair_weights=weights).loss.backward()

    def forward(leaf: Tensor) -> None:
        with torch.no_grad():
            rx.rad_dpo_loss(leaf, sessions, positives=case.positives, pair_weights=weights)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(logps[0])
        torch.cuda.synchronize()
    launches = {event.key: event.count for event in profile.key_averages() if "raddpo" in event.key}
    size = 2 * logps[0].nbytes + sessions.tokens.nbytes + weights.nbytes
    return {
        "case": case.name,
        "forward_us": graph_us(forward, logps),
        "call_us": median_us(lambda: step(logps[0]), 1),
        "floor_us": 1e6 * size / bandwidth,
        "launches": launches,
    }


SESSION_CASES = [SessionCase("winner"), SessionCase("pooled"), SessionCase("winner", sessions=4096)]


def loss_table(rows: list[dict[str, Any]], rate: float) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["us"] if name not in ("ours", *FLOORS)))
    head = [
        "case",
        "ours us",
        "bare products us",
        "of the product rate",
        *(f"{name} / ours" for name in names),
        "ours MB",
    ]
    lines = []
    for row in rows:
        us = row["us"]
        ratios = [f"{us[name] / us['ours']:.2f}x" if name in us else "-" for name in names]
        line = [row["case"], f"{us['ours']:.0f}", f"{us['bare_gemms']:.0f}"]
        line += [f"{row['flops'] / (1e-6 * us['ours']) / rate:.0%}", *ratios, f"{row['peak_bytes']['ours'] / 1e6:.0f}"]
        lines.append(line)
    return markdown(head, lines)


def session_table(rows: list[dict[str, Any]]) -> str:
    head = ["session loss", "forward us", "call with gradient us", "floor us", "launches"]
    return markdown(
        head,
        [
            [
                row["case"],
                *(f"{row[key]:.1f}" for key in ("forward_us", "call_us", "floor_us")),
                str(sum(row["launches"].values())),
            ]
            for row in rows
        ],
    )


def measure_all(
    bandwidth: float, rate: float, result: dict[str, Any], write: Callable[[], None], more: Callable[[], bool]
) -> str:
    """Every case while there is time for ``more``, written as it ends; the tables."""
    losses: list[dict[str, Any]] = []
    sessions: list[dict[str, Any]] = []
    result |= {"losses": losses, "session_losses": sessions}
    for session_case in SESSION_CASES:
        sessions.append(measure_sessions(session_case, bandwidth))
        write()
        print(session_table(sessions).splitlines()[-1], flush=True)
    for case in filter(lambda _: more(), CASES):
        losses.append(measure(case, methods(case)))
        write()
        print(loss_table(losses, rate).splitlines()[-1], losses[-1]["unavailable"], flush=True)
        torch.cuda.empty_cache()
    return "\n\n".join([session_table(sessions), *([loss_table(losses, rate)] if losses else [])])
