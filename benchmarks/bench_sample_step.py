"""``sample_step`` and ``beam_step`` of the same width over the same beams, under pytest-benchmark::

    python -m pytest benchmarks/bench_sample_step.py --benchmark-only

One round makes every level's step of one search once. ``beam_step`` with the softmax over the vocabulary reads all
logits, over the trie the children's only, as ``sample_step`` does. One thread. ``sample_step`` should take at most 1.15
times as long as ``beam_step``.
"""

import time

import pytest

from raddpo_ext.bench.sample_step import CASES, Steps

SECONDS = 0.5  # a method and case, at least 3 rounds


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def steps(request: pytest.FixtureRequest) -> Steps:
    return Steps(request.param)


@pytest.mark.parametrize("method", ["sample_step", "beam_step trie", "beam_step vocab"])
def test_sample_step(benchmark, steps: Steps, method: str) -> None:
    benchmark.group = steps.case.name
    search_once = steps.run(method)
    start = time.perf_counter()
    search_once()
    rounds = int(SECONDS / (time.perf_counter() - start))
    benchmark.pedantic(search_once, rounds=max(3, min(rounds, 1000)))
