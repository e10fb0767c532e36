"""The kernels' PTX, translated to C++ and compiled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .ptx import Kernel, library, translate
from .shim import FOLDER, compiler

CSRC = FOLDER.parents[2] / "csrc"
#: As setup.py compiles them, but for the PTX of sm_90.
_NVCC_FLAGS = ["-ptx", "-arch=compute_90", "-O3", "-std=c++17", "--expt-relaxed-constexpr"]
#: ``-Og`` compiles in 60 % of the time of ``-O1``, and what it makes is as fast here. ``-w``: registers that are only
#: written, labels that nothing jumps to.
_FLAGS = ["-std=c++17", "-Og", "-fPIC", "-fvisibility=hidden", "-w", "-ffp-contract=off", f"-I{FOLDER}"]
_PARTS = 8  # files of about equal length, which compile at the same time


def nvcc() -> Path | None:
    program = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"
    return program if program.exists() else None


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def ptx_of(source: Path, folder: Path) -> str:
    program, out = nvcc(), folder / f"{source.stem}.ptx"
    assert program is not None
    run(program, *_NVCC_FLAGS, "-x", "cu", source, "-o", out)
    return out.read_text()


def compiled(name: str, kernels: list[Kernel], folder: Path) -> Path:
    """An object file of these kernels."""
    program, source = compiler(), folder / f"{name}.cpp"
    assert program is not None
    source.write_text(library(kernels))
    run(program, *_FLAGS, "-c", source, "-o", source.with_suffix(".o"))
    return source.with_suffix(".o")


def compiled_ptx(folder: Path) -> Sequence[Path]:
    """Object files of all kernels, and of the faulty ones; kept in ``folder`` for the next."""
    objects = [folder / f"ptx_{i}.o" for i in range(_PARTS)]
    if all(path.exists() for path in objects):
        return objects
    sources = [*sorted(CSRC.rglob("*.cu")), FOLDER / "faults.cuh"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        texts = pool.map(lambda source: ptx_of(source, folder), sources)
        kernels = [kernel for text in texts for kernel in translate(text)]
        parts: list[list[Kernel]] = [[] for _ in range(_PARTS)]
        for kernel in sorted(kernels, key=lambda kernel: -len(kernel.body)):
            min(parts, key=lambda part: sum(len(kernel.body) for kernel in part)).append(kernel)
        return list(pool.map(lambda i: compiled(objects[i].stem, parts[i], folder), range(_PARTS)))
