"""Fake kernels of the trie lookups, with which torch.compile traces them."""

from __future__ import annotations

import torch
from torch import Tensor

from raddpo_ext import _C


@torch.library.register_fake("raddpo::trie_check")
def _(trie: Tensor, threads: int) -> Tensor:
    return trie.new_empty(_C.HEADER_WORDS, dtype=torch.int64)


@torch.library.register_fake("raddpo::trie_walk")
def _(tokens: Tensor, trie: Tensor, header: Tensor, live: Tensor | None) -> Tensor:
    return tokens.new_empty((tokens.shape[0], tokens.shape[1] + 1))


@torch.library.register_fake("raddpo::trie_paths")
def _(nodes: Tensor, trie: Tensor, header: Tensor, live: Tensor | None, sid_levels: int) -> tuple[Tensor, Tensor]:
    return nodes.new_empty((nodes.numel(), sid_levels)), nodes.new_empty(nodes.numel())


@torch.library.register_fake("raddpo::trie_items")
def _(nodes: Tensor, trie: Tensor, header: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor]:
    return nodes.new_empty(nodes.numel()), nodes.new_empty(nodes.numel())


@torch.library.register_fake("raddpo::trie_children")
def _(nodes: Tensor, trie: Tensor, header: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor]:
    return nodes.new_empty(nodes.numel()), nodes.new_empty(nodes.numel())


@torch.library.register_fake("raddpo::trie_top_items")
def _(nodes: Tensor, trie: Tensor, header: Tensor, live: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
    return nodes.new_empty((len(nodes), top_k)), nodes.new_empty((len(nodes), top_k))


@torch.library.register_fake("raddpo::trie_select")
def _(places: Tensor, trie: Tensor, header: Tensor, live: Tensor | None, items: bool) -> Tensor:
    return places.new_empty(places.numel())
