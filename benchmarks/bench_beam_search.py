"""One step of the constrained beam search, ours and the peers', under pytest-benchmark::

    python -m pytest benchmarks/bench_beam_search.py --benchmark-only

One round makes every level's step of one search once; ``ms_a_step`` in the extra info is the median round divided by
the number of levels. All methods of a case are first checked to give the same scores. One thread.
A case keeps the logits of all its levels: up to 3 GB, and 7 GB at the peak (``-k "not B32"`` leaves those cases out).
"""

import time
from collections.abc import Iterator

import pytest
import torch

from benchmarks.peers.beam_search import METHODS, check_same
from benchmarks.peers.beam_search_cases import CASES, Search
from raddpo_ext.bench.compare import Missing
from raddpo_ext.bench.searches import Case, Level

SECONDS = 0.5  # a method and case, at least 3 rounds
Prepared = tuple[Search, list[Level]]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def case(request: pytest.FixtureRequest) -> Iterator[Prepared]:
    with torch.inference_mode():
        try:
            search = Search(request.param)
        except Missing as missing:
            pytest.skip(str(missing))
        yield search, list(search.levels())


@pytest.mark.parametrize("method", METHODS)
def test_beam_step(benchmark, case: Prepared, method: str) -> None:
    search, levels = case
    parameters: Case = search.case
    benchmark.group = parameters.name
    with torch.inference_mode():
        steps = []
        for level in levels:
            try:
                step = METHODS[method](search, level)
            except Missing as missing:
                pytest.skip(str(missing))
            check_same(search, level, {"ours": METHODS["ours"](search, level), method: step})
            steps.append(step)

        def search_once() -> None:
            for step in steps:
                step()

        start = time.perf_counter()
        search_once()
        rounds = int(SECONDS / (time.perf_counter() - start))
        benchmark.pedantic(search_once, rounds=max(3, min(rounds, 1000)))
    if benchmark.stats:
        benchmark.extra_info["ms_a_step"] = 1e3 * benchmark.stats["median"] / len(levels)
    benchmark.extra_info["logit_bytes_a_step"] = sum(level.logits.nbytes for level in levels) // len(levels)
