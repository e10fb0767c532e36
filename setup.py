"""Builds the extension module raddpo_ext._C: every .cpp under csrc/, and every .cu when nvcc is found."""

import os
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    import pybind11
    import torch
    import torch.utils.cpp_extension as torch_ext
except ImportError as error:
    raise SystemExit(
        f"raddpo_ext is built against the PyTorch already installed, and '{error.name}' is not importable here.\n"
        "Install torch, pybind11 and ninja, then run: pip install --no-build-isolation ."
    ) from None

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):  # pre-releases of 2.11 will do
    raise SystemExit(f"raddpo_ext needs torch 2.11 or later, this is {torch.__version__}")

CUDA_HOME = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
WITH_CUDA = os.environ.get("RADDPO_CUDA", "1") == "1" and (CUDA_HOME / "bin/nvcc").exists()
SANITIZE = os.environ.get("RADDPO_SANITIZE")  # as -fsanitize takes it: address,undefined or thread

cxx = ["-O3", "-std=c++17", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
cxx += ["-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter"]
cxx += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the stable ABI of 2.11, which later versions keep
link = ["-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch"]
if SANITIZE:
    cxx += ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
    link += [f"-fsanitize={SANITIZE}"]
else:
    link += ["-s"]
nvcc = ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]
sources = glob("csrc/**/*.cpp", recursive=True)
cuda = {}
if WITH_CUDA:
    sources += glob("csrc/**/*.cu", recursive=True)
    cxx += ["-DRADDPO_WITH_CUDA"]
    torch_ext.CUDA_HOME = str(CUDA_HOME)  # left None by a CPU-only torch, though our kernels need only nvcc
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    cuda = dict(library_dirs=[str(CUDA_HOME / "lib64")], libraries=["cudart_static", "rt", "dl", "pthread"])

setup(
    ext_modules=[
        torch_ext.CppExtension(
            "raddpo_ext._C",
            sorted(sources),
            depends=glob("csrc/**/*.*", recursive=True),
            include_dirs=[pybind11.get_include()],
            extra_compile_args={"cxx": cxx, "nvcc": nvcc},
            extra_link_args=link,
            **cuda,
        )
    ],
    cmdclass={"build_ext": torch_ext.BuildExtension},
)
