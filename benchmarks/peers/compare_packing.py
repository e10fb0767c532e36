"""One row a session against one row a candidate: time and memory of a training step, on one CPU thread::

    python -m benchmarks.peers.compare_packing
    python -m benchmarks.peers.compare_packing --quick --cases V=152k

A step is the forward and the backward pass of one session through a stock Qwen3 of transformers (hidden size 512, 4
layers, 8 heads of 64, 2 of them for keys and values, intermediate size 1536, float32), the log-probs by
``linear_token_logps`` and the loss by ``rad_dpo_loss``, alike for all layouts; the optimizer is left out.
``replicated`` gives every candidate its own copy of the prompt, under the model's own causal mask. Gradients stay
allocated from step to step, as with ``zero_grad(set_to_none=False)``.

Cases run in fresh processes. Within one, the layouts are first checked to give the same loss and gradients, then they
take turns. Times and ratios are medians over processes and rounds, the spread is the processes' least and most.
Activations are the bytes that autograd saves for the backward pass, each storage once, parameters left out; the peak is
the process's own over what it held before the step. The floor is arithmetic: floating-point operations of the matrix
products.

The collator is timed on 64 rows of Python lists, as ``datasets`` gives them, of 16 candidates of 4 tokens each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.harness import catalogues, report, results
from benchmarks.harness.report import MIB
from benchmarks.harness.timing import measured, middle, take_turns, timed
from benchmarks.peers.packing_cases import CODES, LAYOUTS, LEVELS, Case, Problem
from raddpo_ext.integrations.transformers import SessionCollator

MODULE = "benchmarks.peers.compare_packing"
TOLERANCE = 1e-5  # of the loss, and of all gradients together, in the Euclidean norm

CASES = [Case(32_000, 128, 16), Case(152_000, 128, 16)]
CASES += [Case(32_000, prompt, count) for prompt in (32, 128, 512) for count in (4, 16, 64)]
CASES += [Case(32_000, 128, count, "instruments") for count in (16, 64)]
CASES = list(dict.fromkeys(CASES))


class Steps(Problem):
    """A step by layout."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.loss = rx.RADDPOLoss(accumulate_grad=True)
        packed = {layout: self.rows(layout, embeddings=True)[1] for layout in LAYOUTS[1:]}
        replicated = case.candidates * (case.prompt + LEVELS)
        self.tokens = {"replicated": replicated} | {k: v.input_ids.numel() for k, v in packed.items()}
        self.head_rows = {"replicated": case.candidates * LEVELS} | {k: len(v.distinct) for k, v in packed.items()}

    def step(self, layout: str) -> Tensor:
        """The loss, its gradients in the parameters. A packed row is built anew in each step, as a collator does."""
        inputs, packed = self.rows(layout, embeddings=True)
        hidden, rows = self.predictors(self.states(inputs), packed)
        loss = self.loss(hidden, self.model.lm_head.weight, self.sessions, rows=rows).loss
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=False)

    def flop(self, layout: str) -> float:
        rows = self.case.candidates if layout == "replicated" else 1
        logits = self.head_rows[layout] * self.case.vocab_size
        return sum(self.operations(self.tokens[layout], rows, logits).values())


def work(case: Case, rounds: int) -> dict[str, Any]:
    """One process's measurements."""
    problem = Steps(case)
    loss = problem.step("candidates")  # makes the gradients, and warms up
    problem.clear()
    expected: Tensor | None = None
    result: dict[str, Any] = {layout: {} for layout in LAYOUTS}
    for layout in LAYOUTS:
        problem.clear()
        saved, peak, value = _memory(problem, lambda layout=layout: problem.step(layout))
        gradient = problem.gradient()
        expected = gradient if expected is None else expected
        error = max(float((value - loss).abs() / loss.abs()), float((gradient - expected).norm() / expected.norm()))
        assert error < TOLERANCE, f"{layout} differs by {error:.2g} in {case.name}"
        result[layout] = {"activation_bytes": saved, "peak_bytes": peak, "error": error}
        result[layout] |= {"tokens": problem.tokens[layout], "head_rows": problem.head_rows[layout]}
        result[layout]["operations"] = problem.flop(layout)
    del gradient, expected
    steps = {layout: partial(problem.step, layout) for layout in LAYOUTS}
    for layout, costs in take_turns(steps, rounds, problem.clear).items():
        result[layout]["seconds"] = [cost.wall for cost in costs]
        result[layout]["cpu_seconds"] = middle(costs).cpu
    return result


def _memory(problem: Steps, step: Callable[[], Tensor]) -> tuple[int, int, Tensor]:
    """Bytes saved for the backward pass, peak bytes of the process over what it held, and the loss."""
    ours = {p.untyped_storage().data_ptr() for p in problem.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = step()
    problem.clear()
    return sum(saved.values()), measured(step).peak_bytes, value


def collator() -> list[dict[str, Any]]:
    """Candidate tokens a second of SessionCollator."""
    rng = np.random.default_rng(0)
    found = []
    for prompt, layout in product((32, 128, 512), LAYOUTS[1:]):
        rows = [
            {
                "prompt_ids": rng.integers(32_000, size=prompt).tolist(),
                "positives": rng.integers(CODES, size=(2, LEVELS)).tolist(),
                "negatives": rng.integers(CODES, size=(14, LEVELS)).tolist(),
            }
            for _ in range(64)
        ]
        collate = SessionCollator(layout=layout)
        seconds = middle([timed(partial(collate, rows)) for _ in range(31)]).wall
        found.append({"prompt": prompt, "layout": layout, "tokens_per_second": 64 * 16 * LEVELS / seconds})
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one case: medians over its processes, ratios within each process first."""
    found: dict[str, Any] = {}
    times = {layout: [median(run[layout]["seconds"]) for run in runs] for layout in LAYOUTS}
    for layout in LAYOUTS:
        ratios = [base / own for base, own in zip(times["replicated"], times[layout], strict=True)]
        first = runs[0][layout]
        found[layout] = {
            "seconds": median(times[layout]),
            "cpu_seconds": median(run[layout]["cpu_seconds"] for run in runs),
            "speed": median(ratios),
            "spread": [min(ratios), max(ratios)],
            "tokens": first["tokens"],
            "head_rows": first["head_rows"],
            "gflop": first["operations"] / 1e9,
            "activation_bytes": first["activation_bytes"],
            "peak_bytes": median(run[layout]["peak_bytes"] for run in runs),
            "error": max(run[layout]["error"] for run in runs),
        }
    return found


def markdown(cells: list[dict[str, Any]]) -> str:
    head = [
        "case",
        "layout",
        "tokens",
        "head rows",
        "ms",
        "CPU ms",
        "times as fast",
        "spread",
        "GFLOP",
        "GFLOP/s",
        "activations MiB",
        "peak MiB",
    ]
    rows = []
    for result in cells:
        for layout in LAYOUTS:
            r = result["layouts"][layout]
            low, high = r["spread"]
            rows.append(
                [
                    result["case"] if layout == LAYOUTS[0] else "",
                    layout,
                    f"{r['tokens']}",
                    f"{r['head_rows']}",
                    f"{1000 * r['seconds']:.0f}",
                    f"{1000 * r['cpu_seconds']:.0f}",
                    f"{r['speed']:.2f}",
                    f"{low:.2f}-{high:.2f}",
                    f"{r['gflop']:.1f}",
                    f"{r['gflop'] / r['seconds']:.0f}",
                    f"{r['activation_bytes'] / MIB:.0f}",
                    f"{r['peak_bytes'] / MIB:.0f}",
                ]
            )
    return report.markdown(head, rows)


def main() -> None:
    parser = report.parser(MODULE, __doc__, processes=2)
    parser.add_argument("--rounds", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # a case, -1: the collator; JSON
    args = parser.parse_args()
    if args.worker is not None:
        torch.set_num_threads(1)
        print(json.dumps(collator() if args.worker < 0 else work(CASES[args.worker], args.rounds)))
        return
    chosen = report.choose(parser, CASES, args.cases)
    if not catalogues.present("instruments"):
        print(f"no instruments under {catalogues.DATA}: those cases are left out", file=sys.stderr)
        chosen = [i for i in chosen if CASES[i].source == "made"]
    processes, rounds = (1, 1) if args.quick else (args.processes, args.rounds)
    environment = {**report.environment(MODULE), "threads": 1, "processes": processes, "rounds": rounds}
    environment["collator"] = report.run_fresh(MODULE, "--worker", "-1")
    for line in environment["collator"]:
        rate = line["tokens_per_second"] / 1e6
        print(f"collator, prompt={line['prompt']}, {line['layout']}: {rate:.1f}M candidate tokens a second", flush=True)
    cells: list[dict[str, Any]] = []
    for i in chosen:
        runs = [report.run_fresh(MODULE, "--worker", str(i), "--rounds", str(rounds)) for _ in range(processes)]
        cells.append({"case": CASES[i].name, "layouts": summary(runs)})
        print(markdown(cells[-1:]), flush=True)
        if args.out:
            results.write(args.out, {MODULE: environment | {"results": cells}})
    print(markdown(cells))


if __name__ == "__main__":
    main()
