"""``policy_loss`` with its gradient, ours and plain torch, under pytest-benchmark::

    python -m pytest benchmarks/bench_policy_loss.py --benchmark-only

Every method is first checked to give our loss and gradient. ``floor`` copies the bytes that any method must move. One
thread. Ours should take at most 100 us for 512 rows and 2 ms for 16,384.
"""

import time

import pytest
import torch

from raddpo_ext.bench.policy_loss_cases import CASES, Batch
from raddpo_ext.bench.policy_loss_peers import METHODS, bare_bytes

SECONDS = 0.5  # a method and case, at least 3 rounds


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def batch(request: pytest.FixtureRequest) -> Batch:
    return Batch(request.param)


@pytest.mark.parametrize("method", [*METHODS, "floor"])
def test_policy_loss(benchmark, batch: Batch, method: str) -> None:
    benchmark.group = batch.case.name
    step = bare_bytes(batch) if method == "floor" else METHODS[method](batch)
    found = step()
    if method != "floor":
        for got, expected in zip(found, METHODS["ours"](batch)(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)
    start = time.perf_counter()
    step()
    rounds = int(SECONDS / (time.perf_counter() - start))
    benchmark.pedantic(step, rounds=max(3, min(rounds, 5000)))
