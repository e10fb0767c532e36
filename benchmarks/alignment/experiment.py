"""What each part of RAD-DPO does on real purchases: ``python -m benchmarks.alignment --data FOLDER``.

Every cell (method, setting, seed) is a line of the result file and is skipped where that is there with the same
configuration, so that a killed run goes on where it was. ``docs/alignment.md`` says what is done and why.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.alignment import report
from benchmarks.alignment.cells import Cell, Lab, Scale
from benchmarks.alignment.grid import stages

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


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        lab = Lab(options.data, QUICK if options.quick else Scale())
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


def compute(lab: Lab, cells: list[Cell], jobs: int) -> None:
    begin = time.perf_counter()
    if jobs == 1:
        records: Iterator[dict[str, Any]] = map(lab.run, cells)
        _follow(records, len(cells), begin)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(_in_worker, lab.folder, lab.scale, lab.cache.parent, cell) for cell in cells]
        _follow((future.result() for future in as_completed(futures)), len(cells), begin)


def _follow(records: Iterator[dict[str, Any]], count: int, begin: float) -> None:
    for number, record in enumerate(records, 1):
        result, seconds = record["result"], time.perf_counter() - begin
        score = f"NDCG@10 {result['ndcg@10']:.5f}, " if "ndcg@10" in result else ""
        print(f"{seconds:6.0f} s  {number}/{count}  {record['cell']}: {score}{record['seconds']:.0f} s", flush=True)


def _in_worker(folder: Path, scale: Scale, cache: Path, cell: Cell) -> dict[str, Any]:
    return _lab(folder, scale, cache).run(cell)


@functools.cache
def _lab(folder: Path, scale: Scale, cache: Path) -> Lab:
    return Lab(folder, scale, cache)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alignment", description="The alignment experiment.")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="a catalogue in LETTER's layout")
    parser.add_argument("--quick", action="store_true", help="a small one, in ten minutes; its results are not kept")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="cells at once, each on one thread (default 1)"
    )
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cells of these names, such as 'tune-dpo-*'")
    return parser
