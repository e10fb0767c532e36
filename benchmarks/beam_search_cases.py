"""The searches that are timed: a catalogue inside a vocabulary, a batch, a beam, and random logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks import catalogues

QWEN_VOCAB = 151_936  # the SID tokens are appended to a language model's vocabulary
REAL_CODES = 256


@dataclass(frozen=True)
class Case:
    """``vocab`` logits a row, ``batch`` queries of ``beams`` beams over SIDs of ``levels`` codes."""

    catalogue: str
    vocab: int
    levels: int
    batch: int
    beams: int
    items: int = 0  # of a synthetic catalogue

    @property
    def name(self) -> str:
        return f"{self.catalogue} V{self.vocab} L{self.levels} B{self.batch} W{self.beams}"


MILLION = 1_000_000
CASES = [
    Case("uniform", 2048, 8, 2, 70, MILLION),
    Case("clustered", 2048, 8, 2, 70, MILLION),
    Case("uniform", 8192, 3, 8, 128, MILLION),
    Case("clustered", 8192, 3, 8, 128, MILLION),
    *(Case("industrial", QWEN_VOCAB + 3 * REAL_CODES, 3, batch, 50) for batch in (1, 8, 32)),
    *(Case("instruments", QWEN_VOCAB + 4 * REAL_CODES, 4, batch, 50) for batch in (1, 8, 32)),
]


@dataclass
class Level:
    """One step to be made: the beams after ``depth`` tokens and the logits of their rows ``[B, W, V]``."""

    depth: int
    logits: Tensor
    state: rx.BeamState

    @property
    def rows(self) -> Tensor:
        return self.logits.view(-1, self.logits.shape[2])


class Search:
    """A case with its index; :meth:`levels` are its steps."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.first_tokens = [0] * case.levels
        vocab = None
        if case.catalogue in catalogues.INDEX_FILES:
            sids = catalogues.real(case.catalogue)
            vocab = rx.SIDVocab([REAL_CODES] * case.levels, offset=QWEN_VOCAB)
            self.first_tokens = [QWEN_VOCAB + level * REAL_CODES for level in range(case.levels)]
        else:
            sids = getattr(catalogues, case.catalogue)(case.items, case.vocab, case.levels)
        self.index = rx.TrieIndex.build(sids, vocab=vocab)

    def levels(self) -> Iterator[Level]:
        """The steps of one search, each with fresh standard normal logits. One level's logits reach 1 GB, so that a
        caller who drops each level before the next holds only one."""
        state = rx.BeamState.start(self.index, self.case.batch)
        for depth in range(self.case.levels):
            shape = (*state.nodes.shape, self.case.vocab)
            logits = torch.randn(shape, generator=torch.Generator().manual_seed(depth))
            yield Level(depth, logits, state)
            state = rx.beam_step(logits, state, self.index, self.case.beams)

    def tokens(self, nodes: Tensor) -> Tensor:
        """Token ids on the way to each node, ``[..., levels]``, -1 beyond its depth."""
        codes, _ = self.index.paths(nodes)
        return torch.where(codes >= 0, codes + torch.tensor(self.first_tokens), -1)

    @cached_property
    def sids(self) -> Tensor:
        """The distinct SIDs as token ids, sorted."""
        leaves = torch.arange(self.index.num_nodes - self.index.num_sids, self.index.num_nodes)
        return self.tokens(leaves)

    def children(self, level: Level) -> tuple[Tensor, Tensor]:
        """Token ids and nodes of each beam's children, both ``[B, W, K]``, padded with -1 up to the most children."""
        first, count = torch.ops.raddpo.trie_children(level.state.nodes.flatten(), *self.index.block)
        column = torch.arange(int(count.max()))
        nodes = torch.where(column < count[:, None], first[:, None] + column, -1)
        shape = (*level.state.nodes.shape, -1)
        return self.tokens(nodes)[..., level.depth].view(shape), nodes.view(shape)
