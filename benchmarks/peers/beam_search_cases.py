"""The searches that are timed: a catalogue inside a vocabulary, a batch, a beam, and random logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.harness import catalogues
from raddpo_ext.bench import searches

QWEN_VOCAB = 151_936  # the SID tokens are appended to a language model's vocabulary
REAL_CODES = 256
Level = searches.Level


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


class Search(searches.Search):
    """A case with its index; :meth:`levels` are its steps."""

    def __init__(self, case: Case) -> None:
        self.case = case
        vocab = None
        if case.catalogue in catalogues.INDEX_FILES:
            sids = catalogues.real(case.catalogue)
            vocab = rx.SIDVocab([REAL_CODES] * case.levels, offset=QWEN_VOCAB)
        else:
            sids = getattr(catalogues, case.catalogue)(case.items, case.vocab, case.levels)
        super().__init__(rx.TrieIndex.build(sids, vocab=vocab), case.vocab, case.batch, case.beams)

    @cached_property
    def sids(self) -> Tensor:
        """The distinct SIDs as token ids, sorted."""
        leaves = torch.arange(self.index.num_nodes - self.index.num_sids, self.index.num_nodes)
        return self.tokens(leaves)
