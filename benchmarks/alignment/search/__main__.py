"""What aligns a search model, against the truth of a simulated shop: ``python -m benchmarks.alignment.search``.

Every cell (method, setting, shop, initialization) is a line of the result file and is skipped where that is there with
the same configuration, so that a killed run goes on where it was. ``docs/alignment-search.md`` says what is done.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys

import torch

from benchmarks.alignment.records import compute
from benchmarks.alignment.search import report
from benchmarks.alignment.search.cells import Scale, SearchLab
from benchmarks.alignment.search.grid import stages

QUICK = Scale(
    name="quick",
    shops=(10, 11),
    inits=(0,),
    asked_on=1,
    epochs=2,
    supervised=5_000,
    aligned=1_000,
    validation=300,
    queries=200,
    settings=2,
    methods=("sft_all_positives", "s_dpo", "rad_dpo", "rad_dpo_no_tlgd", "rad_dpo_no_rdrw"),
)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    lab = SearchLab(QUICK if options.quick else Scale())
    for stage in stages(lab):
        compute(lab, [cell for cell in stage if fnmatch.fnmatch(cell.name, options.only)], options.jobs)
    if options.only == "*":
        report.write(lab)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment.search", description="The alignment experiment on a search shop."
    )
    parser.add_argument("--quick", action="store_true", help="a small one, in some minutes; its results are not kept")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="cells at once, each on one thread (default 1)"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells of these names, such as 'tune-dpo-*'")
    return parser


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
