"""What the compiler made of the CPU's kernels, in the objects that `make build` keeps."""

from __future__ import annotations

import glob
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OBJECTS = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


@pytest.mark.parametrize("source", sorted(glob.glob("csrc/**/*_cpu.cpp", root_dir=ROOT, recursive=True)))
def test_kernels_share_no_code_across_instruction_sets(source: str) -> None:
    """A weak symbol, emitted once per program, could be the AVX-512 copy that an older CPU then runs."""
    kernel = (OBJECTS / source).with_suffix(".o")
    if not kernel.is_file():
        pytest.skip(f"needs {kernel}: run `make build`")
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    symbols = subprocess.run(["nm", "-C", str(kernel)], check=True, capture_output=True, text=True).stdout
    assert "raddpo::scalar::" in symbols
    assert [line for line in symbols.splitlines() if line[17:18] in "WwVvu"] == []
