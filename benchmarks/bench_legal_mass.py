"""``legal_mass`` forward and backward, plain torch and ``token_logps`` of the same logits, under pytest-benchmark::

    python -m pytest benchmarks/bench_legal_mass.py --benchmark-only

Plain torch is first checked to give our values and gradients; ``floor`` reads the logits once (``row_lse``). One
thread. Ours should take at most 1.1 times as long as ``token_logps``.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext.decoding.row_lse import row_lse

ROWS, VOCABULARY, CODES, LEVELS = 64, 152_064, 256, 4  # the last tokens are the codes'


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Problem:
    """Logits of the prefixes of random items, a leaf."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        vocab = rx.SIDVocab([CODES] * LEVELS, offset=VOCABULARY - CODES * LEVELS)
        sids = torch.randint(CODES, (50_000, LEVELS), generator=generator)
        self.index = rx.TrieIndex.build(sids, vocab=vocab)
        self.tokens = vocab.encode(sids[: ROWS // LEVELS]).flatten()
        self.nodes = self.index.nodes(vocab.encode(sids[: ROWS // LEVELS])).flatten()
        self.logits = (3 * torch.randn(ROWS, VOCABULARY, generator=generator)).to(dtype).requires_grad_()
        self.first, self.count = self.index.child_ranges(self.nodes)

    def ours(self, logits: Tensor) -> Tensor:
        return rx.legal_mass(logits, self.index, self.nodes)

    def torch(self, logits: Tensor) -> Tensor:
        ends = zip(self.first.tolist(), self.count.tolist(), strict=True)
        children = [self.index.node_tokens[first : first + count].long() for first, count in ends]
        legal = torch.stack([row[columns].logsumexp(0) for row, columns in zip(logits.float(), children, strict=True)])
        return legal - logits.float().logsumexp(1)

    def token_logps(self, logits: Tensor) -> Tensor:
        return rx.token_logps(logits, self.tokens)

    def step(self, function: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            values = function(self.logits)
            return values.detach(), torch.autograd.grad(values.sum(), self.logits)[0]

        return run


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


@pytest.mark.parametrize("method", ["ours", "torch", "token_logps", "floor"])
def test_legal_mass(benchmark, problem: Problem, method: str) -> None:
    benchmark.group = f"legal_mass {ROWS} rows of {VOCABULARY}, {problem.logits.dtype}"
    if method == "floor":
        logits = problem.logits.detach()
        benchmark.pedantic(lambda: row_lse(logits), rounds=10, warmup_rounds=1)
        return
    step = problem.step(getattr(problem, method))
    if method == "torch":
        for got, expected in zip(step(), problem.step(problem.ours)(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-5, check_dtype=False)
    benchmark.pedantic(step, rounds=10, warmup_rounds=1)
