"""The arguments of the C++ builder behind ``TrieIndex.build``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raddpo_ext import _C, _check
from raddpo_ext.index.vocab import SIDVocab


def built_block(
    sids: Any, item_ids: Any, lengths: Any, vocab: SIDVocab | None, progress: Callable[[float], None] | None
) -> Tensor:
    """The block of bytes of an index; the arguments and their checks are those of :meth:`TrieIndex.build`."""
    if vocab is not None:
        _check.instance(vocab, "vocab", SIDVocab)
    # The codes: their number and that of their levels.
    codes = _check.integer_array(sids, "sids", 2)
    rows, columns = codes.shape
    if rows == 0 or columns == 0:
        raise ValueError(f"sids must hold at least one SID of one code, got shape {codes.shape}")
    if rows >= 2**32 - 1:
        raise ValueError(f"sids must have fewer than 2**32 - 1 rows, got {rows}")
    eos = None if vocab is None else vocab.eos
    most_levels = _C.MAX_LEVELS - (eos is not None)
    if columns > most_levels:
        raise ValueError(f"sids must have at most {most_levels} levels, got shape {codes.shape}")
    if vocab is not None and vocab.levels != columns:
        raise ValueError(f"sids must have one column per level of vocab ({vocab.levels}), got shape {codes.shape}")
    # Lengths and item ids, one per row.
    ends = None if lengths is None else _check.lengths(lengths, rows, 1, columns).numpy()
    ids = None
    if item_ids is not None:
        ids = item_ids_of(item_ids, "item_ids")
        if len(ids) != rows:
            raise ValueError(f"item_ids must have one entry per row of sids ({rows}), got {len(ids)}")
    return torch.from_numpy(
        _C.trie_build(
            codes,
            lengths=ends,
            item_ids=ids,
            levels=level_symbols(vocab, columns),
            eos=-1 if eos is None else eos,
            has_vocab=vocab is not None,
            threads=torch.get_num_threads(),
            progress=progress,
        )
    )


def level_symbols(vocab: SIDVocab | None, columns: int) -> list[tuple[Any, ...]]:
    """``(size, first token, symbol of eos, symbol of each code, tokens, codes)`` of each level, for csrc/python.cpp.

    The arrays are empty where ``token = first token + code``.
    """
    empty = np.empty(0, np.int32)
    if vocab is None:
        return [(-1, 0, -1, empty, empty, empty)] * columns
    levels: list[tuple[Any, ...]] = []
    for level, ids in enumerate(vocab.token_ids):
        size, first = len(ids), int(ids[0])
        # Consecutive token ids need no tables.
        eos = vocab.eos if level > 0 else None
        if eos is None and first >= 0 and torch.equal(ids, torch.arange(first, first + size, device="cpu")):
            levels.append((size, first, -1, empty, empty, empty))
            continue
        # Otherwise symbols number the level's tokens in ascending order, the end token (code -1) among them.
        end = torch.tensor([] if eos is None else [-1], dtype=torch.int64, device="cpu")
        codes = torch.cat([(ids >= 0).nonzero()[:, 0], end])
        tokens = torch.where(codes >= 0, ids[codes.clamp(min=0)], -1 if eos is None else eos)
        order = tokens.argsort()
        tokens, codes = tokens[order], codes[order]
        # The inverse: the symbol of each code, -1 for a code without a token.
        symbols = torch.full((size,), -1, device="cpu")
        symbols[codes[codes >= 0]] = (codes >= 0).nonzero()[:, 0]
        eos_symbol = int((codes < 0).nonzero()[0, 0]) if eos is not None else -1
        levels.append((size, 0, eos_symbol, symbols.int().numpy(), tokens.int().numpy(), codes.int().numpy()))
    # After the last code only the end token can follow.
    if vocab.eos is not None:
        levels.append((0, 0, 0, empty, np.array([vocab.eos], np.int32), np.array([-1], np.int32)))
    return levels


def item_ids_of(value: Any, name: str, least: int | None = None) -> np.ndarray:
    """Item ids as int64 ``[N]``, checked to be at least ``least`` if that is given."""
    if isinstance(value, Sequence) and not len(value):  # an empty list has no dtype to check
        return np.empty(0, np.int64)
    given = _check.integer_array(value, name, 1)
    ids = given.astype(np.int64)
    if given.dtype == np.uint64:
        _check.none(torch.from_numpy(ids < 0), lambda row: f"{name}[{row}] = {given[row]} exceeds 2**63 - 1")
    if least is not None:
        _check.none(torch.from_numpy(ids < least), lambda row: f"{name}[{row}] = {given[row]} is negative")
    return ids
