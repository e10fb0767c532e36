"""Registers, shared memory, stack and spills of every CUDA kernel for sm_90: ``python -m benchmarks.gpu.kernels``.

As ptxas reports them when nvcc compiles the sources. No GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.report import gpu_environment, kernel_name
from benchmarks.harness import results
from benchmarks.harness.report import RESULTS, ROOT, markdown

MODULE = "benchmarks.gpu.kernels"
#: As setup.py compiles the kernels.
FLAGS = ["-cubin", "-arch=sm_90", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xptxas", "-v"]
COLUMNS = ("registers", "shared", "stack", "spill_stores", "spill_loads")
_KERNEL = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)
_SHARED = re.compile(r"(\d+) bytes smem")


def nvcc(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"
    if not program.exists():
        raise SystemExit(f"there is no {program}: set CUDA_HOME")
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done


def resources(source: Path) -> dict[str, dict[str, int]]:
    """By kernel, of one file."""
    compiled = nvcc(*FLAGS, source, "-o", os.devnull)
    found = {}
    for symbol, stack, stores, loads, registers, rest in _KERNEL.findall(compiled.stderr):
        name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
        shared = _SHARED.search(rest)
        numbers = (registers, shared[1] if shared else 0, stack, stores, loads)
        found[kernel_name(name)] = dict(zip(COLUMNS, map(int, numbers), strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_kernels.jsonl", help="where the result goes")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found: dict[str, dict[str, int]] = {}
        for kernels in pool.map(resources, sorted((ROOT / "csrc").rglob("*.cu"))):
            found |= kernels
    rows = [[f"`{name}`", *map(str, row.values())] for name, row in sorted(found.items())]
    print(markdown(["kernel", *COLUMNS], rows))
    cells = [{"arch": "sm_90", "kernel": name, **row} for name, row in sorted(found.items())]
    release = re.search(r"release \S+ (V\S+)", nvcc("--version").stdout)
    run = {**gpu_environment(MODULE), "nvcc": release and release[1], "results": cells}
    results.write(arguments.out, {"gpu_kernels": run})


if __name__ == "__main__":
    main()
