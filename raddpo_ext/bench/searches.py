"""A constrained search whose steps are timed one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raddpo_ext.bench import catalogues
from raddpo_ext.decoding.beam_step import BeamState, beam_step
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab


@dataclass(frozen=True)
class Case:
    """``vocab`` logits per row, ``batch`` queries of ``beams`` beams over SIDs of ``levels`` codes."""

    catalogue: str  # "uniform" or "clustered", or the name of a real one
    vocab: int
    levels: int
    batch: int
    beams: int
    items: int = 0  # of a synthetic catalogue
    codes: int = 0  # of a level, the last tokens of the vocabulary; 0: all levels have all tokens

    @property
    def name(self) -> str:
        return f"{self.catalogue} V{self.vocab} L{self.levels} B{self.batch} W{self.beams}"

    def index_of(self, sids: Any) -> TrieIndex:
        if not self.codes:
            return TrieIndex.build(sids)
        vocab = SIDVocab([self.codes] * self.levels, offset=self.vocab - self.levels * self.codes)
        return TrieIndex.build(sids, vocab=vocab)

    def sids(self) -> np.ndarray:
        """The SIDs of a synthetic catalogue."""
        draw: Callable[[int, int, int], np.ndarray] = getattr(catalogues, self.catalogue)
        return draw(self.items, self.codes or self.vocab, self.levels)


MILLION = 1_000_000
QWEN_VOCAB = 151_936  # the SID tokens are appended to a language model's vocabulary
SYNTHETIC = [Case("uniform", 2048, 8, 2, 70, MILLION), Case("uniform", 8192, 3, 8, 128, MILLION)]


@dataclass
class Level:
    """The input of one step: the beams after ``depth`` tokens, and their logits ``[B, W, V]``."""

    depth: int
    logits: Tensor
    state: BeamState

    @property
    def rows(self) -> Tensor:
        return self.logits.view(-1, self.logits.shape[2])


class Search:
    """``batch_size`` queries of ``beam_width`` beams over an index inside a vocabulary; :meth:`levels` are its steps.

    The token ids of a level are consecutive.
    """

    def __init__(self, index: TrieIndex, vocab_size: int, batch_size: int, beam_width: int) -> None:
        self.index, self.vocab_size, self.batch_size, self.beam_width = index, vocab_size, batch_size, beam_width
        first = [0] * index.sid_levels if index.vocab is None else [int(ids[0]) for ids in index.vocab.token_ids]
        self.first_tokens = torch.tensor(first, device=index.device)

    def levels(self) -> Iterator[Level]:
        """The steps of one search, each with new standard normal logits.

        One level's logits take up to 1 GB, so a caller should drop each level before the next one.
        """
        state = BeamState.start(self.index, self.batch_size)
        for depth in range(self.index.levels):
            shape = (*state.nodes.shape, self.vocab_size)
            logits = torch.randn(shape, generator=torch.Generator().manual_seed(depth)).to(self.index.device)
            yield Level(depth, logits, state)
            state = beam_step(logits, state, self.index, self.beam_width)

    def tokens(self, nodes: Tensor) -> Tensor:
        """Token ids on the way to each node, ``[..., levels]``, -1 beyond its depth."""
        codes, _ = self.index.paths(nodes)
        return torch.where(codes >= 0, codes + self.first_tokens, -1)

    def children(self, level: Level) -> tuple[Tensor, Tensor]:
        """Token ids and nodes of each beam's children, both ``[B, W, K]``, padded with -1."""
        first, count = self.index.child_ranges(level.state.nodes)
        column = torch.arange(int(count.max()), device=count.device)
        nodes = torch.where(column < count[..., None], first[..., None] + column, -1)
        return self.tokens(nodes)[..., level.depth], nodes
