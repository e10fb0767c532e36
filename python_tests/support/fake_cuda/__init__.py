"""A CUDA device that is none: tensors that say ``cuda:0``, lie in the host's memory and are computed by the CPU.

``install()`` puts it in place of ``torch.cuda`` for the rest of the process. docs/gpu.md says what it sees.
"""

from support.fake_cuda.runtime import install
from support.fake_cuda.tensor import FakeTensor

__all__ = ["FakeTensor", "install"]
