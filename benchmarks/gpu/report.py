"""What a result measured on a GPU carries."""

from __future__ import annotations

import hashlib
import subprocess
from typing import Any

import torch

from benchmarks.harness.catalogues import ROOT
from benchmarks.harness.report import environment


def gpu_environment(module: str) -> dict[str, Any]:
    """``environment`` with the device, its driver, and a digest of the sources, for where there is no repository."""
    sources = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        sources.update(path.read_bytes())
    return {**environment(module), "sources_sha256": sources.hexdigest(), "gpu": _gpu(), "cuda": torch.version.cuda}


def require_gpu() -> None:
    """Ends the program where the kernels cannot run."""
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device, or a torch without CUDA: nothing to run here")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("raddpo::beam_step", "CUDA"):
        raise SystemExit("the extension was built without CUDA: build it again with nvcc at CUDA_HOME")


def kernel_name(key: str) -> str:
    """A kernel's name with its template's arguments, without namespaces and parameters: unlike kernels stay apart."""
    name = key.split("(anonymous namespace)::", 1)[-1].removeprefix("void ")
    depth = 0
    for end, char in enumerate(name):
        depth += {"<": 1, ">": -1}.get(char, 0)
        if char == "(" and depth == 0:
            name = name[:end]
            break
    return name.replace("raddpo::", "")


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    device = torch.cuda.get_device_properties(0)
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    try:
        command = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, subprocess.CalledProcessError):
        values = []
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "l2_bytes": device.L2_cache_size,
        **dict(zip(fields.split(","), values, strict=False)),
    }
