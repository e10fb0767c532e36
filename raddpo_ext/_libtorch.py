"""Makes the extension importable without ``import torch``, whose Python modules take seconds."""

from __future__ import annotations

import ctypes
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


def load_extension() -> None:
    """Import ``raddpo_ext._C``. Imports torch only if the libraries of torch do not load by themselves."""
    if "torch" not in sys.modules:
        spec = find_spec("torch")
        try:
            for folder in (spec and spec.submodule_search_locations) or ():
                for name in ("libtorch_cpu.so", "libtorch.so"):
                    ctypes.CDLL(str(Path(folder, "lib", name)))
            import_module("raddpo_ext._C")
            return
        except (OSError, ImportError):
            pass
    import_module("torch")
    import_module("raddpo_ext._C")
