"""A constrained beam step from the logits, beside the ways in which it is done without this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raddpo_ext.bench.beam_search_peers import agree, bare_lse, dict_trie, gather_lse, hf_style, ours
from raddpo_ext.bench.compare import Comparison, Run
from raddpo_ext.bench.searches import Level, Search
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab


def comparison(
    device: torch.device, *, items: int, codes: int, levels: int, vocab_size: int, batch_size: int, beam_width: int
) -> Comparison:
    """A step is the mean over one search's. The catalogue is uniform; its tokens are the vocabulary's last where that
    has more than ``codes``."""
    sids = torch.randint(codes, (items, levels), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    vocab = None if vocab_size == codes else SIDVocab([codes] * levels, offset=vocab_size - levels * codes)
    search = Search(TrieIndex.build(sids, vocab=vocab).to(device), vocab_size, batch_size, beam_width)
    steps = list(search.levels())

    def whole(prepare: Callable[[Search, Level], Run]) -> Run:
        runs = [prepare(search, level) for level in steps]
        return lambda: [run() for run in runs]

    def agree_everywhere(results: list[Any], expected: list[Tensor]) -> None:
        for scores, best in zip(results, expected, strict=True):
            agree(scores, best)

    peers = {
        "gather - logsumexp": gather_lse,
        "dict trie, torch gather": dict_trie,
        "prefix_allowed_tokens_fn, as HF": hf_style,
    }
    return Comparison(
        f"beam step V={vocab_size} L={levels} B={batch_size} W={beam_width}, {items:,} items",
        {"ours": whole(ours)} | {name: whole(peer) for name, peer in peers.items()},
        {"log-sum-exp of the logits": whole(bare_lse)},
        steps=levels,
        agree=agree_everywhere,
    )
