"""Builds the extension module raddpo_ext._C: every .cpp under csrc/, and every .cu when nvcc is found."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    import pybind11
    import torch
    import torch.utils.cpp_extension as torch_ext
except ImportError as error:
    raise SystemExit(
        f"raddpo_ext is built against the installed PyTorch, but '{error.name}' cannot be imported: "
        "by default pip builds in an isolated environment without the installed packages.\n"
        "Install torch, pybind11 and ninja, then run: pip install --no-build-isolation ."
    ) from None

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):  # accepts pre-releases of 2.11
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


class BuildExtension(torch_ext.BuildExtension):
    """Checks the compiler first, so that a missing program or header is a one-line error."""

    def build_extensions(self):
        # torch compiles with the first and links with the second; CXX sets both.
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        for program in (compiler[0], getattr(self.compiler, "linker_so_cxx", self.compiler.linker_so)[0]):
            if shutil.which(program) is None:
                raise SystemExit(
                    f"raddpo_ext is compiled from C++, but there is no {program} here: install g++ (Debian and Ubuntu: "
                    "apt install g++), or set CXX to a compiler"
                )
        source = "#include <Python.h>\n#include <optional>\nstatic_assert(__cplusplus >= 201703L);\n"
        options = ["-std=c++17", f"-I{sysconfig.get_path('include')}", "-fsyntax-only", "-x", "c++", "-"]
        tried = subprocess.run([*compiler, *options], input=source, capture_output=True, text=True)
        if tried.returncode:
            errors = [line for line in tried.stderr.splitlines() if "error" in line]
            raise SystemExit(
                f"{shlex.join(compiler)} cannot compile C++17 with this Python's headers (Debian and Ubuntu: apt "
                f"install g++ python3-dev): {errors[0] if errors else f'exit code {tried.returncode}'}"
            )
        super().build_extensions()


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
    cmdclass={"build_ext": BuildExtension},
)
