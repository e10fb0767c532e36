"""``group_advantages``, ours and plain torch, under pytest-benchmark::

    python -m pytest benchmarks/bench_group_advantages.py --benchmark-only

Every method is first checked to give our advantages. ``floor`` copies the bytes that any method must move. One thread.
Ours should take at most 50 us for 512 rows and 1 ms for 16,384.
"""

import time

import pytest
import torch

from raddpo_ext.bench.compare import Missing
from raddpo_ext.bench.group_advantages_cases import CASES, Batch
from raddpo_ext.bench.group_advantages_peers import METHODS, bare_bytes

SECONDS = 0.5  # a method and case, at least 1 round


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def batch(request: pytest.FixtureRequest) -> Batch:
    return Batch(request.param)


@pytest.mark.parametrize("method", [*METHODS, "floor"])
def test_group_advantages(benchmark, batch: Batch, method: str) -> None:
    benchmark.group = batch.case.name
    try:
        step = bare_bytes(batch) if method == "floor" else METHODS[method](batch)
    except Missing as missing:
        pytest.skip(str(missing))
    found = step()
    if method != "floor":
        torch.testing.assert_close(found, METHODS["ours"](batch)(), rtol=1e-5, atol=1e-5)
    start = time.perf_counter()
    step()
    rounds = int(SECONDS / (time.perf_counter() - start))
    benchmark.pedantic(step, rounds=max(1, min(rounds, 5000)))
