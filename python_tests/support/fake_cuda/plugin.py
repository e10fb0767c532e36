"""``pytest -p support.fake_cuda.plugin``: the tests of a GPU on the fake one.

Of a test's parametrised cases those run that bring a value which none before had: arithmetic is the CPU's here, and
not what is tested.
"""

from __future__ import annotations

from typing import Any

import pytest

from .runtime import install

install()
from .. import on_gpu  # noqa: E402  it asks for a device

on_gpu.REPEATS = 2
#: Words of a test's id, and why the fake device cannot run it.
LIMITS = {
    "flex_attention": "FlexAttention's kernels are Triton's",
    "test_compiles_to_one_graph": "torch.compile makes Triton kernels",
    "opcheck": "opcheck traces with fake tensors of torch's own, which know no other tensor subclass",
    "beyond_int32": "its logits are 4 GB",
    "151936": "its logits are large, and the CPU's kernels are tested elsewhere",
    "malformed_lists": "the CPU's operator refuses such lists; the test shows that the kernel reads nothing beyond",
}
REASON = "not on the fake device: "


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    seen: set[Any] = set()
    kept, dropped = [], []
    for item in items:
        limit = next((why for words, why in LIMITS.items() if words in item.nodeid), None)
        if limit is not None:
            item.add_marker(pytest.mark.skip(reason=REASON + limit))
        parameters = item.callspec.params if hasattr(item, "callspec") else {"": ""}
        brings = {(item.path, item.originalname, name, repr(value)) for name, value in parameters.items()}
        (dropped if brings <= seen else kept).append(item)
        if limit is None:
            seen |= brings
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
