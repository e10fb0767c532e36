"""Registers, shared memory and stack of every CUDA kernel in the built extension: ``python -m benchmarks.gpu.kernels``.

Read off the machine code by cuobjdump, no GPU needed. A kernel spills if it has local memory or a stack.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from pathlib import Path

import raddpo_ext as rx
from benchmarks.gpu.report import gpu_environment
from benchmarks.harness import results
from benchmarks.harness.report import RESULTS, markdown

MODULE = "benchmarks.gpu.kernels"
_KERNEL = re.compile(r" Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def cuobjdump() -> str:
    folder = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    program = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=f"{folder}/bin")
    if program is None:
        raise SystemExit("cuobjdump is neither on the PATH nor in CUDA_HOME/bin")
    return program


def resources(library: Path) -> dict[str, dict[str, dict[str, int]]]:
    """By architecture and kernel."""
    text = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, dict[str, dict[str, int]]] = {}
    for part in text.split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\S+)", part)
        for name, registers, stack, shared, local in _KERNEL.findall(part):
            kernel = {"registers": int(registers), "shared": int(shared), "stack": int(stack), "local": int(local)}
            found.setdefault(arch[1], {})[_readable(name)] = kernel
    if not found:
        raise SystemExit(f"{library}: holds no CUDA kernels; build it with nvcc at CUDA_HOME")
    return {arch: dict(sorted(kernels.items())) for arch, kernels in sorted(found.items())}


def _readable(symbol: str) -> str:
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    name = name.split("raddpo::cuda::(anonymous namespace)::")[1]
    return name.split(">(")[0].split("(raddpo")[0].replace("raddpo::", "").replace("void ", "") + (
        ">" if ">(" in name else ""
    )


def table(kernels: dict[str, dict[str, int]]) -> str:
    head = ["kernel", "registers", "shared memory, bytes", "stack", "local"]
    return markdown(head, [[f"`{name}`", *(str(value) for value in row.values())] for name, row in kernels.items()])


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_kernels.jsonl", help="where the result goes")
    arguments = parser.parse_args()
    found = resources(Path(rx._C.__file__))
    for arch, kernels in found.items():
        print(f"{arch}\n{table(kernels)}\n")
    cells = [{"arch": arch, "kernel": name, **row} for arch, kernels in found.items() for name, row in kernels.items()]
    results.write(arguments.out, {"gpu_kernels": gpu_environment(MODULE) | {"results": cells}})


if __name__ == "__main__":
    main()
