"""The searches that are timed: a catalogue inside a vocabulary, a batch, a beam, and random logits."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.harness import catalogues
from raddpo_ext.bench import searches
from raddpo_ext.bench.searches import QWEN_VOCAB, SYNTHETIC, Case

CODES = 256  # of a level of the real catalogues
CASES = [
    *(replace(case, catalogue=catalogue) for case in SYNTHETIC for catalogue in ("uniform", "clustered")),
    *(
        Case(catalogue, QWEN_VOCAB + levels * CODES, levels, batch, 50, codes=CODES)
        for catalogue, levels in (("industrial", 3), ("instruments", 4))
        for batch in (1, 8, 32)
    ),
]


class Search(searches.Search):
    """A case with its index; :meth:`levels` are its steps."""

    def __init__(self, case: Case) -> None:
        self.case = case
        sids = catalogues.real(case.catalogue) if case.catalogue in catalogues.INDEX_FILES else case.sids()
        super().__init__(case.index_of(sids), case.vocab, case.batch, case.beams)

    @cached_property
    def sids(self) -> Tensor:
        """The distinct SIDs as token ids, sorted."""
        leaves = torch.arange(self.index.num_nodes - self.index.num_sids, self.index.num_nodes)
        return self.tokens(leaves)
