"""What every benchmark result carries, and how it is written."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import raddpo_ext as rx
from benchmarks.harness.catalogues import ROOT
from raddpo_ext._files import replacing

RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20


def parser(module: str, text: str, processes: int) -> argparse.ArgumentParser:
    """The options that the benchmarks of the suite have in common."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=text.splitlines()[0])
    made.add_argument("--processes", type=int, default=processes, help=f"fresh processes per case ({processes})")
    made.add_argument("--quick", action="store_true", help="as short as it can be, to see that it works")
    made.add_argument("--cases", default="", help="only cases whose name contains this")
    made.add_argument("--out", type=Path, help="write the result to this file")
    return made


def choose(options: argparse.ArgumentParser, cases: Sequence[Any], wanted: str) -> list[int]:
    """Numbers of the cases whose name contains what is wanted."""
    chosen = [i for i, case in enumerate(cases) if wanted in case.name]
    if not chosen:
        options.error(f"--cases {wanted!r} matches none of: {', '.join(case.name for case in cases)}")
    return chosen


def environment(module: str) -> dict[str, Any]:
    """Machine, versions, commit and command of a run of ``python -m <module>``."""
    return {
        "command": " ".join(["python", "-m", module, *map(_relative, sys.argv[1:])]),
        "commit": commit(),
        "machine": {"cpu": cpu_model() + _family(), "cores": os.cpu_count(), "kernel": platform.release()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "raddpo_ext": rx.__version__,
            "isa": rx._C.isa(),
            "static_decoding": _static_commit(),
        },
    }


def commit() -> str:
    """The commit that is measured; ``-dirty`` if anything but results and documents differs from it."""
    head = output("git", "rev-parse", "--short=12", "HEAD")
    measured = ("--", ".", ":!benchmarks/results", ":!docs", ":!*.md")
    changed = output("git", "status", "--porcelain", "--untracked-files=no", *measured)
    return head + "-dirty" * (changed not in ("", "unknown"))


def run_fresh(module: str, *arguments: str) -> Any:
    """The JSON that ``python -m <module> <arguments>`` prints as its last line, from a new process."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} failed with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())


def memory_status(field: str) -> int:
    """Bytes of this process's memory by a field of /proc/self/status: ``VmRSS`` now, ``VmHWM`` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def available_memory() -> int:
    """Bytes that new processes can have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def reset_peak_memory() -> None:
    """Gives unused memory back and sets the peak to what is held."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def costs_markdown(results: list[dict[str, Any]]) -> str:
    """A table of the results' ``costs``: ``{method: {"ms", "cpu_ms", "peak_bytes"}}``."""
    results = [result for result in results if "costs" in result]
    if not results:
        return ""
    names = list(dict.fromkeys(name for result in results for name in result["costs"]))

    def cell(cost: dict[str, float] | None) -> str:
        if cost is None:
            return "-"
        return f"{cost['ms']:.4g} / {cost['cpu_ms']:.4g} / {cost['peak_bytes'] / MIB:.3g}"

    rows = [[result["case"], *(cell(result["costs"].get(name)) for name in names)] for result in results]
    return markdown(["ms / CPU ms / MiB at the peak", *names], rows)


def _relative(argument: str) -> str:
    """A path of this machine as it reads from the repository's root."""
    return os.path.relpath(argument, ROOT) if os.path.isabs(argument) else argument


def _static_commit() -> str:
    spec = importlib.util.find_spec("static_decoding")
    if spec is None or spec.origin is None:
        return "not installed"
    return output("git", "-C", str(Path(spec.origin).parent), "rev-parse", "--short=12", "HEAD")


def output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_model() -> str:
    return _lscpu().get("Model name") or platform.processor() or platform.machine()


def _family() -> str:
    """What tells one generation from the next where a virtual machine's host keeps the model's name for itself."""
    found = _lscpu()
    return f" family {found['CPU family']} model {found['Model']}" if {"CPU family", "Model"} <= found.keys() else ""


def _lscpu() -> dict[str, str]:
    pairs = (line.split(":", 1) for line in output("lscpu").splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
