"""``legal_mass`` forward and backward, plain torch and ``token_logps`` of the same logits, under pytest-benchmark::

    python -m pytest benchmarks/bench_legal_mass.py --benchmark-only

Plain torch is first checked to give our values and gradients; ``floor`` reads the logits once (``row_lse``). One
thread. Ours should take at most 1.1 times as long as ``token_logps``.
"""

import pytest
import torch

from raddpo_ext.bench.legal_mass import Problem

ROWS, VOCABULARY, CODES = 64, 152_064, 256


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(ROWS, VOCABULARY, CODES, request.param)


@pytest.mark.parametrize("method", ["ours", "torch", "token_logps", "floor"])
def test_legal_mass(benchmark, problem: Problem, method: str) -> None:
    benchmark.group = f"legal_mass {ROWS} rows of {VOCABULARY}, {problem.logits.dtype}"
    if method == "floor":
        benchmark.pedantic(problem.bare_pass(), rounds=10, warmup_rounds=1)
        return
    step = problem.step(getattr(problem, method))
    if method == "torch":
        for got, expected in zip(step(), problem.step(problem.ours)(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-5, check_dtype=False)
    benchmark.pedantic(step, rounds=10, warmup_rounds=1)
