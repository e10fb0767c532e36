"""TrieIndex as Python lists and one dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import raddpo_ext.index.trie as fused
from raddpo_ext.index.trie import Lookup
from raddpo_ext.index.vocab import SIDVocab


class TrieIndex:
    """The same index as :class:`raddpo_ext.TrieIndex`, with the same node numbers.

    A node is a prefix of token ids. Nodes are numbered breadth first, children in ascending token order: prefixes are
    sorted by length, then lexicographically.

    Attributes:
        prefixes: the token ids on the way to each node; ``prefixes[0]`` is the root's, ``()``.
        node_of: the number of each prefix.
        codes: the codes on the way to each node, -1 for ``eos``.
        child_nodes: the children of each node, in ascending token order.
        node_items: the items whose SID ends at each node, in input order.
        rows: each item's path, codes and id, from which the index was built.
    """

    def __init__(
        self,
        paths: Sequence[tuple[int, ...]],
        codes: Sequence[tuple[int, ...]],
        item_ids: Sequence[int],
        sid_levels: int,
        vocab: SIDVocab | None,
        device: torch.device,
    ) -> None:
        self.rows = list(zip(paths, codes, item_ids, strict=True))
        # Every prefix of a path is a node.
        known: dict[tuple[int, ...], tuple[int, ...]] = {(): ()} | {
            path[:depth]: sid[:depth] for path, sid in zip(paths, codes, strict=True) for depth in range(len(path) + 1)
        }
        self.prefixes = sorted(known, key=lambda prefix: (len(prefix), prefix))
        self.node_of = {prefix: node for node, prefix in enumerate(self.prefixes)}
        self.codes = [known[prefix] for prefix in self.prefixes]
        # Nodes come in the order of their numbers, so children are in ascending token order.
        self.child_nodes: list[list[int]] = [[] for _ in self.prefixes]
        for node, prefix in enumerate(self.prefixes[1:], 1):
            self.child_nodes[self.node_of[prefix[:-1]]].append(node)
        # Items belong to leaves.
        self.node_items: list[list[int]] = [[] for _ in self.prefixes]
        for path, item in zip(paths, item_ids, strict=True):
            if self.child_nodes[self.node_of[path]]:
                raise ValueError(f"SID {path} is a proper prefix of another; a vocab with eos tells them apart")
            self.node_items[self.node_of[path]].append(item)
        self.items = torch.tensor([item for items in self.node_items for item in items], device=device)
        self.vocab = vocab
        self.device = device
        self.sid_levels = sid_levels
        self.levels = max(1, len(self.prefixes[-1]))
        self.num_items = len(paths)
        self.num_sids = sum(bool(items) for items in self.node_items)
        self.num_nodes = len(self.prefixes)

    @classmethod
    def build(cls, sids: Any, *, item_ids: Any = None, lengths: Any = None, vocab: SIDVocab | None = None) -> TrieIndex:
        """See :meth:`raddpo_ext.TrieIndex.build`."""
        codes = torch.as_tensor(sids).long()
        rows, columns = codes.shape
        ends = torch.full((rows,), columns) if lengths is None else torch.as_tensor(lengths).long()
        tokens = codes if vocab is None else vocab.encode(codes, ends)
        eos = (-1,) if vocab is not None and vocab.eos is not None else ()
        return cls(
            paths=[tuple(row[: end + len(eos)]) for row, end in zip(tokens.tolist(), ends.tolist(), strict=True)],
            codes=[tuple(row[:end]) + eos for row, end in zip(codes.tolist(), ends.tolist(), strict=True)],
            item_ids=range(rows) if item_ids is None else torch.as_tensor(item_ids).tolist(),
            sid_levels=columns,
            vocab=vocab,
            device=codes.device,
        )

    @classmethod
    def of(cls, index: TrieIndex | fused.TrieIndex) -> TrieIndex:
        """``index`` itself, or the plain copy of a fused one. Its live nodes get numbers without gaps."""
        if isinstance(index, TrieIndex):
            return index
        nodes = torch.arange(index.node_bound, device=index.device)
        codes, depths = index.paths(nodes)
        leaves = torch.repeat_interleave(nodes, index.item_ranges(nodes)[1])
        eos = index.vocab is not None and index.vocab.eos is not None
        return cls.build(codes[leaves], item_ids=index.items, lengths=depths[leaves] - int(eos), vocab=index.vocab)

    def restrict(self, item_mask: Any) -> TrieIndex:
        """See :meth:`raddpo_ext.TrieIndex.restrict`; builds a new index, whose nodes have new numbers."""
        mask = torch.as_tensor(item_mask)
        allowed = set((mask.nonzero()[:, 0] if mask.dtype == torch.bool else mask).tolist())
        return self._of_rows([row for row in self.rows if row[2] in allowed])

    def discard(self, item_ids: Any) -> TrieIndex:
        """See :meth:`raddpo_ext.TrieIndex.discard`; builds a new index."""
        gone = set(torch.as_tensor(item_ids).tolist())
        return self._of_rows([row for row in self.rows if row[2] not in gone])

    def add(self, sids: Any, *, item_ids: Any, lengths: Any = None) -> TrieIndex:
        """See :meth:`raddpo_ext.TrieIndex.add`; builds a new index."""
        return self._of_rows(self.rows + self.build(sids, item_ids=item_ids, lengths=lengths, vocab=self.vocab).rows)

    def _of_rows(self, rows: list[tuple[tuple[int, ...], tuple[int, ...], int]]) -> TrieIndex:
        paths, codes, items = zip(*rows, strict=True) if rows else ((), (), ())
        return TrieIndex(paths, codes, items, self.sid_levels, self.vocab, self.device)

    def contains(self, sids: Any, lengths: Any = None) -> Tensor:
        """See :meth:`raddpo_ext.TrieIndex.contains`."""
        return self.lookup(sids, lengths).offsets.diff() > 0

    def lookup(self, sids: Any, lengths: Any = None) -> Lookup:
        """See :meth:`raddpo_ext.TrieIndex.lookup`."""
        codes = torch.as_tensor(sids).long()
        ends = [codes.shape[1]] * len(codes) if lengths is None else torch.as_tensor(lengths).tolist()
        eos = (-1,) if self.vocab is not None and self.vocab.eos is not None else ()
        items_of = {sid: items for sid, items in zip(self.codes, self.node_items, strict=True) if items}
        found = [items_of.get((*row[:end], *eos), []) for row, end in zip(codes.tolist(), ends, strict=True)]
        offsets = torch.tensor([0, *map(len, found)], device=self.device).cumsum(0)
        return Lookup(torch.tensor([i for items in found for i in items], dtype=torch.int64).to(self.device), offsets)

    def nodes(self, tokens: Tensor) -> Tensor:
        """See :meth:`raddpo_ext.TrieIndex.nodes`."""
        rows = [[self.node_of.get(tuple(row[:i]), -1) for i in range(len(row))] for row in tokens.tolist()]
        return torch.tensor(rows, dtype=torch.int64, device=self.device).view(tokens.shape)

    def children(self, prefix: Sequence[int]) -> Tensor:
        """See :meth:`raddpo_ext.TrieIndex.children`."""
        node = {sid: node for node, sid in enumerate(self.codes)}.get(tuple(prefix))
        codes = [] if node is None else [self.codes[child][-1] for child in self.child_nodes[node]]
        return torch.tensor(codes, dtype=torch.int64, device=self.device)

    def paths(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`raddpo_ext.TrieIndex.paths`."""
        codes = torch.full((nodes.numel(), self.sid_levels), -1, dtype=torch.int64)
        depths = torch.full((nodes.numel(),), -1)
        for row, node in enumerate(nodes.flatten().tolist()):
            if 0 <= node < self.num_nodes:
                sid = self.codes[node][: self.sid_levels]
                codes[row, : len(sid)] = torch.tensor(sid, dtype=torch.int64)
                depths[row] = len(self.codes[node])
        return codes.view(*nodes.shape, -1).to(nodes.device), depths.view(nodes.shape).to(nodes.device)

    def item_ranges(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`raddpo_ext.TrieIndex.item_ranges`."""
        counts = torch.tensor([len(items) for items in self.node_items], device=nodes.device)
        first = counts.cumsum(0) - counts
        on_trie = (nodes >= 0) & (nodes < self.num_nodes)
        at = torch.where(on_trie, nodes, 0)
        return torch.where(on_trie, first[at], 0), torch.where(on_trie, counts[at], 0)
