"""Scripts and tests of a GPU on a device that is none (fake_cuda): what needs no GPU to be seen waits for none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.cuda_on_cpu.shim import compiler

from benchmarks.gpu.report import kernel_name
from python_tests.gpu.gpu_sanitize import DRIVEN, exit_code, verdict

TESTS = Path(__file__).parents[1]
CHECKS = ["support/fake_cuda/check_device.py", "support/fake_cuda/check_scripts.py"]
FILES = [*CHECKS, *sorted(f"gpu/{path.name}" for path in (TESTS / "gpu").glob("test_gpu*.py"))]
ALLOWED = "not on the fake device: |could not import"  # a library that is not installed
SKIPPED = re.compile(r"^SKIPPED \[\d+\] [^ ]+ (.*)$", re.MULTILINE)


def test_on_the_fake_device() -> None:
    """In one process, as to make the device takes longer than most of the files."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler (g++, or the one named by CXX)")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "support.fake_cuda.plugin", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, *(str(TESTS / file) for file in FILES)],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    silent = [reason for reason in SKIPPED.findall(done.stdout) if not re.search(ALLOWED, reason)]
    assert not silent, f"skipped, though the fake device can run them: {silent}"


def test_sanitize_fails_where_nothing_was_driven() -> None:
    clean, dead = verdict(0, DRIVEN), verdict(1, "Traceback: no driver")
    assert exit_code([{"verdict": clean}] * 4) == 0
    assert exit_code([{"verdict": clean}, {"verdict": dead}]) == 1
    assert exit_code([{"verdict": verdict(None, "")}]) == 1
    assert exit_code([{"verdict": verdict(0, "nothing was said")}]) == 1
    assert exit_code([]) == 1


def test_kernels_keep_names_of_their_own() -> None:
    inner = "raddpo::cuda::(anonymous namespace)::"
    keys = [f"void {inner}step_kernel<float, {level}>({inner}Arguments)" for level in ("true", "(bool)0")]
    keys.append(f"{inner}merge_kernel({inner}Arguments)")
    names = [kernel_name(key) for key in keys]
    assert names == ["step_kernel<float, true>", "step_kernel<float, (bool)0>", "merge_kernel"]
