"""Every test of the GPU: ``python -m python_tests.gpu.gpu_suite``. The rest of the suite needs none, and is not run.

The result is written while the tests run.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.report import gpu_environment, require_gpu
from benchmarks.harness import results
from benchmarks.harness.report import RESULTS

WRITE_SECONDS = 5.0


class Recorder:
    """A pytest plugin that counts outcomes and keeps the text of the first failures."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begin = self.written = time.perf_counter()
        self.files: dict[str, dict[str, int]] = {}
        self.failures: dict[str, str] = {}
        self.result: dict[str, Any] = {
            **gpu_environment("python_tests.gpu.gpu_suite"),
            "finished": False,
            "failures": self.failures,
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        counts = self.files.setdefault(report.nodeid.split("::")[0], {})
        counts[report.outcome] = counts.get(report.outcome, 0) + 1
        if report.failed and len(self.failures) < 30:
            self.failures[report.nodeid] = report.longreprtext[-1500:]
        if report.failed or time.perf_counter() - self.written > WRITE_SECONDS:
            self.write()

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.result["finished"] = True
        self.result["exit_status"] = int(exitstatus)
        self.write()

    def write(self) -> None:
        self.written = time.perf_counter()
        self.result["seconds"] = round(self.written - self.begin, 1)
        cells = [{"file": file, **counts} for file, counts in self.files.items()]
        results.write(self.path, {"gpu_test": self.result | {"results": cells}})


def gpu_files() -> list[Path]:
    """``test_gpu.py`` first: whether kernels run on torch's stream at all."""
    return sorted(Path(__file__).parent.glob("test_gpu*.py"), key=lambda path: path.stem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_test.jsonl", help="where the result goes")
    parser.add_argument("pytest", nargs="*", help="passed on to pytest")
    arguments = parser.parse_args()
    require_gpu()
    options = ["-q", "-o", "faulthandler_timeout=200", *arguments.pytest]
    code = pytest.main([*map(str, gpu_files()), *options], plugins=[Recorder(arguments.out)])
    raise SystemExit(int(code))


if __name__ == "__main__":
    main()
