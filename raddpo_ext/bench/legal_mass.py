"""The probability mass of legal tokens with its gradient, beside plain torch row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raddpo_ext.bench.compare import Comparison, Run
from raddpo_ext.decoding.row_lse import row_lse
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.logps.legal_mass import legal_mass
from raddpo_ext.logps.token_logps import token_logps

LEVELS = 4


class Problem:
    """Logits of the prefixes of random items, a leaf; the last tokens of the vocabulary are the codes'."""

    def __init__(
        self,
        rows: int,
        vocab_size: int,
        codes: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        items: int = 50_000,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        vocab = SIDVocab([codes] * LEVELS, offset=vocab_size - codes * LEVELS)
        sids = torch.randint(codes, (items, LEVELS), generator=generator)
        self.index = TrieIndex.build(sids, vocab=vocab)
        self.tokens = vocab.encode(sids[: rows // LEVELS]).flatten()
        self.nodes = self.index.nodes(vocab.encode(sids[: rows // LEVELS])).flatten()
        first, count = self.index.child_ranges(self.nodes)
        ends = zip(first.tolist(), count.tolist(), strict=True)
        self.children = [self.index.node_tokens[begin : begin + size].long().to(device) for begin, size in ends]
        self.index, self.nodes, self.tokens = self.index.to(device), self.nodes.to(device), self.tokens.to(device)
        logits = 3 * torch.randn(rows, vocab_size, generator=generator)
        self.logits = logits.to(device, dtype).requires_grad_()

    def ours(self, logits: Tensor) -> Tensor:
        return legal_mass(logits, self.index, self.nodes)

    def torch(self, logits: Tensor) -> Tensor:
        rows = zip(logits.float(), self.children, strict=True)
        return torch.stack([row[columns].logsumexp(0) for row, columns in rows]) - logits.float().logsumexp(1)

    def token_logps(self, logits: Tensor) -> Tensor:
        return token_logps(logits, self.tokens)

    def step(self, function: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, Tensor]]:
        def run() -> tuple[Tensor, Tensor]:
            values = function(self.logits)
            return values.detach(), torch.autograd.grad(values.sum(), self.logits)[0]

        return run

    def bare_pass(self) -> Run:
        """Read the logits once."""
        logits = self.logits.detach()
        return lambda: row_lse(logits)


def comparison(device: torch.device, *, rows: int, vocab_size: int, codes: int, items: int = 50_000) -> Comparison:
    problem = Problem(rows, vocab_size, codes, device=device, items=items)
    return Comparison(
        f"legal_mass and gradient, {rows} x {vocab_size} logits",
        {"ours": problem.step(problem.ours), "logsumexp row by row": problem.step(problem.torch)},
        {"a pass": problem.bare_pass(), "token_logps and gradient": problem.step(problem.token_logps)},
    )
