"""Items that a person had before, as the prompt that a model reads: their SIDs one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from raddpo_ext.serve.protocol import bad_field
from raddpo_ext.trie import TrieIndex


def history_tokens(index: TrieIndex, items: list[int]) -> list[int]:
    """Token ids of the items' codes, in their order; end-of-sequence tokens are left out.

    Raises:
        ServiceError: an item is not in the catalogue.
    """
    codes, _ = index.paths(_leaves(index, _positions(index, items)))
    tokens = codes
    if index.vocab is not None:
        tokens = index.vocab.lookup(codes, (codes >= 0).sum(1))[:, : codes.shape[1]]
    return tokens[codes >= 0].tolist()


def _positions(index: TrieIndex, items: list[int]) -> Tensor:
    """Where each item stands in ``index.items``: one pass over it, whatever the history's length."""
    wanted, order = torch.tensor(items, device=index.device).unique(return_inverse=True)
    possible = wanted[wanted <= torch.iinfo(index.items.dtype).max].to(index.items.dtype)
    there = torch.isin(index.items, possible).nonzero()[:, 0]
    found = index.items[there].long()
    if len(found) < len(wanted):
        known = set(found.tolist())
        position = next(i for i, item in enumerate(items) if item not in known)
        raise bad_field(f"history[{position}]", f"must be an item of the catalogue, got {items[position]}")
    return there[found.argsort()][order]


def _leaves(index: TrieIndex, positions: Tensor) -> Tensor:
    """The node that holds each position: the last whose items begin at or before it, by bisection of their places."""
    low = torch.zeros_like(positions)
    high = torch.full_like(positions, index.num_nodes)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        begins = index.item_ranges(index.nodes_at(middle))[0] <= positions
        low, high = torch.where(begins, middle, low), torch.where(begins, high, middle)
    return index.nodes_at(low)
