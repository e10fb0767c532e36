"""The kernels under compute-sanitizer: ``python -m python_tests.gpu.gpu_sanitize``.

Each tool watches a small program (this file with ``--drive``) that calls every kernel and compares with the CPU. Where
a tool does not run on this device its message is recorded instead. The result is written after every tool.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import raddpo_ext as rx
from benchmarks.gpu.report import gpu_environment, require_gpu
from benchmarks.harness import results
from benchmarks.harness.catalogues import ROOT
from benchmarks.harness.report import RESULTS
from python_tests.support.beam_cases import (
    DTYPES,
    NORMALIZE,
    exact_logits,
    generator_of,
    random_state,
    state_of,
    wide_index,
)
from python_tests.support.logit_cases import DTYPES as LOGIT_TYPES
from python_tests.support.logit_cases import (
    MAPS,
    SUPPORTS,
    assert_backward_close,
    assert_forward_close,
    random_call,
    random_grad,
)
from raddpo_ext.decoding.row_lse import row_lse

TOOLS = {
    "memcheck": [],
    "racecheck": ["--racecheck-report", "all"],
    "initcheck": [],
    "synccheck": [],
}
FOUND = 86  # the exit code of a tool that found something
DRIVEN = "every kernel was driven"


def drive() -> None:
    """Every kernel on small inputs; only copies besides, as the tools watch torch's kernels too."""
    index = wide_index()
    for one in (index, index.restrict(index.items[::3])):
        drive_steps(one)
        drive_lookups(one)
    drive_child_logits(index)
    drive_token_logps()
    drive_session_loss()
    print(DRIVEN)


def drive_steps(index: rx.TrieIndex) -> None:
    on_device = index.to("cuda")

    def check(logits: torch.Tensor, state: rx.BeamState, width: int, **options: Any) -> None:
        expected = rx.beam_step(logits, state, index, width, **options)
        moved = rx.BeamState(*(part.to("cuda") for part in vars(state).values()))
        got = rx.beam_step(logits.to("cuda"), moved, on_device, width, **options)
        torch.testing.assert_close(got.scores.cpu(), expected.scores, rtol=1e-5, atol=1e-5)
        if options.get("normalize", "vocab") == "vocab":  # exact scores, so that ties must fall alike
            for part in ("tokens", "parents", "nodes"):
                assert getattr(got, part).tolist() == getattr(expected, part).tolist(), part

    left = index.nodes_at(torch.arange(index.num_nodes))
    last = int(left[-1])
    nodes = torch.cat([left[1:4], torch.tensor([last, int(left[5]), -1])])[None]
    for dtype in DTYPES:
        for normalize in NORMALIZE:
            check(exact_logits((1, 6, 1603), dtype, 0), state_of(torch.zeros(1, 6), nodes), 70, normalize=normalize)
    check(exact_logits((1, 6, 1603), DTYPES[0], 1), state_of(torch.zeros(1, 6), nodes), 1500)  # in global memory
    check(exact_logits((2, 4, 1601), DTYPES[1], 2), random_state(index, 2, 4, generator_of(0)), 30, length_penalty=1.0)
    many = left[torch.randint(len(left), (1, 600), generator=generator_of(1))]
    check(exact_logits((1, 600, 1601), DTYPES[1], 3), state_of(torch.zeros(1, 600), many), 700)
    check(torch.full((1, 6, 1601), float("nan")), state_of(torch.zeros(1, 6), nodes), 4)


def drive_lookups(index: rx.TrieIndex) -> None:
    on_device = index.to("cuda")
    some = torch.arange(-2, index.node_bound + 2, 37)
    for lookup in (rx.TrieIndex.paths, rx.TrieIndex.item_ranges, rx.TrieIndex.child_ranges):
        got, expected = lookup(on_device, some.to("cuda")), lookup(index, some)
        assert [part.tolist() for part in got] == [part.tolist() for part in expected]
    places = torch.arange(0, index.num_nodes, 41)
    assert on_device.nodes_at(places.to("cuda")).tolist() == index.nodes_at(places).tolist()
    tokens = torch.randint(0, 9, (40, 3), generator=generator_of(2))
    walk = torch.ops.raddpo.trie_walk
    assert walk(tokens.to("cuda"), *on_device.block).tolist() == index._walk(tokens).tolist()


def drive_child_logits(index: rx.TrieIndex) -> None:
    on_device = index.to("cuda")
    generator, level_symbols = generator_of(4), index.num_symbols[1]
    scores, beams = torch.zeros(1, 6), torch.tensor([[1, 2, 0, index.num_nodes - 1, 5, -1]])
    for dtype in DTYPES:
        for size, shift in ((4099, 0), (4104, 1), (64, 0)):  # more than a piece; rows that are not aligned
            hidden = torch.randn(6, size, generator=generator).to(dtype)
            weight = torch.randn(1600, size + shift, generator=generator).to(dtype)
            bias = torch.randn(1600, generator=generator).to(dtype)
            states = []
            for one, on in ((index, "cpu"), (on_device, "cuda")):
                head = (hidden.to(on), weight.to(on)[:, shift:], bias.to(on))
                at = (scores.view(-1).to(on), beams.view(-1).to(on), *one.block)
                logits = torch.ops.raddpo.child_logits(*head, *at, 0.1, 2.0, 1, level_symbols).view(1, 6, -1)
                for normalize, sums in ((0, torch.full((1, 6), 9.0)), (2, None)):
                    state = (scores.to(on), beams.to(on), *one.block, None if sums is None else sums.to(on))
                    states.append(torch.ops.raddpo.beam_step(logits, *state, 1, 70, normalize, 0.0)[0].cpu())
            torch.testing.assert_close(states[2], states[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(states[3], states[1], rtol=1e-4, atol=1e-4)
    for normalize in range(3):  # a level's columns, the log-sum-exp worked out
        logits = torch.randn(1, 6, level_symbols, generator=generator)
        expected, got = (
            torch.ops.raddpo.beam_step(
                logits.to(on), scores.to(on), beams.to(on), *one.block, None, 1, 70, normalize, 0.0
            )[0].cpu()
            for one, on in ((index, "cpu"), (on_device, "cuda"))
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def drive_token_logps() -> None:
    for dtype in DTYPES:
        for columns in (1, 33, 5001):
            logits = torch.randn(3, columns, generator=generator_of(columns)).to(dtype)
            torch.testing.assert_close(row_lse(logits.to("cuda")).cpu(), row_lse(logits), rtol=1e-5, atol=1e-5)
    for seed, (dtype, support, map_, cols) in enumerate(
        [(dtype, support, MAPS[0], 9001) for dtype in LOGIT_TYPES for support in SUPPORTS]
        + [(DTYPES[0], support, map_, 301) for support in SUPPORTS for map_ in MAPS[1:]]
        + [(DTYPES[1], support, MAPS[0], 70_001) for support in SUPPORTS]
    ):
        call = random_call(5, cols, dtype, support, map_, seed, seed % 8)
        moved, grad = call.to("cuda"), random_grad(call, seed)
        logps, lse = torch.ops.raddpo.token_logps(*moved)
        assert_forward_close((logps, lse), call)
        arguments = moved.backward(grad.to("cuda"), lse)
        assert_backward_close(torch.ops.raddpo.token_logps_backward(*arguments), call, grad, lse.cpu())
        torch.ops.raddpo.token_logps_backward_(*arguments[:7], None, *arguments[7:])
        assert_backward_close(moved.logits, call, grad, lse.cpu())


def drive_session_loss() -> None:
    counts = [(1, 3), (2, 5), (0, 2), (3, 0), (4, 200)]
    sizes = torch.tensor([0, *(positives + negatives for positives, negatives in counts)])
    rows = int(sizes.sum())
    sessions = rx.SessionBatch(
        tokens=torch.randint(1, 4, (rows, 4), generator=generator_of(5)),
        lengths=torch.randint(0, 5, (rows,), generator=generator_of(6)),
        offsets=sizes.cumsum(0),
        num_positives=torch.tensor([positives for positives, _ in counts]),
    )
    logps = -3 * torch.rand(rows, 4, generator=generator_of(7))
    for positives in ("winner", "each", "pooled"):
        found = []
        for on in ("cpu", "cuda"):
            leaf = logps.detach().to(on).requires_grad_()
            result = rx.rad_dpo_loss(leaf, sessions.to(on), positives=positives, sft_weight=0.5)
            result.loss.backward()
            found.append([value.detach().cpu() for value in (*result, leaf.grad)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def sanitizer() -> str | None:
    folder = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{folder}/bin")


def run(program: str, tool: str, seconds: float) -> dict[str, Any]:
    command = [program, "--tool", tool, *TOOLS[tool], "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "python_tests.gpu.gpu_sanitize", "--drive"]
    # One allocation a tensor, so that each buffer's end is known to the tool.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        parts = [part.decode() if isinstance(part, bytes) else part or "" for part in (error.stdout, error.stderr)]
        code, text = None, "".join(parts)
    return {
        "tool": tool,
        "verdict": verdict(code, text),
        "exit_code": code,
        "seconds": round(time.perf_counter() - begin, 1),
        "summary": re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text),
        "output": text[:2000] + ("\n...\n" + text[-2000:] if len(text) > 4000 else text[2000:]),
    }


def verdict(code: int | None, text: str) -> str:
    """``clean``; ``found errors``, in a kernel of this package or with a wrong result; or why the tool did not tell."""
    if code is None:
        return "ran out of time"
    if code == 0 and DRIVEN in text:
        return "clean"
    if "raddpo::" in text or "AssertionError" in text:
        return "found errors"
    if DRIVEN in text:
        return "clean but for kernels of other packages"
    return "did not run on this device"


def exit_code(runs: list[dict[str, Any]]) -> int:
    """0 only where every tool watched every kernel: a tool that drove nothing has found nothing."""
    return int(not runs or not all(run["verdict"].startswith("clean") for run in runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_sanitize.jsonl", help="where the result goes")
    parser.add_argument("--seconds", type=float, default=100, help="for each tool")
    parser.add_argument("--drive", action="store_true", help="only call the kernels")
    arguments = parser.parse_args()
    require_gpu()
    if arguments.drive:
        drive()
        return
    program = sanitizer()
    if program is None:
        raise SystemExit("compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin")
    runs: list[dict[str, Any]] = []
    result = {**gpu_environment("python_tests.gpu.gpu_sanitize"), "results": runs}
    for tool in TOOLS:
        runs.append(run(program, tool, arguments.seconds))
        results.write(arguments.out, {"gpu_sanitize": result})
        print(f"{tool}: {runs[-1]['verdict']} {' '.join(runs[-1]['summary'])}", flush=True)
    raise SystemExit(exit_code(runs))


if __name__ == "__main__":
    main()
