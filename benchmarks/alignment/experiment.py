"""What each part of RAD-DPO does on real purchases: ``python -m benchmarks.alignment --data FOLDER``.

Every cell (method, setting, seed) is a line of the result file and is skipped where that is there with the same
configuration, so that a killed run goes on where it was. ``docs/alignment-instruments.md`` says what is done and why.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path

from benchmarks.alignment import report
from benchmarks.alignment.cells import Lab, Scale
from benchmarks.alignment.grid import stages
from benchmarks.alignment.records import compute

QUICK = Scale(
    name="quick",
    seeds=(0,),
    epochs=4,
    sessions=1600,
    probes=128,
    users=3000,
    tune_users=1500,
    free_users=300,
    next_users=500,
    false_shares=(0.25,),
    methods=("sft_all_positives", "s_dpo", "rad_dpo", "rad_dpo_no_tlgd", "rad_dpo_no_rdrw"),
    settings=2,
)
WIDE = Scale(
    name="wide",
    false_shares=(),
    methods=(
        "sft_continued",
        "s_dpo",
        "simpo_all_negatives",
        "rad_dpo",
        "rad_dpo_sft_weight_0.1",
        "rad_dpo_no_rdrw",
    ),
    wide=True,
)
SCALES = {"full": Scale(), "wide": WIDE, "quick": QUICK}


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        lab = Lab(options.data, SCALES[options.scale])
        lab.data  # noqa: B018  read here, so that bad data is told of at once
    except (OSError, ValueError) as error:
        print(f"alignment: {error}", file=sys.stderr)
        return 2
    run(lab, options.jobs, options.only)
    return 0


def run(lab: Lab, jobs: int = 1, only: str = "*") -> None:
    """Computes the cells that ``only`` names, and those that decide on them; reports if that is all of them."""
    for stage in stages(lab):
        compute(lab, [cell for cell in stage if only == "*" or fnmatch.fnmatch(cell.name, only)], jobs)
    if only == "*":
        report.write(lab)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alignment", description="The alignment experiment.")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="a catalogue in LETTER's layout")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--wide", dest="scale", action="store_const", const="wide", help="lower rates and betas")
    scale.add_argument(
        "--quick", dest="scale", action="store_const", const="quick", help="ten minutes; its results are not kept"
    )
    parser.set_defaults(scale="full")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="cells at once, each on one thread (default 1)"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells of these names, such as 'tune-dpo-*'")
    return parser
