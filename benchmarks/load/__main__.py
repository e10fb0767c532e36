"""The service (``python -m raddpo_ext serve``) under load, on the loopback, CPU::

    python -m benchmarks.load                       # speed, about 8 minutes
    python -m benchmarks.load --mode soak           # faults for 30 minutes
    python -m benchmarks.load --mode soak --quick   # for one minute

The model is a random Qwen3, float32: ``small`` (hidden size 64, 2 layers, V = 1k), with which the service is what takes
time, or ``large`` (512, 4 layers, V = 32k), with which the model is. The catalogue is the real ``industrial`` one, or a
synthetic one of its size where that is absent; prompts have 16 to 32 tokens, searches 20 beams, workers one thread.

Arrivals are Poisson and come whatever the service is at (open loop); latency counts from the arrival, so a request that
waits for a connection or for the client is as late as it is to its user. Everything is bounded: the time, the rate, the
connections (256) and the requests under way; an arrival beyond those is left out, and said.

``speed``: throughput of clients who wait for their answers (closed loop), then latency at shares of the best of it.
The floor is ``SIDRetriever.retrieve`` in a loop, one thread, no service.

``soak``: a steady rate, and around it catalogues published in turn, damaged ones offered, a worker killed with -9 every
ten seconds, clients that hang up, and wrong requests of every kind; at last SIGTERM in the middle of requests. Every
answer is held against the catalogue of its version and against what ``SIDRetriever`` finds without the service. Exit
code 1 if anything that is required is not so.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

import raddpo_ext as rx
from benchmarks.harness import report
from benchmarks.load import service as load_service
from benchmarks.load import speed as load_speed
from benchmarks.load.soak import Soak

MODULE = "benchmarks.load"
_QUICK_MINUTES = 1.0


def speed(args: argparse.Namespace, folder: Path, environment: dict[str, Any]) -> int:
    cases = [case for case in load_speed.CASES if args.cases in case.name]
    if not cases:
        raise SystemExit(f"--cases {args.cases!r} matches none of: {', '.join(c.name for c in load_speed.CASES)}")
    source, catalogues = load_service.make_catalogues()
    rx.CatalogueStore(folder / "store").publish(catalogues["even"].index)
    floors, results = {}, []
    for model in dict.fromkeys(case.model for case in cases):
        load_service.make_model(load_service.SHAPES[model]).save_pretrained(folder / model)
        floors[model] = load_speed.floor(model, catalogues["even"], 0.5 if args.quick else 5.0)
    for case in cases:
        results.append(load_speed.measure(case, folder, args.quick))
        print(offered_table(results[-1:]), flush=True)
        tables = [summary_table(results, floors), offered_table(results)]
        if args.out:
            text = "\n\n".join(tables).splitlines()
            found = {"catalogue": source, "floors_ms": floors, "markdown": text, "results": results}
            report.write_json(args.out, environment | found)
    print("\n\n".join(tables))
    return 0


def summary_table(results: list[dict[str, Any]], floors: dict[str, dict[str, float]]) -> str:
    head = ["service", "requests/s of 1, 4, 16, 64 clients", "p50 of 1 client, ms", "retrieve alone, ms"]
    head += ["most/s by retrieve", "highest rate held", "front, CPU ms a request", "workers", "generator"]
    rows = []
    for result in results:
        closed, floor = result["closed"], floors[result["model"]]
        size = result["max_batch"]
        best = max(closed, key=lambda run: run["throughput"])
        rows.append(
            [
                result["case"],
                ", ".join(f"{run['throughput']:.0f}" for run in closed),
                f"{closed[0]['p50']:.1f}",
                f"{floor['1']:.1f}",
                f"{1000 * size * result['workers'] / floor[str(size)]:.0f}",
                f"{result['highest_rate']:.0f}/s (p99 below {result['bound_ms']:.0f} ms)",
                *(f"{best['cpu_ms'][name]:.2f}" for name in ("front", "workers", "generator")),
            ]
        )
    return report.markdown(head, rows)


def offered_table(results: list[dict[str, Any]]) -> str:
    head = ["service", "offered/s", "answered/s", "p50, ms", "p99", "p99.9", "not 200"]
    rows = []
    for result in results:
        for run in result["offered"]:
            first = run is result["offered"][0]
            needed = {"p50": 2, "p99": 100, "p99.9": 1000}  # answers: of fewer it would be the largest
            times = (f"{run[name]:.1f}" if run["answers"] >= least else "" for name, least in needed.items())
            others = run["others"] + run["left_out"]
            name = result["case"] if first else ""
            rows.append([name, f"{run['rate']:.0f}", f"{run['throughput']:.0f}", *times, str(others)])
    return report.markdown(head, rows)


def soak(args: argparse.Namespace, folder: Path, environment: dict[str, Any]) -> int:
    minutes = _QUICK_MINUTES if args.quick else args.minutes
    result = Soak(folder, 60 * minutes, args.load).run()
    text = soak_table(result)
    if args.out:
        report.write_json(args.out, environment | {"markdown": text.splitlines()} | result)
    print(text)
    for line in result["examples"] + result["failures"]:
        print(line)
    return 1 if result["failures"] else 0


def soak_table(result: dict[str, Any]) -> str:
    """What happened, by kind of request and status; then the rest, a line each."""
    names = sorted({status for counts in result["answers"].values() for status in counts})
    rows = [[kind, *(str(counts.get(name, "")) for name in names)] for kind, counts in result["answers"].items()]
    latency = ", ".join(f"{name} {value:.0f}" for name, value in result["latency_ms"].items())
    growth = {name: "too short" if value is None else f"{value:+.2%}" for name, value in result["growth"].items()}
    lines = [
        [
            "offered, capacity",
            f"{result['rate']:.0f}/s of {result['capacity']:.0f}/s, {result['seconds'] / 60:.0f} min",
        ],
        ["latency of answers, ms", latency],
        ["wrong answers, lost requests", str(sum(result["problems"].values()))],
        ["catalogues swapped", str(result["swaps"])],
        ["most versions mapped by a worker", f"{result['most_mapped_versions']:.0f}"],
        ["damaged catalogues refused", str(result["damaged_refused"])],
        ["workers killed", str(result["kills"])],
        ["queries sent again", f"{result['metrics']['resent']:.0f}"],
        ["growth of memory: front", growth["front"]],
        ["of the worker that was spared", growth["followed"]],
        ["of all processes together", growth["all"]],
        ["exit code at the end", str(result["exit_code"])],
    ]
    return report.markdown(["requests", *names], rows) + "\n\n" + report.markdown(["soak", ""], lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("speed", "soak"), default="speed", help="what is measured (speed)")
    parser.add_argument("--cases", default="", help="speed: only services whose name contains this")
    parser.add_argument("--minutes", type=float, default=30.0, help="soak: how long (30)")
    parser.add_argument("--load", type=float, default=0.4, help="soak: rate, as a share of the capacity (0.4)")
    parser.add_argument("--quick", action="store_true", help="one minute, or a second a rate")
    parser.add_argument("--out", type=Path, help="write the result to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        run = speed if args.mode == "speed" else soak
        return run(args, Path(folder), report.environment(MODULE))


if __name__ == "__main__":
    raise SystemExit(main())
