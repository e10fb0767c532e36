"""Whether the tests find deliberate faults: ``python -m mutants``.

The tree is copied to a temporary folder and built there; each fault of ``mutants/mutants.py`` is then put into it by
itself, what has to be is built again, and the tests of its op run until the first that fails. What is known is written
to build/ after every fault, so that a run of the same commit goes on where the last one stopped; the result at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.catalogues import ROOT
from benchmarks.harness.report import environment, write_json
from benchmarks.pages.reliability_page import mutant_table
from mutants.mutants import MUTANTS, Mutant

RESULT = ROOT / "mutants" / "results.json"
PROGRESS = ROOT / "build" / "mutants.json"
LEAST_CAUGHT = 29 / 30
ENVIRONMENT = {**os.environ, "CI": "true", "RADDPO_CUDA": "0", "HF_HUB_OFFLINE": "1"}  # CI: derandomised, not cut down


class Tree:
    """A copy of the repository that is built as faults come and go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.built = False  # whether the extension is that of the sources
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in files.rstrip("\0").split("\0"):
            if name.startswith("benchmarks/results/") or not (ROOT / name).is_file():
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)

    def test(self, tests: tuple[str, ...], limit: float | None = None) -> tuple[bool, str, float]:
        """Whether a test fails, which one or how, and the seconds that the tests took, ``limit`` at most."""
        begin = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
        process = subprocess.Popen(
            [*command, *tests],
            cwd=self.folder,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # tests start processes of their own
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True, f"no end within {limit:.0f} s", time.perf_counter() - begin
        seconds = time.perf_counter() - begin
        if process.returncode == 0:
            return False, "", seconds
        failed = re.search(r"^FAILED python_tests/(\S+?)(?:\[|$| - )", output, re.MULTILINE)
        if process.returncode == 1 and failed:
            return True, failed[1], seconds
        if process.returncode < 0:
            return True, signal.Signals(-process.returncode).name, seconds
        raise SystemExit(f"pytest ended with {process.returncode}, which says nothing:\n{output[-4000:]}")

    def run(self, mutant: Mutant, unmutated: float) -> dict[str, Any]:
        """The record of a fault whose tests take ``unmutated`` seconds without it."""
        path = self.folder / mutant.file
        text = path.read_text()
        path.write_text(mutant.applied_to(text))
        try:
            in_extension = path.suffix in (".cpp", ".h", ".inl")  # the tests compile .cu and .cuh themselves
            self.build(again=in_extension)
            caught, how, seconds = self.test(mutant.tests, limit=60 + 10 * unmutated)
            self.built = not in_extension
        finally:
            path.write_text(text)
        return {
            "fault": mutant.fault,
            "op": mutant.op,
            "file": mutant.file,
            "digest": mutant.digest,
            "caught": caught,
            "by": how,
            "seconds": round(seconds, 1),
        }

    def build(self, again: bool = False) -> None:
        if self.built and not again:
            return
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.folder, env=ENVIRONMENT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the build failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        self.built = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result of all faults goes")
    parser.add_argument("--only", default="", help="run only the faults whose op or description holds this text")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.only in f"{mutant.op}: {mutant.fault}"]
    for mutant in MUTANTS:
        mutant.applied_to((ROOT / mutant.file).read_text())  # a list that is stale is no use
    result = {**environment("mutants"), "unmutated": {}, "mutants": []}
    if PROGRESS.exists() and not result["commit"].endswith("-dirty"):
        before = json.loads(PROGRESS.read_text())
        if before["commit"] == result["commit"]:
            result |= {name: before[name] for name in ("unmutated", "mutants")}
    digests = [mutant.digest for mutant in MUTANTS]
    records = {record["digest"]: record for record in result["mutants"] if record["digest"] in digests}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Tree(Path(folder))
        for tests in dict.fromkeys(mutant.tests for mutant in chosen if mutant.digest not in records):
            name = " ".join(tests)
            if name in result["unmutated"]:
                continue
            tree.build()
            failed, how, seconds = tree.test(tests)
            if failed:
                raise SystemExit(f"the tests fail without any fault: {how}")
            result["unmutated"][name] = round(seconds, 1)
            write_json(PROGRESS, result)
        for mutant in chosen:
            if mutant.digest not in records:
                record = tree.run(mutant, result["unmutated"][" ".join(mutant.tests)])
                records[mutant.digest] = record
                result["mutants"] = [records[digest] for digest in digests if digest in records]
                write_json(PROGRESS, result)
                print(f"{mutant.op}: {mutant.fault}: {record['by'] or 'SURVIVED'} ({record['seconds']} s)", flush=True)
    found = [records[mutant.digest] for mutant in chosen]
    if len(found) == len(MUTANTS):
        write_json(arguments.out, result)
    caught = sum(record["caught"] for record in found)
    print(f"{mutant_table(found)}\n\n{caught} of {len(found)} faults found")
    raise SystemExit(caught < LEAST_CAUGHT * len(found))


if __name__ == "__main__":
    main()
