"""Building the index of a catalogue."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from raddpo_ext.bench.compare import Comparison, require
from raddpo_ext.index.trie import TrieIndex


def comparison(device: torch.device, *, items: int, codes: int, levels: int) -> Comparison:
    """Build the index of uniform SIDs that fit a 63-bit word, on the CPU for any ``device``."""
    # The SIDs, and the same as one integer each.
    sids = torch.randint(codes, (items, levels), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    (words,) = words_of(sids.numpy())
    copied = torch.empty_like(sids)

    def nested_dicts() -> dict:
        root: dict = {}
        for sid in sids.tolist():
            node = root
            for code in sid:
                node = node.setdefault(code, {})
        return root

    def agree(result: Any, index: TrieIndex) -> None:
        # Sorted words hold a SID wherever neighbours differ; dicts are counted node by node.
        if isinstance(result, np.ndarray):
            found, expected = 1 + np.count_nonzero(np.diff(result)), index.num_sids
        else:
            nodes, found, expected = [result], 0, index.num_nodes
            while nodes:
                found += len(nodes)
                nodes = [child for node in nodes for child in node.values()]
        require(bool(found == expected), f"it holds {found} SIDs or nodes, not {expected}")

    return Comparison(
        f"index build, {items:,} items V={codes} L={levels}",
        {
            "ours": lambda: TrieIndex.build(sids),
            "np.sort of the SIDs, a word each": lambda: np.sort(words),
            "nested dicts": nested_dicts,
        },
        {"copy of the SIDs": lambda: copied.copy_(sids)},
        agree=agree,
        note=f"{TrieIndex.build(sids).nbytes / items:.1f} bytes per item",
    )


def words_of(sids: np.ndarray) -> list[np.ndarray]:
    """Each SID's codes packed into as few integers as hold them."""
    width = int(sids.max()).bit_length()
    most = 63 // width  # levels in a word
    words = []
    for begin in range(0, sids.shape[1], most):
        word = np.zeros(len(sids), np.int64)
        for column in sids[:, begin : begin + most].T:
            word <<= width
            word |= column
        words.append(word)
    return words
