"""``token_logps`` forward and backward, ours and plain torch, under pytest-benchmark::

    python -m pytest benchmarks/bench_token_logps.py --benchmark-only

Every method is first checked to give our values and gradients. One thread.
"""

import pytest

from benchmarks.peers.token_logps import methods
from benchmarks.peers.token_logps_timing import check
from raddpo_ext.bench.token_logps_cases import CASES, Case, Problem

CHOSEN = [case for case in CASES if case.section == "logits" and not case.huge_pages]
NAMES = list(dict.fromkeys(name for case in CHOSEN for name in methods(case)))


@pytest.fixture(scope="module", params=CHOSEN, ids=lambda case: case.name.replace(" ", "-"))
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


@pytest.mark.parametrize("method", NAMES)
def test_token_logps(benchmark, problem: Problem, method: str) -> None:
    case: Case = problem.case
    benchmark.group = case.name
    available = methods(case)
    if method not in available:
        pytest.skip(f"{method} is not for {case.dtype}")
    checked = check(problem, {"ours": available["ours"], method: available[method]})
    if method in checked.unavailable:
        pytest.skip(checked.unavailable[method])
    benchmark.pedantic(checked.steps[method], setup=problem.reset, rounds=10)
    benchmark.extra_info["bytes"] = 3 * case.logit_bytes  # read twice, written once
