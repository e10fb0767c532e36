"""``linear_token_logps`` forward and backward, ours, plain torch and other libraries, under pytest-benchmark::

    python -m pytest benchmarks/bench_linear_token_logps.py --benchmark-only -k "peers and 32768"

Every method is first checked to give our values and gradients. One thread.
"""

from collections.abc import Iterator

import pytest

from benchmarks.peers.token_logps import methods
from benchmarks.peers.token_logps_timing import check
from raddpo_ext.bench.token_logps_cases import CASES, Case, Problem

CHOSEN = [case for case in CASES if case.section in ("head", "peers", "level") and not case.huge_pages]
NAMES = list(dict.fromkeys(name for case in CHOSEN for name in methods(case)))


@pytest.fixture(scope="module", params=CHOSEN, ids=lambda case: case.name.replace(" ", "-"))
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    problem = Problem(request.param)
    yield problem
    for leaf in problem.leaves.values():  # the weight lives on
        leaf.grad = None


@pytest.mark.parametrize("method", NAMES)
def test_linear_token_logps(benchmark, problem: Problem, method: str) -> None:
    case: Case = problem.case
    benchmark.group = case.name
    available = methods(case)
    if method not in available:
        pytest.skip(f"{method} is not part of this case")
    checked = check(problem, {"ours": available["ours"], method: available[method]})
    if method in checked.unavailable:
        pytest.skip(checked.unavailable[method])
    benchmark.pedantic(checked.steps[method], setup=problem.reset, rounds=3)
