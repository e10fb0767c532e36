"""SIDs of our own against given ones, pages and merged prompts: ``python -m benchmarks.alignment.sids``.

Every cell (arm, seed) is a line of the result file and is skipped where that is there with the same configuration, so
that a killed run goes on where it was. ``docs/sids.md`` says what is done.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.alignment.records import Cell, compute
from benchmarks.alignment.report import METRICS, interval, metrics
from benchmarks.alignment.sids.cells import ARMS, Scale, SIDLab
from benchmarks.alignment.statistics import ndcg, over_seeds, paired_bootstrap, unpack
from benchmarks.harness.report import markdown

QUICK = Scale(name="sids-quick", seeds=(0,), epochs=1, sequences=1000, users=200, beams=20, free_users=50)
SHOWN = (
    ("prompt_tokens", "{:.1f}"),
    ("row_tokens", "{:.1f}"),
    ("train_cpu_seconds", "{:.0f}"),
    ("search_cpu_seconds", "{:.0f}"),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment.sids", description="Kinds of SIDs and of prompts, on purchases."
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="purchases in LETTER's layout")
    parser.add_argument("--quick", action="store_true", help="a small one, in a minute; its results are not kept")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at once, one thread each (default 1)")
    options = parser.parse_args(arguments)
    lab = SIDLab(options.data, QUICK if options.quick else Scale())
    compute(lab, [cell(name, seed) for seed in lab.scale.seeds for name in ARMS], options.jobs)
    print(table(lab))
    return 0


def cell(arm: str, seed: int) -> Cell:
    return Cell(f"{arm}-s{seed}", "test", {"arm": arm, "seed": seed})


def table(lab: SIDLab) -> str:
    """By arm the means over the seeds, and the change of NDCG@10 from the given SIDs."""
    groups = {name: [lab.run(cell(name, seed))["result"] for seed in lab.scale.seeds] for name in ARMS}
    ranks = {name: [unpack(result["ranks"]) for result in group] for name, group in groups.items()}
    users = {name: over_seeds([ndcg(seed) for seed in seeds]) for name, seeds in ranks.items()}
    changes = paired_bootstrap(np.stack([users[name] - users["given"] for name in ARMS], 1))
    body = []
    for name, change in zip(ARMS, changes, strict=True):
        seeds = [metrics(seed) for seed in ranks[name]]
        line = [f"`{name}`", *(f"{np.mean([seed[metric] for seed in seeds]):.4f}"[1:] for metric in METRICS)]
        line.append("" if name == "given" else interval(change._asdict()))
        line.append(f"{np.mean([result['invalid@10'] for result in groups[name]]):.2%}")
        body.append(line + [form.format(np.mean([result[key] for result in groups[name]])) for key, form in SHOWN])
    names = [key.replace("_", " ") for key, _ in SHOWN]
    return markdown(["arm", *METRICS, "NDCG@10 - given, 95 %", "invalid@10", *names], body)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
