"""``sample_step`` and ``beam_step`` of the same width over the same beams, under pytest-benchmark::

    python -m pytest benchmarks/bench_sample_step.py --benchmark-only

One round makes every level's step of one search once. ``beam_step`` with the softmax over the vocabulary reads all
logits, over the trie the children's only, as ``sample_step`` does. One thread. ``sample_step`` should take at most 1.15
times as long as ``beam_step``.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

import raddpo_ext as rx
from raddpo_ext.bench.searches import MILLION, QWEN_VOCAB, Case

SECONDS = 0.5  # a method and case, at least 3 rounds
CASES = [
    Case("clustered", QWEN_VOCAB, 4, 8, 17, 100_000, 256),  # 16 rollouts a prompt
    Case("uniform", 8192, 3, 8, 65, MILLION),
    Case("uniform", 2048, 8, 2, 257, MILLION),
]


@dataclass
class Level:
    """The beams before a step, and their logits."""

    logits: torch.Tensor
    state: rx.SampleState


def levels_of(case: Case, index: rx.TrieIndex) -> Iterator[Level]:
    generator = torch.Generator().manual_seed(0)
    state = rx.SampleState.start(index, case.batch)
    for _ in range(index.levels):
        level = Level(torch.randn(*state.nodes.shape, case.vocab, generator=generator), state)
        yield level
        state = rx.sample_step(level.logits, state, index, case.beams, seed=0)


def sample(level: Level, index: rx.TrieIndex, width: int) -> rx.SampleState:
    return rx.sample_step(level.logits, level.state, index, width, seed=0)


METHODS: dict[str, Callable[[Level, rx.TrieIndex, int], rx.BeamState]] = {
    "sample_step": sample,
    "beam_step trie": lambda level, index, width: rx.beam_step(
        level.logits, level.state, index, width, normalize="trie"
    ),
    "beam_step vocab": lambda level, index, width: rx.beam_step(level.logits, level.state, index, width),
}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def search(request: pytest.FixtureRequest) -> Iterator[tuple[Case, rx.TrieIndex, list[Level]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    index = request.param.index_of(request.param.sids())
    yield request.param, index, list(levels_of(request.param, index))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", METHODS)
def test_sample_step(benchmark, search: tuple[Case, rx.TrieIndex, list[Level]], method: str) -> None:
    case, index, levels = search
    benchmark.group = case.name

    def search_once() -> None:
        for level in levels:
            METHODS[method](level, index, case.beams)

    start = time.perf_counter()
    search_once()
    rounds = int(SECONDS / (time.perf_counter() - start))
    benchmark.pedantic(search_once, rounds=max(3, min(rounds, 1000)))
