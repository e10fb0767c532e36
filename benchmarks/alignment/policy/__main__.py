"""What policy training does on a simulated search shop, or on purchases: ``python -m benchmarks.alignment.policy``.

Every cell (method, learning rate, shop) is a line of the result file and is skipped where that is there with the same
configuration, so that a killed run goes on where it was. ``docs/policy.md`` says what is done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.alignment.policy import grid, purchases, report
from benchmarks.alignment.policy.cells import PolicyLab
from benchmarks.alignment.policy.methods import METHODS
from benchmarks.alignment.policy.purchases import PURCHASES, PurchasesLab
from benchmarks.alignment.records import Cell, compute
from benchmarks.alignment.search.cells import Scale

FULL = Scale(name="policy", shops=(10, 11, 12), inits=(0,), tuned_on=1, methods=tuple(METHODS))
QUICK = Scale(
    name="policy-quick",
    shops=(10,),
    inits=(0,),
    epochs=2,
    supervised=5_000,
    aligned=640,
    validation=300,
    queries=200,
    settings=1,
    methods=("grpo, sample, trie", "grpo, beams, vocab", "eg_grpo, independent, trie"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment.policy", description="Policy training on a search shop or on purchases."
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--data", type=Path, metavar="FOLDER", help="purchases, a catalogue in LETTER's layout")
    where.add_argument("--quick", action="store_true", help="a small one, in some minutes; its results are not kept")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at once, one thread each (default 1)")
    options = parser.parse_args(arguments)
    if options.data is not None:
        return _run(PurchasesLab(options.data, PURCHASES), purchases.stages, purchases.table, options.jobs)
    return _run(PolicyLab(QUICK if options.quick else FULL), grid.stages, report.table, options.jobs)


def _run(lab: Any, stages: Callable[[Any], Iterator[list[Cell]]], table: Callable[[Any], str], jobs: int) -> int:
    for stage in stages(lab):
        compute(lab, stage, jobs)
    print(table(lab))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
