"""What the service did, as tables."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.harness.report import markdown


def summary(results: list[dict[str, Any]], floors: dict[str, dict[str, float]]) -> str:
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
    return markdown(head, rows)


def offered(results: list[dict[str, Any]]) -> str:
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
    return markdown(head, rows)


def peer(results: list[dict[str, Any]]) -> str:
    """The service beside one around ``generate``."""
    rows = []
    for cell in results:
        ratio = cell["ratios"]["ours / peer"]
        row = [cell["case"], f"{ratio['median']:.1f}x ({ratio['least']:.1f}-{ratio['most']:.1f})"]
        for name in ("ours", "peer"):
            runs = cell["runs"][name]
            row += [f"{median(run['throughput'] for run in runs):.2f}", f"{median(run['p50'] for run in runs):.0f}"]
        rows.append(row)
    head = ["", "throughput, ours / `generate`", "ours, requests/s", "p50, ms", "`generate`, requests/s", "p50, ms"]
    return markdown(head, rows)


def soak(result: dict[str, Any]) -> str:
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
    return markdown(["requests", *names], rows) + "\n\n" + markdown(["soak", ""], lines)
