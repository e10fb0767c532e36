"""Products by oneDNN, whatever the processor and however small they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

from raddpo_ext import _matmul


@contextmanager
def products_by_onednn(yes: bool = True, tile: int = 5) -> Iterator[None]:
    """Within it, or by MKL; in tiles of so many rows or columns."""
    if yes and not _matmul._has_operator():
        pytest.skip("this torch has no operator for a product by oneDNN")
    with mock.patch.multiple(
        _matmul, onednn_is_faster=lambda: yes, _MIN_FLOPS=0, _MIN_FLOPS_RECURRING=0, _FEW=0, _TILE=tile
    ):
        yield
