"""Training's smaller operators beside plain torch and their floors, on one CPU thread::

    python -m benchmarks.peers.compare_training_ops
    python -m benchmarks.peers.compare_training_ops --quick --cases "512 rows"

``group_advantages`` and ``policy_loss`` with its gradient are of groups of 16 SIDs of 4 codes; their floor copies the
bytes that any method must move. ``legal_mass`` with its gradient stands beside ``token_logps`` with its gradient, and a
step of ``sample_step`` beside ``beam_step`` of the same width over the same beams. ``TokenMerger`` stands beside a
linear layer of the concatenated codes; its floor is the bare products of its tables, or without gradients a sum of
their rows. Each method is first checked to give our result, ``token_logps`` and ``beam_step`` apart.

All cases run in each of several fresh processes, their methods in turns.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

import torch

from benchmarks.harness import report, results
from raddpo_ext.bench import group_advantages, legal_mass, policy_loss, sample_step, token_merger
from raddpo_ext.bench.command import BURST, ROUNDS, compare
from raddpo_ext.bench.group_advantages_cases import CASES as ADVANTAGES
from raddpo_ext.bench.policy_loss_cases import CASES as LOSSES
from raddpo_ext.bench.report import merged, table
from raddpo_ext.bench.sample_step import CASES as SEARCHES
from raddpo_ext.bench.suite import Prepare
from raddpo_ext.bench.token_merger import CASES as MERGED

MODULE = "benchmarks.peers.compare_training_ops"
ROWS, VOCABULARY, CODES = 64, 152_064, 256  # of legal_mass


def suite(wanted: str) -> dict[str, Prepare]:
    """The comparisons whose name contains what is wanted."""
    every: dict[str, Prepare] = {
        **{f"group_advantages {c.name}": partial(group_advantages.comparison, case=c) for c in ADVANTAGES},
        **{f"policy_loss {c.name}": partial(policy_loss.comparison, case=c) for c in LOSSES},
        "legal_mass": partial(legal_mass.comparison, rows=ROWS, vocab_size=VOCABULARY, codes=CODES),
        **{f"sample_step {c.name}": partial(sample_step.comparison, case=c) for c in SEARCHES},
        **{f"TokenMerger {c.name}": partial(token_merger.comparison, case=c) for c in MERGED},
    }
    return {name: prepare for name, prepare in every.items() if wanted in name}


def markdown(cells: list[dict[str, Any]]) -> str:
    return "\n".join(table(cells))


def main() -> None:
    parser = report.parser(MODULE, __doc__, processes=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # JSON
    args = parser.parse_args()
    chosen = suite(args.cases)
    if not chosen:
        parser.error(f"--cases {args.cases!r} matches none of: {', '.join(suite(''))}")
    rounds = 1 if args.quick else ROUNDS
    if args.worker:
        torch.set_num_threads(1)
        print(json.dumps(compare(chosen, torch.device("cpu"), rounds, BURST)))
        return
    processes = 1 if args.quick else args.processes
    options = ["--worker", "--cases", args.cases, *["--quick"] * args.quick]
    cells = merged([report.run_fresh(MODULE, *options) for _ in range(processes)])
    print(markdown(cells))
    if args.out:
        environment = {**report.environment(MODULE), "threads": 1, "processes": processes, "rounds": rounds}
        results.write(args.out, {MODULE: environment | {"results": cells}})


if __name__ == "__main__":
    main()
