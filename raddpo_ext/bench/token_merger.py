"""The embeddings of merged prompts, beside a linear layer of the concatenated codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raddpo_ext.bench.compare import Comparison, Run
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.integrations.token_merger import TokenMerger

SIZES, WIDTH = (256, 256, 256), 1024
VOCAB_SIZE = 2000


@dataclass(frozen=True)
class Case:
    """``items`` merged ids; ``training``: forward and backward, else without gradients, where tables are kept."""

    items: int
    training: bool
    width: int = WIDTH

    @property
    def name(self) -> str:
        return f"{self.items} items{' and gradient' if self.training else ''}, {self.width} wide"


CASES = [Case(items, training) for items in (3200, 100) for training in (True, False)]


class Problem:
    """A merger of random weights, and merged ids."""

    def __init__(self, items: int, width: int = WIDTH, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        vocab = SIDVocab(SIZES, offset=1000)
        self.merger = TokenMerger(nn.Embedding(VOCAB_SIZE, width), vocab)
        nn.init.normal_(self.merger.sid_projection.weight, std=(len(SIZES) * width) ** -0.5, generator=generator)
        tokens = vocab.encode(torch.randint(256, (items, len(SIZES)), generator=generator))
        self.ids = torch.tensor(self.merger.merge(tokens.flatten())).view(1, items).to(device)
        self.merger, self.tokens = self.merger.to(device), tokens.to(device)

    def ours(self) -> Tensor:
        output: Tensor = self.merger(self.ids)
        return output

    def plain(self) -> Tensor:
        rows = F.embedding(self.tokens, self.merger.weight).flatten(1)
        output: Tensor = self.merger.sid_projection(rows)[None]
        return output

    def step(self, function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """Forward and backward."""

        def run() -> tuple[Tensor, ...]:
            output = function()
            return output.detach(), *torch.autograd.grad(output.sum(), tuple(self.merger.parameters()))

        return run

    def inference(self, function: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (torch.no_grad()(function)(),)

    def products(self) -> Run:
        """The bare products of a training step: each level's table, and its two gradients."""
        weight = torch.randn(self.merger.embedding_dim, self.merger.embedding_dim, device=self.ids.device)
        rows = torch.randn(sum(SIZES), self.merger.embedding_dim, device=self.ids.device)

        def run() -> None:
            for part in rows.split(SIZES):
                part @ weight.T
                part @ weight
                part.T @ part

        return run

    def sums(self) -> Run:
        """A sum of rows of one table per item."""
        table = torch.randn(sum(SIZES), self.merger.embedding_dim, device=self.ids.device)
        places = torch.randint(sum(SIZES), self.tokens.shape, device=self.ids.device)
        return lambda: F.embedding_bag(places, table, mode="sum")


def comparison(device: torch.device, *, case: Case) -> Comparison:
    problem = Problem(case.items, case.width, device)
    of = problem.step if case.training else problem.inference
    floor = {"products of the tables": problem.products()} if case.training else {"sums of rows": problem.sums()}
    return Comparison(
        f"TokenMerger, {case.name}",
        {"ours": of(problem.ours), "linear layer of the concatenated codes": of(problem.plain)},
        floor,
    )
