"""A constrained beam step from logits, compared with the ways to do it without this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raddpo_ext.bench.beam_search_peers import agree, bare_lse, dict_trie, gather_lse, hf_style, ours
from raddpo_ext.bench.compare import Comparison, Run
from raddpo_ext.bench.searches import Case, Level, Search


def comparison(device: torch.device, *, case: Case) -> Comparison:
    """The mean step of one search in a synthetic catalogue."""
    search = Search(case.index_of(case.sids()).to(device), case.vocab, case.batch, case.beams)
    steps = list(search.levels())

    # A call makes all steps of the search; each step's inputs are prepared.
    def whole(prepare: Callable[[Search, Level], Run]) -> Run:
        runs = [prepare(search, level) for level in steps]
        return lambda: [run() for run in runs]

    def agree_everywhere(results: list[Any], expected: list[Tensor]) -> None:
        for scores, best in zip(results, expected, strict=True):
            agree(scores, best)

    # The ways that need nothing but torch.
    peers = {
        "gather - logsumexp": gather_lse,
        "dict trie, torch gather": dict_trie,
        "prefix_allowed_tokens_fn, as HF": hf_style,
    }
    return Comparison(
        f"beam step V={case.vocab} L={case.levels} B={case.batch} W={case.beams}, {case.items:,} items",
        {"ours": whole(ours)} | {name: whole(peer) for name, peer in peers.items()},
        {"log-sum-exp of the logits": whole(bare_lse)},
        steps=case.levels,
        agree=agree_everywhere,
    )
