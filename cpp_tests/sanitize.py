"""The C++ tests, and the Python tests of the operators, under sanitizers: ``python -m cpp_tests.sanitize``.

AddressSanitizer and UndefinedBehaviorSanitizer watch the C++ tests, and the extension under its operators' Python
tests. ThreadSanitizer watches the C++ tests, and the extension under searches beside swaps of the catalogue. In Python
only the extension is instrumented: of torch and Python the locks are seen, and one thread of torch's pool is used.
Needs g++, cmake and ninja. The result is written after every run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.catalogues import ROOT
from benchmarks.harness.report import environment, write_json

BUILD = ROOT / "build" / "sanitize"
OPERATORS = (
    *("test_beam_step", "test_linear_beam_step", "test_row_lse"),
    *("test_trie", "test_trie_check", "test_trie_file", "test_trie_life", "test_trie_live"),
    *("test_token_logps", "test_token_logps_autograd", "test_token_logps_errors", "test_pack_sessions"),
    *("test_session_loss", "test_session_loss_bad_input", "test_session_loss_exact", "test_session_loss_formulas"),
    *("test_session_loss_op", "test_group_advantages", "test_group_advantages_exact", "test_legal_mass"),
    *("test_policy_loss", "test_policy_loss_exact", "test_policy_loss_formulas"),
)
THREADS = (
    "test_catalogue_store.py::test_searches_see_one_version",
    "test_beam_search.py::test_concurrent_searches",
)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "second_deadlock_stack=1",
}
LIBRARIES = {"address,undefined": "libasan.so", "thread": "libtsan.so"}


def call(command: list[str | Path], folder: Path = ROOT, **variables: str) -> tuple[int, str]:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def build(*commands: list[str | Path], **variables: str) -> None:
    for command in commands:
        code, text = call(command, **variables)
        if code:
            raise SystemExit(f"{' '.join(map(str, command))} failed\n{text[-4000:]}")


def cpp_tests(sanitizer: str) -> Callable[[], tuple[int, str]]:
    folder = BUILD / f"cpp-{sanitizer.replace(',', '-')}"
    options = [f"-DRADDPO_SANITIZE={sanitizer}", "-DRADDPO_CUDA=OFF", "-DRADDPO_TESTS=ON"]
    options += [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", "-DCMAKE_CXX_COMPILER=g++"]
    build(
        ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *options],
        ["cmake", "--build", folder, "--target", "raddpo_cpp_tests"],
    )
    return lambda: call([folder / "cpp_tests" / "raddpo_cpp_tests"], **OPTIONS)


def python_tests(sanitizer: str, tests: list[str]) -> Callable[[], tuple[int, str]]:
    folder = BUILD / f"python-{sanitizer.replace(',', '-')}"
    package = folder / "lib"
    build(
        [sys.executable, "setup.py", "--quiet", "build", "--build-base", folder, "--build-lib", package],
        RADDPO_SANITIZE=sanitizer,
        RADDPO_CUDA="0",
        CXX="g++",
    )
    # libstdc++ too: a sanitizer looks up what it replaces as the process starts, and Python alone does not load that.
    libraries = [
        call(["g++", f"-print-file-name={name}"])[1].strip() for name in (LIBRARIES[sanitizer], "libstdc++.so.6")
    ]
    # From the package's folder, so that it is found before the one in the checkout. A sanitizer's report, by which the
    # process ends, must not be captured as output of a test.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "-c",
        ROOT / "pyproject.toml",
    ]
    variables = {
        **OPTIONS,
        "ASAN_OPTIONS": "detect_leaks=0",
        "LD_PRELOAD": ":".join(libraries),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CI": "true",
    }
    return lambda: call([*command, *(ROOT / "python_tests" / test for test in tests)], package, **variables)


def watch(what: str, sanitizer: str, prepare: Callable[[], Callable[[], tuple[int, str]]]) -> dict[str, Any]:
    begin = time.perf_counter()
    run = prepare()
    built = time.perf_counter()
    code, text = run()
    findings = re.findall(r"SUMMARY: \w+Sanitizer: .*|runtime error: .*", text)
    count = re.search(r"(\d+) (?:passed|tests, 0 failed)", text)
    clean = code == 0 and not findings and count is not None
    return {
        "what": what,
        "sanitizer": sanitizer,
        "verdict": "clean" if clean else "found errors" if findings else f"failed with exit code {code}",
        "tests": int(count[1]) if count else 0,
        "findings": findings,
        "build_seconds": round(built - begin, 1),
        "seconds": round(time.perf_counter() - built, 1),
        "output": "" if clean else text[-4000:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "cpp_tests" / "sanitize.json", help="where the result goes")
    parser.add_argument("--only", default="", help="only the runs with this in their name")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    result = {
        **environment("cpp_tests.sanitize"),
        "compiler": call(["g++", "--version"])[1].split("\n")[0],
        "runs": runs,
    }
    memory, threads = LIBRARIES
    for what, sanitizer, prepare in (
        ("C++ tests", memory, lambda: cpp_tests(memory)),
        ("C++ tests", threads, lambda: cpp_tests(threads)),
        ("operators in Python", memory, lambda: python_tests(memory, [f"{name}.py" for name in OPERATORS])),
        ("searches and swaps in Python", threads, lambda: python_tests(threads, list(THREADS))),
    ):
        if arguments.only in f"{what}, {sanitizer}":
            runs.append(watch(what, sanitizer, prepare))
            write_json(arguments.out, result)
            print(f"{what}, {sanitizer}: {runs[-1]['verdict']}, {runs[-1]['tests']} tests", flush=True)
            print(runs[-1]["output"], end="", flush=True)
    raise SystemExit(any(run["verdict"] != "clean" for run in runs))


if __name__ == "__main__":
    main()
