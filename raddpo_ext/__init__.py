"""Fused PyTorch operators for generative retrieval with semantic IDs (SIDs).

Importing the package registers ``torch.ops.raddpo`` and shows the names of ``raddpo_ext._public``. Only
``python -m raddpo_ext`` starts without them, and so without torch, and loads them when a command runs or asks for one.
"""

import sys as _sys
from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from raddpo_ext._public import *  # noqa: F403
    from raddpo_ext._public import __all__ as __all__

__version__ = "0.1.0"

if _find_spec("raddpo_ext._C") is None:
    folder = _sys.modules[__name__].__path__[0]
    raise ImportError(
        f"{folder} holds sources without the compiled extension: run `make build` in this checkout, or start "
        "Python in another folder if the package is installed"
    )


def _load() -> None:
    """Loads torch, the operators and every public name."""
    public = _import_module("raddpo_ext._public")
    globals().update({name: getattr(public, name) for name in ("__all__", *public.__all__)})


def __getattr__(name: str) -> _Any:
    """Loads the public names where something asks for one before a command does."""
    if f"{__name__}._public" in _sys.modules or (name.startswith("_") and name != "__all__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return getattr(_sys.modules[__name__], name)


def __dir__() -> list[str]:
    return sorted(_import_module("raddpo_ext._public").__all__)


# While Python looks for the module that its option -m names, "-m" stands for it in sys.argv.
if not (_sys.argv[:1] == ["-m"] and _sys.orig_argv[-len(_sys.argv) :][:1] == [__name__]):
    _load()
