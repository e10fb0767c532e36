"""The content of a result of ``python -m raddpo_ext bench``, and its tables."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import raddpo_ext as rx
from raddpo_ext import _C


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """The machine, versions and settings of a run."""
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count()}
        | ({} if device.type == "cpu" else {"gpu": torch.cuda.get_device_name(device)}),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "raddpo_ext": rx.__version__,
            "isa": _C.isa(),
        },
        "device": str(device),
        "threads": threads,
    }


def _cpu() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def headline(result: dict[str, Any]) -> str:
    """One line with the machine, the versions and the settings of a result."""
    machine, versions = dict(result["machine"]), dict(result["versions"])
    cores, isa = machine.pop("cores"), versions.pop("isa")
    parts = [f"{', '.join(machine.values())} ({cores} cores, {isa})"]
    parts += [", ".join(f"{name} {version}" for name, version in versions.items())]
    parts += [f"{result['device']}, {result['threads']} thread{'s' * (result['threads'] > 1)}"]
    return "; ".join(parts)


def merged(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge the results of several processes: the median, minimum and maximum of their medians."""
    results = []
    for cases in zip(*runs, strict=True):
        # A method that some process lacked is left out.
        in_all = [name for name in cases[0]["methods"] if all(name in case["methods"] for case in cases)]
        methods = {name: _together([case["methods"][name] for case in cases]) for name in in_all}
        results.append(cases[0] | {"methods": methods})
    return results


def _together(times: list[dict[str, float]]) -> dict[str, float]:
    """The times of one method in several processes as one."""
    medians = [time["median"] for time in times]
    return {
        "median": median(medians),
        "least": min(medians),
        "most": max(medians),
        "cpu": median(time["cpu"] for time in times),
        "calls": sum(time["calls"] for time in times),
    }


def _ms(seconds: float) -> str:
    """Seconds as milliseconds of three digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def table(results: list[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table, and one line per method that cannot run on this machine."""
    # One group of rows per comparison, with the ratio to ours.
    rows = [["", "ms", "least - most", "/ ours"]]
    for result in results:
        if not result["methods"]:
            continue
        note = f" ({result['note']})" if result["note"] else ""
        rows.append([f"**{result['name']}**{note}", "", "", ""])
        ours = next(iter(result["methods"].values()))["median"]
        for name, time in result["methods"].items():
            middle, least, most = (_ms(time[which]) for which in ("median", "least", "most"))
            floor = "floor: " * (name in result["floors"])
            rows.append([floor + name, middle, f"{least} - {most}", f"{time['median'] / ours:.3g}x"])
    # Pad the columns, so that the table can be read in a terminal too.
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    absent = [f"not here: {name}: {why}" for result in results for name, why in result["unavailable"].items()]
    return lines + (["", *absent] if absent else [])
