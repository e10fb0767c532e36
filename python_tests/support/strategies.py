"""Random catalogues for hypothesis. Shapes are drawn one by one and shrink; the codes come from a drawn seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

import raddpo_ext as rx

TABLES = ("none", "contiguous", "overlapping", "scattered", "lexicographic", "gaps")


@dataclass
class Catalogue:
    """What ``TrieIndex.build`` takes, and a number of columns that all its token ids fit."""

    sids: np.ndarray
    lengths: np.ndarray | None
    item_ids: np.ndarray | None
    vocab: rx.SIDVocab | None
    columns: int

    def arguments(self) -> dict[str, object]:
        return {"sids": self.sids, "lengths": self.lengths, "item_ids": self.item_ids, "vocab": self.vocab}

    def ends(self) -> list[int]:
        return [self.sids.shape[1]] * len(self.sids) if self.lengths is None else self.lengths.tolist()

    def codes(self) -> list[tuple[int, ...]]:
        """The SID of each row."""
        return [tuple(row[:end]) for row, end in zip(self.sids.tolist(), self.ends(), strict=True)]

    def tokens(self) -> list[tuple[int, ...]]:
        """The token ids of each row, the end-of-sequence token included; by dictionary, one code at a time."""
        if self.vocab is None:
            return self.codes()
        tables = [dict(enumerate(ids.tolist())) for ids in self.vocab.token_ids]
        eos = () if self.vocab.eos is None else (self.vocab.eos,)
        return [tuple(tables[level][code] for level, code in enumerate(sid)) + eos for sid in self.codes()]

    def items(self) -> list[int]:
        return list(range(len(self.sids))) if self.item_ids is None else self.item_ids.tolist()


@st.composite
def catalogues(draw: st.DrawFn, tables: tuple[str, ...] = TABLES, most_items: int = 60) -> Catalogue:
    """Lengths, collisions, an end-of-sequence token, any token table, every integer type."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 9, 100]), min_size=1, max_size=5))
    rows = draw(st.integers(1, most_items))
    # The power makes low codes frequent, so that prefixes and whole SIDs repeat.
    sids = (np.array(sizes) * rng.random((rows, len(sizes))) ** draw(st.sampled_from([1, 3]))).astype(np.int64)
    vocab, columns = _vocab(draw, rng, sizes, draw(st.sampled_from(tables)))
    lengths = rng.integers(1, len(sizes) + 1, rows) if draw(st.booleans()) else None
    if vocab is not None:
        sids = _known_codes(sids, vocab)
    if lengths is not None and (vocab is None or vocab.eos is None):
        free = _prefix_free([tuple(row[:end]) for row, end in zip(sids.tolist(), lengths, strict=True)])
        sids, lengths = sids[free], lengths[free]
    if lengths is not None:  # what lies beyond a length is never read
        sids[np.arange(len(sizes)) >= lengths[:, None]] = rng.integers(0, 100)
    first = draw(st.sampled_from([None, 0, 7, 2**40]))
    item_ids = None if first is None else first + 3 * rng.permutation(len(sids))
    integer = draw(st.sampled_from([np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]))
    return Catalogue(sids.astype(integer), lengths, item_ids, vocab, columns)


def _vocab(draw: st.DrawFn, rng: np.random.Generator, sizes: list[int], table: str) -> tuple[rx.SIDVocab | None, int]:
    if table == "none":
        return None, max(sizes) + draw(st.integers(0, 3))
    offset = draw(st.sampled_from([0, 3, 1030]))
    columns = offset + sum(sizes) + 4
    if table == "contiguous":
        arguments: dict[str, object] = {"offset": offset + 1}
        used = set(range(offset + 1, offset + 1 + sum(sizes)))
    elif table == "overlapping":
        starts = [offset + 1 + int(start) for start in rng.integers(0, 3, len(sizes))]
        arguments = {"offsets": starts}
        used = {start + code for start, size in zip(starts, sizes, strict=True) for code in range(size)}
        columns += 3
    else:
        if table == "scattered":
            tokens = [rng.permutation(columns - 1)[:size] for size in sizes]
        else:  # <a_0> <a_1> <a_10> <a_2> ..., level after level
            starts = np.cumsum([offset + 1, *sizes[:-1]])
            ranks = [np.argsort(np.array(sorted(range(size), key=str))) for size in sizes]
            tokens = [start + rank for start, rank in zip(starts, ranks, strict=True)]
        if table == "gaps":
            for ids in tokens:
                ids[rng.random(len(ids)) < 0.3] = -1
                ids[0] = offset + 1 if (ids < 0).all() else ids[0]
        arguments = {"token_ids": [ids.tolist() for ids in tokens]}
        used = {int(token) for ids in tokens for token in ids}
    eos = draw(st.sampled_from([None, "first", "last"]))
    if eos is not None:  # below or above the codes, or in a gap between them
        free = [token for token in range(columns) if token not in used]
        arguments["eos"] = free[0 if eos == "first" else -1]
    return rx.SIDVocab(sizes, **arguments), columns


def _known_codes(sids: np.ndarray, vocab: rx.SIDVocab) -> np.ndarray:
    """Moves each code to the next that has a token."""
    for level, ids in enumerate(vocab.token_ids):
        known = np.flatnonzero(ids.numpy() >= 0)
        sids[:, level] = known[np.searchsorted(known, sids[:, level]) % len(known)]
    return sids


def _prefix_free(sids: list[tuple[int, ...]]) -> list[int]:
    """Rows whose SID is no proper prefix of another's."""
    prefixes = {sid[:end] for sid in sids for end in range(len(sid))}
    return [row for row, sid in enumerate(sids) if sid not in prefixes]
