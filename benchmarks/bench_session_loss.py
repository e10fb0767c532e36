"""The session loss with its gradient, ours and plain torch, under pytest-benchmark::

    python -m pytest benchmarks/bench_session_loss.py --benchmark-only

Every method is first checked to give our loss and gradient. One thread.
"""

import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks.peers.session_loss import CASES, METHODS, Batch
from raddpo_ext.bench.compare import Missing

SECONDS = 0.5  # a method and case, at least 3 rounds


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def batch(request: pytest.FixtureRequest) -> Iterator[Batch]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Batch(request.param)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", METHODS)
def test_session_loss(benchmark, batch: Batch, method: str) -> None:
    benchmark.group = batch.case.name
    try:
        step = METHODS[method](batch)
    except Missing as missing:
        pytest.skip(str(missing))
    for got, expected in zip(step(), METHODS["ours"](batch)(), strict=True):  # also compiles and warms up
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-5, atol=1e-8)
    start = time.perf_counter()
    step()
    rounds = int(SECONDS / (time.perf_counter() - start))
    benchmark.pedantic(step, rounds=max(3, min(rounds, 5000)))
    benchmark.extra_info["pairs"] = batch.sessions.num_pairs
