"""The command ``python -m raddpo_ext bench``: its runs and its output."""

from __future__ import annotations

import argparse
import gc
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raddpo_ext._check import integer
from raddpo_ext._files import replacing
from raddpo_ext.bench import report
from raddpo_ext.bench.compare import Mismatch, Missing, measure
from raddpo_ext.bench.options import PROCESSES
from raddpo_ext.bench.suite import CORE, TINY, Prepare

ROUNDS, BURST = 5, 0.05  # of a process; seconds


def bench(options: argparse.Namespace) -> int:
    """Run the comparisons and print their tables, with ``--quick`` each one when it is measured.

    Returns:
        The exit code: 1 if a method's result differs from ours.

    Raises:
        ValueError: an option does not work on this machine.
    """
    # The options.
    integer(options.threads, "--threads", 1)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU")
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise ValueError(f"--json {options.json}: {'is a directory' if options.json.is_dir() else 'no such directory'}")
    begin = time.monotonic()
    try:
        results = run(options) if options.quick else run_fresh(options)
    # Expected errors end in a message and an exit code, not in a traceback.
    except Mismatch as mismatch:
        print(f"raddpo_ext: {mismatch}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as failed:
        if failed.returncode < 0:
            raise ValueError(f"a process was ended by {signal.Signals(-failed.returncode).name}") from None
        return failed.returncode  # the process has printed why
    except NotImplementedError as error:  # an operator has no kernel for this device
        raise ValueError(f"--device {options.device}: {str(error).splitlines()[0]}") from None
    # The result, to be printed and written.
    result = report.environment(torch.device(options.device), options.threads) | {
        "processes": 1 if options.quick else PROCESSES,
        "seconds": time.monotonic() - begin,
        "markdown": report.table(results),
        "results": results,
    }
    print(report.headline(result))
    if not options.quick:  # with --quick, run() has printed them
        print("", *result["markdown"], sep="\n")
    if options.json is not None:
        with replacing(options.json) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    return 0


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the comparisons in this process and return their results."""
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        device = torch.device(options.device)
        return compare(TINY, device, 1, 0) if options.tiny else compare(CORE, device, ROUNDS, BURST)
    finally:
        torch.set_num_threads(threads)


def compare(suite: Mapping[str, Prepare], device: torch.device, rounds: int, burst: float) -> list[dict[str, Any]]:
    """Each comparison's times per method, floors last, and the methods that cannot run on this machine.

    Prints each table when it is measured, and a line of progress to stderr.
    """
    results = []
    begin = time.monotonic()
    for name, prepare in suite.items():
        result: dict[str, Any] = {"name": name, "note": "", "methods": {}, "floors": [], "unavailable": {}}
        try:
            # Making the cases may find that the machine lacks something.
            comparison = prepare(device)
            result |= {
                "name": comparison.name,
                "note": comparison.note,
                "methods": measure(comparison, rounds, burst, device),
                "floors": list(comparison.floors),
                "unavailable": comparison.unavailable,
            }
            del comparison  # frees its memory before the next one is made
        except Missing as missing:
            result["unavailable"] = {name: str(missing)}
        gc.collect()
        results.append(result)
        print(*report.table([result]), "", sep="\n", flush=True)
        print(f"{time.monotonic() - begin:5.0f} s  {name}", file=sys.stderr, flush=True)
    return results


def run_fresh(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the comparisons in several new processes and return the merged results."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", "raddpo_ext", "bench", "--quick", "--json", str(path)]
        command += ["--device", options.device, "--threads", str(options.threads)] + ["--tiny"] * options.tiny
        for process in range(PROCESSES):
            print(f"process {process + 1} of {PROCESSES}", file=sys.stderr, flush=True)
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            runs.append(json.loads(path.read_text())["results"])
    return report.merged(runs)
