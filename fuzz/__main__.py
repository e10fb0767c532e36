"""Runs the targets one after the other and records what came of it: ``python -m fuzz --seconds 600 [target ...]``."""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from raddpo_ext._files import replacing

FOLDER = Path(__file__).parent
WORK = Path("build/fuzz")
RESULTS = FOLDER / "results.json"
#: The corpus of each target. The first is C++, fuzzed by libFuzzer, the others Python, by atheris.
TARGETS = {
    "index_check": "index",
    "index_file": "index",
    "sid_files": "sid_files",
    "tables": "tables",
    "id_map": "id_map",
    "session_logs": "session_logs",
    "catalogues": "catalogues",
    "request_body": "request_body",
}
CSRC = FOLDER.parent / "csrc"
SOURCES = [*sorted((CSRC / "trie_index").glob("*.cpp")), CSRC / "common/isa.cpp"]
CXX_FLAGS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-pthread", "-Wno-unknown-pragmas"]
CXX_FLAGS += ["-Wno-ignored-pragmas", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined"]
CXX_FLAGS += ["-mavx2", "-mbmi", "-mbmi2", "-mfma", "-mf16c", "-mpopcnt"]  # clang ignores GCC's pragma for these
LIMITS = ["-max_len=16384", "-rss_limit_mb=4096", "-print_final_stats=1"]
LIMITS += ["-timeout=300", "-report_slow_units=300"]  # by the wall's clock, on a machine that may have other work
LIMITS += [f"-dict={FOLDER / 'words.dict'}"]
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # save waits for the disk
MOST_CRASHES = 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="target", help=f"any of {', '.join(TARGETS)}; default all")
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"unknown target: {', '.join(sorted(unknown))}")
    crashes = 0
    for target in options.targets or TARGETS:
        record = fuzz(target, options.seconds)
        _record(target, record)
        print(target, json.dumps(record))
        crashes += len(record["crashes"])
    sys.exit(crashes > 0)


def fuzz(target: str, seconds: int) -> dict[str, Any]:
    """Until the time is over; what crashes is put aside and the search goes on."""
    command = _command(target)
    kept, found, committed = WORK / target / "inputs", WORK / target / "crashes", FOLDER / "corpus" / TARGETS[target]
    for folder in (kept, found):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    record: dict[str, Any] = {"engine": "libFuzzer" if target == "index_check" else "atheris"}
    record |= {"inputs": len([*committed.iterdir()]), "executions": 0, "new_units": 0, "coverage": 0}
    begin, cpu_begin = time.monotonic(), _cpu_seconds()
    while (left := seconds - (time.monotonic() - begin)) >= 1 and len([*found.iterdir()]) < MOST_CRASHES:
        options = [f"-max_total_time={left:.0f}", f"-artifact_prefix={found}/", *LIMITS, str(kept), str(committed)]
        with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
            environment = os.environ | {"TMPDIR": scratch}
            run = subprocess.run([*command, *options], capture_output=True, env=environment, check=False)
        text = run.stderr.decode(errors="replace")
        (WORK / target / f"log-{len([*found.iterdir()])}").write_text(text)
        if "stat::" not in text:
            sys.exit(f"{target} cannot run:\n{text[-2000:]}")
        for key, pattern in (
            ("executions", r"number_of_executed_units: (\d+)"),
            ("new_units", r"new_units_added: +(\d+)"),
        ):
            record[key] += sum(map(int, re.findall(pattern, text)))
        record["coverage"] = max([record["coverage"], *map(int, re.findall(r" cov: (\d+)", text))])
    record["seconds"], record["cpu_seconds"] = round(time.monotonic() - begin), round(_cpu_seconds() - cpu_begin)
    record["crashes"] = sorted(path.name for path in found.iterdir())
    return record | {"date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": _commit()}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _command(target: str) -> list[str]:
    if target != "index_check":
        return [sys.executable, "-m", "fuzz.target", target]
    compiler = next(filter(shutil.which, (os.environ.get("CLANG", "clang++"), "clang++-19", "clang++")), None)
    if compiler is None:
        sys.exit("index_check needs clang++ with libFuzzer (Debian: clang-19 and libclang-rt-19-dev); CLANG names it")
    WORK.mkdir(parents=True, exist_ok=True)
    binary = WORK / "index_check.bin"
    sources = [FOLDER / "index_check.cpp", *SOURCES]
    subprocess.run([compiler, *CXX_FLAGS, *map(str, sources), "-o", str(binary)], check=True)
    return [str(binary), "-use_value_profile=1"]


def _commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip()


def _record(target: str, record: dict[str, Any]) -> None:
    """One record a target, the last; the others stay."""
    results = json.loads(RESULTS.read_bytes()) if RESULTS.exists() else {}
    with replacing(RESULTS) as file:
        file.write(json.dumps(results | {target: record}, indent=1, sort_keys=True).encode() + b"\n")


if __name__ == "__main__":
    main()
