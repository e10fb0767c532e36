"""Checks of candidates: whether they are SIDs of a vocabulary, and of an index."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab


class SIDCheck:
    """Says why a candidate's tokens are not a SID of a vocabulary."""

    def __init__(self, vocab: SIDVocab) -> None:
        self.levels = [set(ids.tolist()) - {-1} for ids in vocab.token_ids]
        self.eos = vocab.eos

    def why_not(self, sid: Sequence[int]) -> str | None:
        """The end of the sentence "tokens ..." that says what is wrong; None if they are a SID of any length."""
        # The codes before the end token.
        codes = sid[:-1] if self.eos is not None and sid and sid[-1] == self.eos else sid
        if self.eos is not None and len(codes) == len(sid):
            return f"does not end in eos, {self.eos}"
        if not 0 < len(codes) <= len(self.levels):
            return f"has {len(codes)} codes, not 1 to {len(self.levels)}"
        for level, token in enumerate(codes):
            if token not in self.levels[level]:
                return f"holds {token}, which is not a token of level {level}"
        return None


def contained(index: TrieIndex, sids: Sequence[Sequence[int]]) -> list[bool]:
    """For each sequence of tokens, whether it is the SID of an item of the index."""
    levels = index.levels
    # The extra column gives the node after the last token. SIDs too long for the index become empty ones.
    padded = [[*sid, *[-1] * (levels + 1 - len(sid))] if len(sid) <= levels else [-1] * (levels + 1) for sid in sids]
    tokens = torch.tensor(padded, dtype=torch.int64, device=index.device).reshape(-1, levels + 1)
    lengths = (tokens >= 0).sum(1, keepdim=True)
    _, items = index.item_ranges(index.nodes(tokens).gather(1, lengths)[:, 0])
    return (items > 0).tolist()
