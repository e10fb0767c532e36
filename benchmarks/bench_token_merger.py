"""``TokenMerger`` beside the plain form, a linear layer of the concatenated codes, under pytest-benchmark::

    python -m pytest benchmarks/bench_token_merger.py --benchmark-only

A batch of histories as merged ids, forward and backward, and without gradients, where the projected tables are kept.
The plain form gets the codes' tokens ready made, and is first checked to give our values and gradients. The floor of a
training step is the products of the tables, which need no more arithmetic for more items: one forward, two backward.
That of a forward is the sum of rows of a table that is there. One thread. With few items ours takes the plain form.
"""

import pytest
import torch

from raddpo_ext.bench.compare import Comparison, agree
from raddpo_ext.bench.token_merger import CASES, comparison


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def compared(request: pytest.FixtureRequest) -> Comparison:
    return comparison(torch.device("cpu"), case=request.param)


@pytest.mark.parametrize("method", ["ours", "plain", "floor"])
def test_token_merger(benchmark, compared: Comparison, method: str) -> None:
    benchmark.group = compared.name
    ours, plain = compared.methods.values()
    if method == "plain":
        agree(plain(), ours())
    (floor,) = compared.floors.values()
    benchmark.pedantic({"ours": ours, "plain": plain, "floor": floor}[method], rounds=5, warmup_rounds=1)
