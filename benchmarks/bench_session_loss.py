"""The session loss with its gradient, ours and plain torch, and RADDPOLoss around it, under pytest-benchmark::

    python -m pytest benchmarks/bench_session_loss.py --benchmark-only

Every method is first checked to give our loss and gradient. One thread. RADDPOLoss is measured from the log-probs on,
that is without its linear part; compared with the operator alone it should take at most 1.5 times as long.
"""

import time
from collections.abc import Callable

import pytest
import torch

import raddpo_ext as rx
from raddpo_ext.bench.compare import Missing
from raddpo_ext.bench.session_loss_cases import CASES, Batch, Case
from raddpo_ext.bench.session_loss_peers import METHODS

MODULE_CASE = Case("winner", 64, (3, 3), (13, 13))
SECONDS = 0.5  # a method and case, at least 3 rounds


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def batch(request: pytest.FixtureRequest) -> Batch:
    return Batch(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_session_loss(benchmark, batch: Batch, method: str) -> None:
    benchmark.group = batch.case.name
    try:
        step = METHODS[method](batch)
    except Missing as missing:
        pytest.skip(str(missing))
    for got, expected in zip(step(), METHODS["ours"](batch)(), strict=True):  # also compiles and warms up
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-5, atol=1e-8)
    run(benchmark, step)
    benchmark.extra_info["pairs"] = batch.sessions.num_pairs


@pytest.mark.parametrize("method", ["operator", "RADDPOLoss"])
def test_module(benchmark, method: str) -> None:
    benchmark.group = "RADDPOLoss without its linear part, 64 sessions of 3 and 13"
    batch, module = Batch(MODULE_CASE), rx.RADDPOLoss()

    def forward(logps: torch.Tensor) -> torch.Tensor:
        if method == "operator":
            return rx.rad_dpo_loss(logps, batch.sessions).loss
        module.logps = lambda *_, **__: logps  # in place of the linear part
        return module(None, None, batch.sessions).loss

    step = batch.differentiate(forward)
    step()
    run(benchmark, step)


def run(benchmark, step: Callable[[], object]) -> None:
    start = time.perf_counter()
    step()
    rounds = int(SECONDS / (time.perf_counter() - start))
    benchmark.pedantic(step, rounds=max(3, min(rounds, 5000)))
