"""``TokenMerger`` beside the plain form, a linear layer of the concatenated codes, under pytest-benchmark::

    python -m pytest benchmarks/bench_token_merger.py --benchmark-only

A batch of histories as merged ids, forward and backward, and without gradients, where the projected tables are kept.
The plain form gets the codes' tokens ready made, and is first checked to give our values and gradients. The floor of a
training step is the products of the tables, which need no more arithmetic for more items: one forward, two backward.
That of a forward is the sum of rows of a table that is there. One thread. With few items ours takes the plain form.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import raddpo_ext as rx

SIZES, WIDTH = (256, 256, 256), 1024
VOCAB = rx.SIDVocab(SIZES, offset=1000)


class Problem:
    """A merger of random weights, and merged ids."""

    def __init__(self, items: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.merger = rx.TokenMerger(nn.Embedding(2000, WIDTH, dtype=dtype), VOCAB)
        nn.init.normal_(self.merger.sid_projection.weight, std=(3 * WIDTH) ** -0.5)
        self.tokens = VOCAB.encode(torch.randint(256, (items, 3)))
        self.ids = torch.tensor(self.merger.merge(self.tokens.flatten())).view(1, items)
        with torch.no_grad():
            self.table = self.merger._table(self.merger.weight[self.merger.ids.tokens[1:]])
        self.places = self.merger.ids.places_of(self.ids, self.merger.slots)[0]

    def ours(self) -> Tensor:
        return self.merger(self.ids)

    def plain(self) -> Tensor:
        return self.merger.sid_projection(F.embedding(self.tokens, self.merger.weight).flatten(1))[None]

    def sums(self) -> Tensor:
        return F.embedding_bag(self.places, self.table, mode="sum", padding_idx=0)

    def step(self, function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            output = function()
            return output, *torch.autograd.grad(output.sum(), tuple(self.merger.parameters()))

        return run

    def products(self) -> Callable[[], None]:
        """The bare products of a training step: each level's table, and its two gradients."""
        rows = torch.randn(sum(SIZES), WIDTH, dtype=self.table.dtype)
        weight = torch.randn(WIDTH, WIDTH, dtype=self.table.dtype)

        def run() -> None:
            for part in rows.split(SIZES):
                part @ weight.T
                part @ weight
                part.T @ part

        return run


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[3200, 100], ids=lambda items: f"{items} items")
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param, torch.float32)


@pytest.mark.parametrize("method", ["ours", "plain", "floor"])
def test_training(benchmark, problem: Problem, method: str) -> None:
    benchmark.group = f"forward and backward, {problem.ids.numel()} items, {WIDTH} wide"
    if method == "floor":
        benchmark.pedantic(problem.products(), rounds=5, warmup_rounds=1)
        return
    step = problem.step(getattr(problem, method))
    if method == "plain":
        for got, expected in zip(step(), problem.step(problem.ours)(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("method", ["ours", "plain", "floor"])
@torch.no_grad()
def test_inference(benchmark, problem: Problem, method: str) -> None:
    benchmark.group = f"without gradients, {problem.ids.numel()} items, {WIDTH} wide"
    benchmark.pedantic(getattr(problem, "sums" if method == "floor" else method), rounds=9, warmup_rounds=1)
