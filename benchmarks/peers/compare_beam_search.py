"""The speed of one constrained beam search step, ours against the peers, on one CPU thread::

    python -m benchmarks.peers.compare_beam_search
    python -m benchmarks.peers.compare_beam_search --quick --cases V2048

Every case runs in fresh processes. Within a process all methods of a level are first checked to find the same scores;
then they take turns, in bursts whose first call is not counted (it meets the caches as another method left them), on
the same beams and the same logits, drawn beforehand and kept alive; the whole Python call is timed. A level's time is
the median of its calls, a step's the mean over the levels of the search. Times and ratios are medians over the
processes, the spread is their least and most. Memory is the process's peak during a call over what it held before, at
the level where that is most.
One level's logits are alive at a time: at V = 152k and 32 x 50 beams they are 1 GB. A method whose step takes more than
half a second is timed in the first process only.
"""

import argparse
import json
import time
from itertools import product
from statistics import mean, median
from typing import Any

import torch

from benchmarks.harness import report, results
from benchmarks.harness.results import milliseconds
from benchmarks.harness.timing import measured, middle
from benchmarks.peers.beam_search import FLOORS, METHODS, check_same
from benchmarks.peers.beam_search_cases import CASES, Search
from raddpo_ext.bench.compare import Cost, Missing, burst_of
from raddpo_ext.bench.searches import Case, Level

MODULE = "benchmarks.peers.compare_beam_search"
PEERS = [name for name in METHODS if name != "ours" and name not in FLOORS]
BURST = 0.03  # seconds
ROUNDS = 4
SLOW = 0.5  # seconds
# What is asked for: a peer's time over ours at least, ours over the bare log-sum-exp at most.
TARGETS = {
    ("uniform", 8): {"static": 6, "dict_trie": 8, "bare_lse": 1.8},
    ("clustered", 8): {"static": 11, "dict_trie": 8, "bare_lse": 1.8},
    ("uniform", 3): {"static": 7, "dict_trie": 8, "bare_lse": 1.5},
    ("clustered", 3): {"static": 12, "dict_trie": 8, "bare_lse": 1.5},
    ("industrial", 3): {"hf_style": 25, "gather_lse": 5.5, "dict_trie": 8, "bare_lse": 1.3},
    ("instruments", 4): {"dict_trie": 8},
}


def time_level(
    search: Search, level: Level, rounds: int, without: list[str], unavailable: dict[str, str]
) -> dict[str, tuple[float, float, int]]:
    """Median seconds per call, the CPU's and the wall's, and peak bytes, of every method that is available."""
    steps = {}
    for name, prepare in METHODS.items():
        if name in without:
            continue
        try:
            steps[name] = prepare(search, level)
        except Missing as missing:
            unavailable[name] = str(missing)
    check_same(search, level, steps)  # also warms up
    peaks = {name: measured(step).peak_bytes for name, step in steps.items()}
    costs: dict[str, list[Cost]] = {name: [] for name in steps}
    for _, (name, step) in product(range(rounds), steps.items()):
        if sum(cost.wall for cost in costs[name]) < 2 * rounds * BURST:  # slow methods: fewer rounds
            costs[name] += burst_of(step, BURST)
    return {name: (*middle(costs[name]), peaks[name]) for name in steps}


def run_case(case: Case, rounds: int, without: list[str]) -> dict[str, Any]:
    """What :func:`time_level` finds, by method and level."""
    torch.set_num_threads(1)
    try:
        search = Search(case)
    except Missing as missing:
        return {"skipped": str(missing)}
    unavailable: dict[str, str] = {}
    by_level, logit_bytes = [], []
    with torch.inference_mode():
        for level in search.levels():
            by_level.append(time_level(search, level, rounds, without, unavailable))
            logit_bytes.append(level.logits.nbytes)
            del level
    return {
        "items": search.index.num_items,
        "sids": search.index.num_sids,
        "nodes": search.index.num_nodes,
        "index_bytes": search.index.nbytes,
        "logit_bytes": mean(logit_bytes),
        "levels": {name: [level[name] for level in by_level] for name in by_level[0]},
        "unavailable": unavailable,
    }


def step_seconds(run: dict[str, Any]) -> dict[str, float]:
    """Of one process: the mean over a search's steps."""
    return {name: mean(wall for wall, _, _ in levels) for name, levels in run.get("levels", {}).items()}


def summary(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One case's result from its processes."""
    if "skipped" in runs[0]:
        return {"case": case.name, **runs[0]}
    steps = [step_seconds(run) for run in runs]
    ratios = {}
    for name in steps[0]:
        if name == "ours":
            continue
        values = [s["ours"] / s[name] if name in FLOORS else s[name] / s["ours"] for s in steps if name in s]
        ratios[name] = {"median": median(values), "least": min(values), "most": max(values), "processes": len(values)}
    levels = {name: [run["levels"][name] for run in runs if name in run["levels"]] for name in steps[0]}
    return {
        "case": case.name,
        **{key: runs[0][key] for key in ("items", "sids", "nodes", "index_bytes", "logit_bytes", "unavailable")},
        "level_ns": {
            name: [1e9 * median(wall for wall, _, _ in level) for level in zip(*runs_of, strict=True)]
            for name, runs_of in levels.items()
        },
        "costs": {
            name: {
                "ms": 1e3 * median(s[name] for s in steps if name in s),
                "cpu_ms": 1e3 * median(mean(cpu for _, cpu, _ in run) for run in runs_of),
                "peak_bytes": median(max(peak for _, _, peak in run) for run in runs_of),
            }
            for name, runs_of in levels.items()
        },
        "ratios": ratios,
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Ratios to ours, with their spread over the processes; an exclamation mark where a target is missed."""
    targets = {case.name: TARGETS[case.catalogue, case.levels] for case in CASES}

    def ratio(result: dict[str, Any], name: str) -> str:
        r = result["ratios"].get(name)
        if r is None:
            return "-"
        target = targets[result["case"]].get(name)
        missed = target is not None and (r["median"] > target if name in FLOORS else r["median"] < target)
        mark = f" **!** (target {target})" if missed else ""
        return f"{r['median']:.2f}x ({r['least']:.2f}-{r['most']:.2f}){mark}"

    rows = []
    for result in cells:
        if "skipped" in result:
            rows.append([result["case"], result["skipped"], *[""] * (3 + len(PEERS))])
            continue
        ms = {name: f"{value:.3f}" for name, value in milliseconds(result).items()}
        floor = f"{ms['bare_lse']} ({result['logit_bytes'] / 1e6:.1f} MB, read in {ms['read']})"
        rows.append([result["case"], ms["ours"], floor, ratio(result, "bare_lse")])
        rows[-1] += [ratio(result, name) for name in PEERS]
    head = ["case", "ours, ms a step", "floor: bare log-sum-exp, ms", "ours / floor", *(f"{p} / ours" for p in PEERS)]
    return report.markdown(head, rows)


def markdown(cells: list[dict[str, Any]]) -> str:
    return table(cells) + "\n\n" + report.costs_markdown(cells)


def main() -> None:
    parser = report.parser(MODULE, __doc__, processes=5)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # runs that case and prints JSON
    parser.add_argument(
        "--without", nargs="*", default=[], choices=list(METHODS), help=argparse.SUPPRESS
    )  # in a worker
    args = parser.parse_args()
    rounds = 1 if args.quick else ROUNDS
    if args.worker is not None:
        print(json.dumps(run_case(CASES[args.worker], rounds, args.without)))
        return
    processes = 1 if args.quick else args.processes
    quick = ["--quick"] if args.quick else []
    cells = []
    started = time.monotonic()
    for i in report.choose(parser, CASES, args.cases):
        worker = [MODULE, "--worker", str(i), *quick]
        runs = [report.run_fresh(*worker)]
        slow = [name for name, seconds in step_seconds(runs[0]).items() if seconds > SLOW]
        runs += [report.run_fresh(*worker, "--without", *slow) for _ in range(processes - 1)]
        cells.append(summary(CASES[i], runs))
        print(f"{time.monotonic() - started:5.0f} s  {CASES[i].name}", flush=True)
    print(markdown(cells))
    if args.out:
        run = {**report.environment(MODULE), "processes": processes, "rounds": rounds, "threads": 1}
        results.write(args.out, {MODULE: run | {"results": cells}})


if __name__ == "__main__":
    main()
