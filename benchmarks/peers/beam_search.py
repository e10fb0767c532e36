"""One step of the constrained search in each way that is compared.

Each method here is called once with a search and one of its levels, prepares what it may prepare (not timed), and
returns the step to be timed: a call without arguments that starts from the logits and returns the best scores
``[B, <= W]`` with what the next step needs (tokens, parents, next states).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.beam_search_cases import Search
from raddpo_ext.bench.beam_search_peers import (
    Node,
    agree,
    bare_lse,
    dict_trie,
    dict_tries,
    gather_lse,
    hf_style,
    ours,
)
from raddpo_ext.bench.compare import Missing
from raddpo_ext.bench.searches import Level

Step = Callable[[], Any]
# STATIC holds two dense vocab x vocab tables (5 bytes an entry) when its first two levels are dense, its default.
MOST_DENSE_BYTES = 2**30


def read(search: Search, level: Level) -> Step:
    """The logits' bytes, only read and added."""
    return lambda: level.logits.sum()


def static(search: Search, level: Level) -> Step:
    """STATIC (``static_decoding``, not part of this project), with its dense first two levels where they fit.

    Its public loop makes whole searches only; this is one turn of it around its own masking function. The number of
    tokens that a beam keeps at a dense level is the beam width, the least that makes the beam exact.
    """
    try:
        from static_decoding.decoding_pt import generate_and_apply_logprobs_mask
    except ImportError:
        raise Missing("the module static_decoding (STATIC) is not importable") from None
    tables = _static_tables(search)
    case, depth, rows, scores = search.case, level.depth, level.rows, level.state.scores
    batch, width = scores.shape
    states = _static_states(search, level)

    def root() -> tuple[Tensor, ...]:
        logps = torch.log_softmax(rows, -1)
        best, tokens = torch.where(tables.start_mask, logps, -math.inf).topk(min(case.beams, case.vocab))
        return best, tokens, tokens + 1

    def select(logps: Tensor, tokens: Tensor, next_states: Tensor) -> tuple[Tensor, ...]:
        totals = (scores[:, :, None] + logps.view(batch, width, -1)).flatten(1)
        best, at = totals.topk(min(case.beams, totals.shape[1]))
        pick = [t.view(batch, -1).gather(1, at) for t in (tokens, next_states)]
        return best, at // logps.shape[1], *pick

    def dense() -> tuple[Tensor, ...]:
        parents = states - 1
        logps = torch.log_softmax(rows, -1)
        logps = torch.where(tables.dense_mask[parents], logps, -math.inf)
        logps, tokens = logps.topk(min(case.beams, case.vocab))
        return select(logps, tokens, tables.dense_states[parents[:, None], tokens])

    def sparse() -> tuple[Tensor, ...]:
        logps = torch.log_softmax(rows, -1)
        found = generate_and_apply_logprobs_mask(
            logps, states, tables.transitions, tables.row_starts, tables.branches[depth], case.vocab, rows.device
        )
        return select(*found)

    step = root if depth == 0 else dense if depth < tables.dense_levels else sparse
    return lambda: step()[0]


class _StaticTables:
    def __init__(self, search: Search) -> None:
        from static_decoding.csr_utils import build_static_index

        vocab = search.case.vocab
        self.dense_levels = 2 if 5 * vocab**2 <= MOST_DENSE_BYTES else 1
        sids = search.sids.numpy().astype(np.int32)
        packed, starts, self.branches, start_mask, dense_mask, dense_states = build_static_index(
            sids, vocab, dense_lookup_layers=self.dense_levels
        )
        self.transitions = torch.from_numpy(packed).int()
        self.row_starts = torch.from_numpy(starts).long()
        self.start_mask = torch.from_numpy(start_mask)
        self.dense_mask = torch.from_numpy(dense_mask)
        self.dense_states = torch.from_numpy(dense_states)


@lru_cache(maxsize=1)
def _static_tables(search: Search) -> _StaticTables:
    return _StaticTables(search)


def _static_states(search: Search, level: Level) -> Tensor:
    """STATIC's numbers of the beams' states: 0 for the root and empty slots, token + 1 after one token, and from there
    breadth first in sorted order, as our nodes are too."""
    nodes = level.state.nodes.flatten()
    if level.depth == 0:
        return torch.zeros_like(nodes)
    first = search.tokens(nodes)[:, 0]
    second_level = 1 + len(search.sids[:, 0].unique())  # our first node after two tokens
    states = first + 1 if level.depth == 1 else nodes - second_level + search.case.vocab + 1
    return torch.where(nodes >= 0, states, 0)


def dict_trie_batched(search: Search, level: Level) -> Step:
    """The same dicts, all children of a query in one numpy gather: the fastest dict trie we know how to write."""
    _, nodes = dict_tries(search, level)
    rows, scores = level.rows, level.state.scores.numpy()
    batch, width = scores.shape

    def step() -> tuple[list[Tensor], list[list[Node]]]:
        logps = torch.log_softmax(rows, -1).numpy()
        best, next_nodes = [], []
        for query in range(batch):
            beams = nodes[query * width : (query + 1) * width]
            counts = [len(node) for node in beams]
            tokens = np.fromiter(chain.from_iterable(beams), np.int64, sum(counts))
            parents = np.repeat(np.arange(width), counts)
            totals = scores[query, parents] + logps[query * width + parents, tokens]
            values, at = torch.from_numpy(totals).topk(min(search.case.beams, len(totals)))
            best.append(values)
            chosen = zip(parents[at].tolist(), tokens[at].tolist(), strict=True)
            next_nodes.append([beams[parent][token] for parent, token in chosen])
        return best, next_nodes

    return lambda: step()[0]


METHODS: dict[str, Callable[[Search, Level], Step]] = {
    "ours": ours,
    "bare_lse": bare_lse,
    "read": read,
    "static": static,
    "dict_trie": dict_trie,
    "dict_trie_batched": dict_trie_batched,
    "hf_style": hf_style,
    "gather_lse": gather_lse,
}
FLOORS = ("bare_lse", "read")  # no search: they give no scores


def check_same(search: Search, level: Level, steps: dict[str, Step]) -> None:
    """Raises AssertionError unless every method finds the scores that ours finds (-inf in empty slots)."""
    expected = steps["ours"]()
    for name, step in steps.items():
        if name in FLOORS:
            continue
        try:
            agree(step(), expected)
        except AssertionError as error:
            raise AssertionError(f"{name} at depth {level.depth} of {search.case.name}: {error}") from None
