"""A method that runs a model's layers by oneDNN, beside the one that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import raddpo_ext as rx

Result = TypeVar("Result")
SUFFIX = ", use_onednn"  # of the method's name


def by_onednn(model: Any, call: Callable[[], Result]) -> Callable[[], Result]:
    """The same call, after ``rx.use_onednn(model)``; others that use the model are not changed."""

    def run() -> Result:
        rx.use_onednn(model)
        try:
            return call()
        finally:
            rx.use_onednn(model, enabled=False)

    return run
