"""The program of a benchmark that measures each case in fresh processes of one thread, several rounds in each."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness import report, results


def run(
    module: str,
    text: str,
    cases: Sequence[Any],
    *,
    work: Callable[[Any, int], dict[str, Any]],
    summary: Callable[[Any, list[dict[str, Any]]], dict[str, Any]],
    tables: Callable[[list[dict[str, Any]]], str],
    processes: int,
    quick: slice = slice(None),
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run ``python -m <module>``, whose documentation is ``text``.

    Args:
        work: one process's measurements of a case, over a number of rounds.
        summary: a case's cell, from the measurements of its processes.
        tables: of cells, as Markdown.
        processes: how many per case, unless an option says so.
        quick: which of the chosen cases ``--quick`` measures.
        check: raises if the machine lacks something.
    """
    parser = report.parser(module, text, processes=processes)
    parser.add_argument("--rounds", type=int, default=3, help="rounds a process (3)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # a case; JSON
    args = parser.parse_args()
    if args.worker is not None:
        torch.set_num_threads(1)
        print(json.dumps(work(cases[args.worker], args.rounds)))
        return
    check()
    chosen = report.choose(parser, cases, args.cases)[quick if args.quick else slice(None)]
    processes, rounds = (1, 1) if args.quick else (args.processes, args.rounds)
    environment = {**report.environment(module), "threads": 1, "processes": processes, "rounds": rounds}
    cells: list[dict[str, Any]] = []
    for i in chosen:
        runs = [report.run_fresh(module, "--worker", str(i), "--rounds", str(rounds)) for _ in range(processes)]
        cells.append(summary(cases[i], runs))
        print(tables(cells[-1:]), flush=True)
        if args.out:
            results.write(args.out, {module: environment | {"results": cells}})
    print(tables(cells))
