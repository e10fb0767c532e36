"""TrieIndex: the catalogue's semantic IDs (SIDs) as an immutable prefix tree that the decoder walks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raddpo_ext import _C, _check
from raddpo_ext._files import replacing
from raddpo_ext.index import trie_ops as _trie_ops  # noqa: F401  their fake kernels
from raddpo_ext.index.item_ids import UnknownItem
from raddpo_ext.index.trie_file import mapped_block
from raddpo_ext.index.trie_input import built_block, item_ids_of
from raddpo_ext.index.trie_items import places_of
from raddpo_ext.index.vocab import SIDVocab

_WORD = _C.HEADER


class Lookup(NamedTuple):
    """The result of :meth:`TrieIndex.lookup`: the items of row ``i`` are ``items[offsets[i]:offsets[i + 1]]``."""

    items: Tensor
    offsets: Tensor


_SMALL_VOCAB = 2**20  # codes: 60 MB


class TrieIndex:
    """Immutable index of a catalogue, made by :meth:`build` or :meth:`load`.

    It is one block of bytes, the same in memory, in a file and on a GPU: nodes numbered breadth first (root 0), their
    shape as two bit sequences, one 16- or 32-bit symbol per node, and the item ids (``csrc/trie_index/trie.h``). It
    takes about 21 bytes per item for a million 8-level SIDs, 9 for 3 levels.

    With ``vocab.eos`` every SID ends in that token, so a SID may be a prefix of another one: the node of the prefix has
    the end-of-sequence token as a child. Leaves are whole SIDs, and a leaf may hold several items.

    :meth:`restrict` and :meth:`discard` share the block and add one bit per node and one per item: whether it is left.
    Such an index behaves like one built from the items that are left, with the same vocab, except that nodes keep their
    numbers (``num_nodes`` of the numbers below ``node_bound`` are left), and ``levels`` and ``max_tokens`` are those of
    the whole block.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [0, 2], [0, 2]], item_ids=[7, 8, 9])
        >>> index.lookup([[0, 2]]).items
        tensor([8, 9])
        >>> index.children([0])
        tensor([1, 2])
        >>> index.restrict([7, 9]).items.tolist(), index.discard([8]).sids_of([9]).tolist()
        ([7, 9], [[0, 2]])
    """

    def __init__(self, data: Tensor, header: Tensor) -> None:
        self.data = data  # uint8, on the index's device
        self.header = header  # the first words of the data as int64, on the CPU
        self.live: Tensor | None = None  # uint8, on the data's device: which nodes and items are left; None: all
        self.block: tuple[Tensor, Tensor, Tensor | None] = (data, header, None)  # in the form that operators take
        self._host = data if data.device.type == "cpu" else None  # the block on the CPU, for restrict, discard and add
        self._node_tokens: Tensor | None = None
        self._left_items: Tensor | None = None
        self.num_items = self._word("num_items")
        self.num_sids = self._word("num_sids")
        self.num_nodes = self._word("num_nodes")
        #: One more than the largest node number.
        self.node_bound = self.num_nodes
        #: Tokens of the longest SID with its end-of-sequence token: the steps of a search.
        self.levels = self._word("levels")
        #: Number of columns of SIDs, without the end-of-sequence token.
        self.sid_levels = self._word("sid_levels")
        #: Maximum number of tokens of a SID with these columns.
        self.most_levels = self.sid_levels + (self._word("eos") >= 0)
        #: Whether all SIDs have ``levels`` tokens.
        self.fixed_length = self.num_nodes - self._word("first_node", self.levels) == self.num_sids
        #: Largest token id of each level.
        self.max_tokens = [self._word("max_token", level) for level in range(self.levels)]
        #: Number of token ids of each level: its codes with a token, and the end-of-sequence token where it can follow.
        self.num_symbols = [self._word("num_symbols", level) for level in range(self.levels)]
        #: Mean number of children of a prefix, of each level.
        first = [self._word("first_node", depth) for depth in range(self.levels + 2)]
        self.mean_children = [
            (first[d + 2] - first[d + 1]) / max(1, first[d + 1] - first[d]) for d in range(self.levels)
        ]
        # Where each level's token ids begin in the block or, if they are consecutive, the first token id.
        tables = [self._word("table", level) for level in range(self.levels)]
        self._token_tables = [None if table < 0 else self._word("tokens") + 4 * table for table in tables]
        self._first_tokens = [self._word("first_token", level) for level in range(self.levels)]
        codes = sum(self._word("sizes", level) for level in range(self.sid_levels))
        has_small_vocab = self._word("has_vocab") and codes <= _SMALL_VOCAB
        self._vocab: SIDVocab | None = self._make_vocab() if has_small_vocab else None
        # The first node of each depth from 1 on, on the data's device, because a copy per call would synchronise.
        self._first_nodes = torch.tensor(first[1 : self.levels + 1], dtype=torch.int64, device=data.device)

    @classmethod
    def build(
        cls,
        sids: Any,
        *,
        item_ids: Any = None,
        lengths: Any = None,
        vocab: SIDVocab | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> TrieIndex:
        """Build the index from unsorted SIDs, on ``torch.get_num_threads()`` threads. Ctrl-C stops it.

        Args:
            sids: codes ``[N, L]`` of any integer type, numpy or torch. Codes beyond a SID's length are ignored.
            item_ids: integers ``[N]``, distinct and ``>= 0``; default the row numbers. Stored in 32 bits if they
                fit, else in 64. Several items may share a SID; they keep their input order.
            lengths: integers ``[N]`` in ``[1, L]``; default all ``L``.
            vocab: token ids of the codes. Without a vocab, a code is its own token id.
            progress: called now and then with the fraction done, from 0 to 1.

        Raises:
            ValueError: there are no SIDs, a code is outside its level or has no token, an item id repeats or is
                negative, a length is out of range, there are more than 32 levels, or, without ``vocab.eos``, a SID is a
                proper prefix of another one.
            TypeError: an argument does not hold integers.
        """
        data = built_block(sids, item_ids, lengths, vocab, progress)
        return cls(data, _header_of(data))

    @property
    def vocab(self) -> SIDVocab | None:
        """The vocab that the index was built with, or None.

        A large one is made on first use, because a small file may name 2**24 codes.
        """
        if self._vocab is None and self._word("has_vocab"):
            self._vocab = self._make_vocab()
        return self._vocab

    @property
    def eos(self) -> int | None:
        """The token that ends every SID, or None. Equals ``vocab.eos``, without making the vocab."""
        eos = self._word("eos")
        return None if eos < 0 else eos

    @property
    def nbytes(self) -> int:
        """Bytes of the whole index, with its header."""
        return self.data.numel() + (0 if self.live is None else self.live.numel())

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> TrieIndex:
        """The same index on another device. It keeps the block on the CPU for restrict, discard and add."""
        live = None if self.live is None else self.live.to(device)
        return self._but(
            data=self.data.to(device),
            live=live,
            _first_nodes=self._first_nodes.to(device),
            _node_tokens=None,
            _left_items=None,
        )

    def restrict(self, item_mask: Any) -> TrieIndex:
        """An index of the allowed items only, for the filter of a request.

        It shares the block, and a search in it is exact under the filter. ``restrict(a).restrict(b)`` allows the items
        that both allow. It may be empty: a search then gives empty rows.

        Args:
            item_mask: bool ``[M]`` by item id, ``M`` above the largest id of the index; or the allowed ids, integers
                ``[K]``. Ids that the index lacks are ignored. Torch or numpy.

        Raises:
            ValueError: the mask is too short (names an item beyond it), or an id is negative.
            TypeError: the argument holds neither bools nor integers.
        """
        kind = item_mask.dtype if isinstance(item_mask, (Tensor, np.ndarray)) else None
        if kind not in (torch.bool, np.dtype(bool)):
            return self._left(ids=item_ids_of(item_mask, "item_mask", least=0), keep=True)
        mask = item_mask.detach().cpu().numpy() if isinstance(item_mask, Tensor) else item_mask
        if mask.ndim != 1:
            raise ValueError(f"item_mask must have 1 dimensions, got shape {mask.shape}")
        return self._left(mask=np.ascontiguousarray(mask), keep=True)

    def discard(self, item_ids: Any) -> TrieIndex:
        """An index without some items. It shares the block, as :meth:`restrict` does.

        Args:
            item_ids: integers ``[K]``.

        Raises:
            ValueError: the index lacks an id.
            TypeError: the ids are not integers.
        """
        ids = item_ids_of(item_ids, "item_ids")
        if len(ids) and ids.min() < 0:
            raise ValueError(f"item_ids hold {ids.min()}, which is no item of the index")
        return self._left(ids=ids, keep=False)

    def add(self, sids: Any, *, item_ids: Any = None, lengths: Any = None) -> TrieIndex:
        """A new index with more items. It has the same bytes as one built from the items that are left and these.

        Args:
            sids, lengths: as in :meth:`build`, with codes of the same vocab.
            item_ids: as in :meth:`build`; default the numbers after the largest id.

        Raises:
            ValueError: as in :meth:`build`; also if the number of columns differs, or the index already has an id.
            TypeError: an argument does not hold integers.
        """
        codes = _check.integer_array(sids, "sids", 2)
        if codes.shape[1] != self.sid_levels:
            raise ValueError(f"sids must have {self.sid_levels} columns, as the index has, got shape {codes.shape}")
        if item_ids is None:
            first = int(self.items.max()) + 1 if self.num_items else 0
            if first + len(codes) > 2**63:
                raise ValueError(f"item_ids must be given: few ids are left above the largest, {first - 1}")
            item_ids = first + np.arange(len(codes))
        # The items that are left and the new ones are merged as two sorted blocks.
        if not len(codes):
            return self
        added = TrieIndex.build(codes, item_ids=item_ids, lengths=lengths, vocab=self.vocab)
        if not self.num_items:
            return added.to(self.device)
        kept = self._compact()
        known = _C.trie_first_known(kept, added.items.long().numpy(), torch.get_num_threads())
        if known >= 0:
            raise ValueError(f"item_ids hold {known}, which is an item of the index already")
        data = torch.from_numpy(_C.trie_merge(kept, added.data.numpy(), torch.get_num_threads()))
        return TrieIndex(data, _header_of(data)).to(self.device)

    def _left(self, *, keep: bool, ids: np.ndarray | None = None, mask: np.ndarray | None = None) -> TrieIndex:
        before = None if self.live is None else self.live.cpu().numpy()
        live, items, sids, nodes, deepest = _C.trie_live(
            self._host_data().numpy(), before, ids, mask, keep, torch.get_num_threads()
        )
        return self._but(
            live=torch.from_numpy(live).to(self.device),
            num_items=items,
            num_sids=sids,
            num_nodes=nodes,
            fixed_length=deepest == sids,
            _host=self._host,
            _node_tokens=None,
            _left_items=None,
        )

    def with_live(self, live: Tensor) -> TrieIndex:
        """This filtered index with the bits of another one, or with a buffer of such bits that a captured search reads.

        Nodes and items of a search are right then, but counts such as ``num_items`` are not.
        """
        return self._but(live=live, _node_tokens=None, _left_items=None)

    def _but(self, **changes: Any) -> TrieIndex:
        index = copy.copy(self)
        vars(index).update(changes)
        index.block = (index.data, index.header, index.live)
        return index

    def _host_data(self) -> Tensor:
        if self._host is None:
            self._host = self.data.cpu()
        return self._host

    def _compact(self) -> np.ndarray:
        """The block of the items that are left, without gaps."""
        data = self._host_data().numpy()
        if self.live is None:
            return data
        return _C.trie_compact(data, self.live.cpu().numpy(), self.num_sids, torch.get_num_threads())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the items that are left to one file, atomically: a reader sees the old file or the whole new one.

        Raises:
            ValueError: no items are left.
        """
        if not self.num_items:
            raise ValueError(f"{os.fspath(path)}: an index without items cannot be saved")
        data = self._compact()
        with replacing(Path(path)) as file:
            file.write(data.data)  # numpy's tofile hides the cause of an error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrieIndex:
        """Map a saved index into memory. Processes that load the same file share its pages.

        The file may have any origin: it loads only if :meth:`build` and :meth:`save` would write the same bytes. Every
        header word, bit, symbol and item id is checked, which takes about 0.1 s for 10 million 8-level SIDs, and a
        few times that if item ids are sparse. Later writes into the file cannot be checked: if ``cp NEW FILE``
        overwrites it in place, the index changes or the process dies during a search. Replace a file as :meth:`save`
        and ``mv`` do: they make a new file of the same name, and processes that have the old one keep it.

        Raises:
            ValueError: the file is not an index, is not a regular file, is of another version, or is truncated, altered
                or malformed; names the file and the problem.
            OSError: the file cannot be opened or mapped.
            MemoryError: there is too little memory to check the file.
        """
        data = torch.frombuffer(mapped_block(path, torch.get_num_threads()), dtype=torch.uint8)
        return cls(data, _header_of(data))

    def contains(self, sids: Any, lengths: Any = None) -> Tensor:
        """Whether the index has each SID: bool ``[N]`` for ``sids`` ``[N, L]``. Arguments: as for :meth:`lookup`."""
        _, count = self._items(self._leaves(sids, lengths))
        return count > 0

    def lookup(self, sids: Any, lengths: Any = None) -> Lookup:
        """Find the items of each SID.

        Args:
            sids: integer codes ``[N, L]``. Codes beyond a SID's length are ignored. A SID that the index lacks has no
                items and is not an error.
            lengths: integer ``[N]`` in ``[0, L]``; default all ``L``.

        Returns:
            ``(items, offsets)``: int64 item ids in input order and int64 ``[N + 1]`` offsets into them.
        """
        first, count = self._items(self._leaves(sids, lengths))
        offsets = torch.zeros(len(count) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(count, 0, out=offsets[1:])
        places = torch.repeat_interleave(first - offsets[:-1], count)
        places += torch.arange(len(places), device=self.device)
        return Lookup(self.items_at(places), offsets)

    def sids_of(self, item_ids: Any) -> Tensor:
        """The SID of each item, the inverse of :meth:`lookup`. Every call passes once over all items of the index.

        Args:
            item_ids: integers ``[K]``, in any order, with repeats.

        Returns:
            int64 codes ``[K, sid_levels]``, -1 beyond a shorter SID's length; on the index's device.

        Raises:
            ValueError: the index lacks an id; names it.
            TypeError: the ids are not integers.
        """
        ids = torch.from_numpy(item_ids_of(item_ids, "item_ids"))
        places = places_of(ids, self.items)
        if bool((places < 0).any()):
            position = int((places < 0).nonzero()[0, 0])
            raise UnknownItem(f"item_ids[{position}]", int(ids[position]), position)
        return self.paths(self._leaves_at(places))[0]

    def nodes(self, tokens: Tensor) -> Tensor:
        """The node before each token: int64 ``[C, L]`` for token ids ``[C, L]``, -1 after a prefix that no SID has.

        ``nodes[:, 0]`` is the root. After padding, or any other token that is not a child, nodes are -1.
        """
        return self._walk(tokens)[:, :-1]

    def children(self, prefix: Sequence[int]) -> Tensor:
        """The codes that can follow a prefix of codes, int64, in the order of their token ids; -1 stands for ``eos``.

        The result is empty for a whole SID and for a prefix that no SID has.
        """
        codes = torch.tensor([[*map(int, prefix)]], dtype=torch.int64, device=self.device).reshape(1, -1)
        depth = codes.shape[1]
        if depth >= self.levels:
            return codes.new_empty(0)
        tokens = self._tokens(codes, codes.new_full((1,), depth))[:, :depth]
        node = self._walk(tokens)[0, -1:]
        first, count = (int(x) for x in self.child_ranges(node))
        if depth == self.sid_levels:  # the only child is the end-of-sequence token
            return codes.new_full((count,), -1)
        return self.paths(self.nodes_at(torch.arange(first, first + count, device=self.device)))[0][:, depth]

    def paths(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The codes on the path to each node, and its depth in tokens.

        Args:
            nodes: int64, any shape ``[...]``.

        Returns:
            int64 codes ``[..., sid_levels]`` padded with -1 (also for ``eos``), and int64 depths ``[...]``; -1 for a
            number that is not a node.
        """
        self._check_nodes(nodes)
        codes, depths = torch.ops.raddpo.trie_paths(nodes.contiguous(), *self.block, self.sid_levels)
        return codes.view(*nodes.shape, self.sid_levels), depths.view(nodes.shape)

    def depths(self, nodes: Tensor) -> Tensor:
        """The depth of each node in tokens, int64, in the shape of ``nodes``; 0 for the root."""
        return torch.bucketize(nodes.contiguous(), self._first_nodes.to(nodes.device), right=True)

    def item_ranges(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Where each node's items begin in :attr:`items`, and their number: int64, in the shape of ``nodes``."""
        first, count = self._items(nodes)
        return first.view(nodes.shape), count.view(nodes.shape)

    def top_items(self, nodes: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The first ``top_k`` items of each row of ``nodes`` ``[B, W]``, node after node, and the column of the node
        that has each: int64 ``[B, top_k]``, both -1 where a row has no more."""
        self._check_nodes(nodes)
        return torch.ops.raddpo.trie_top_items(nodes.contiguous(), *self.block, top_k)

    def child_ranges(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Where each node's children begin among all nodes that are left, and their number: int64, shaped as ``nodes``.

        Places among the nodes that are left are those of :meth:`nodes_at` and :attr:`node_tokens`. In an index that is
        not restricted, the place is the number of the first child.
        """
        self._check_nodes(nodes)
        first, count = torch.ops.raddpo.trie_children(nodes.contiguous(), *self.block)
        return first.view(nodes.shape), count.view(nodes.shape)

    def level_tokens(self, level: int) -> Tensor | slice:
        """The token ids of a level, ascending: int64 ``[num_symbols]``, or a slice if they are consecutive."""
        start, first, count = self._token_tables[level], self._first_tokens[level], self.num_symbols[level]
        if start is None:
            return slice(first, first + count)
        return self.data[start : start + 4 * count].view(torch.int32).long()

    def nodes_at(self, places: Tensor) -> Tensor:
        """The nodes at these places, int64 ``[K]``, among all nodes that are left, which are in ascending order."""
        return places if self.live is None else torch.ops.raddpo.trie_select(places.contiguous(), *self.block, False)

    def items_at(self, places: Tensor) -> Tensor:
        """``items[places]`` as int64, for places of any shape, without materialising :attr:`items`."""
        items = self._all_items()
        if self.live is None:
            return items[places].long()
        numbers = torch.ops.raddpo.trie_select(places.contiguous(), *self.block, True)
        return items[numbers].long().view(places.shape)

    @property
    def has_node_tokens(self) -> bool:
        return self._node_tokens is not None

    @property
    def node_tokens(self) -> Tensor:
        """Token id on the edge into each node that is left, int32 ``[num_nodes]``, -1 for the root.

        It is made on first use and cached.
        """
        if self._node_tokens is None:
            tokens = self._all_node_tokens()
            if self.live is not None:
                tokens = tokens[self.nodes_at(torch.arange(self.num_nodes, device=self.device))]
            self._node_tokens = tokens
        return self._node_tokens

    @property
    def items(self) -> Tensor:
        """All item ids, leaf by leaf, int32 or int64 ``[num_items]``. A restricted index makes them on first use."""
        if self.live is None:
            return self._all_items()
        if self._left_items is None:
            places = torch.arange(self.num_items, device=self.device)
            self._left_items = self._all_items()[torch.ops.raddpo.trie_select(places, *self.block, True)]
        return self._left_items

    def _all_items(self) -> Tensor:
        """All item ids of the block, left or not."""
        size = self._word("item_bytes")
        begin = self._word("items")
        items = self.data[begin : begin + size * self._word("num_items")]
        return items.view(torch.int32 if size == 4 else torch.int64)

    def _all_node_tokens(self) -> Tensor:
        size = 4 if self._word("wide") else 2
        begin = self._word("symbols")
        symbols = self.data[begin : begin + size * self.node_bound].view(torch.uint32 if size == 4 else torch.uint16)
        tokens = torch.full((self.node_bound,), -1, dtype=torch.int32, device=self.device)
        for level in range(self.levels):
            nodes = slice(self._word("first_node", level + 1), self._word("first_node", level + 2))
            ranks = symbols[nodes].to(torch.int32)
            ids = self.level_tokens(level)
            tokens[nodes] = ranks + ids.start if isinstance(ids, slice) else ids[ranks].int()
        return tokens

    def _check_nodes(self, nodes: Tensor) -> None:
        _check.int64_tensor(nodes, "nodes")
        if nodes.device != self.device:
            raise ValueError(f"nodes must be on the index's device, {self.device}, got {nodes.device}")

    def _items(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        self._check_nodes(nodes)
        return torch.ops.raddpo.trie_items(nodes.contiguous(), *self.block)

    def _walk(self, tokens: Tensor) -> Tensor:
        tokens = _check.integer_tensor(tokens, "tokens", 2).to(self.device).contiguous()
        return torch.ops.raddpo.trie_walk(tokens, *self.block)

    def _leaves(self, sids: Any, lengths: Any) -> Tensor:
        """The node at the end of each SID; -1 for a SID that the trie lacks."""
        codes = _check.integer_tensor(sids, "sids", 2).to(self.device)
        rows, columns = codes.shape
        if lengths is None:
            ends = torch.full((rows,), columns, device=self.device)
        else:
            ends = _check.lengths(lengths, rows, 0, columns).to(self.device)
        tokens = self._tokens(codes, ends)
        last = ends + (tokens.shape[1] - columns)
        return self._walk(tokens).gather(1, last[:, None])[:, 0]

    def _leaves_at(self, places: Tensor) -> Tensor:
        """The leaf of each item, by bisection: the last node whose items begin at or before the item's place."""
        low = torch.zeros_like(places)
        high = torch.full_like(places, self.num_nodes)
        while bool((high - low > 1).any()):
            middle = (low + high) // 2
            begins = self.item_ranges(self.nodes_at(middle))[0] <= places
            low, high = torch.where(begins, middle, low), torch.where(begins, high, middle)
        return self.nodes_at(low)

    def _tokens(self, codes: Tensor, ends: Tensor) -> Tensor:
        if self.vocab is not None:
            return self.vocab.lookup(codes, ends)
        return torch.where(torch.arange(codes.shape[1], device=codes.device) < ends[:, None], codes, -1)

    def _word(self, name: str, offset: int = 0) -> int:
        return int(self.header[_WORD[name] + offset])

    def _make_vocab(self) -> SIDVocab:
        """The vocab, made from the block's tables of token ids."""
        header_bytes = self.data if self.data.device.type == "cpu" else self.data.cpu()
        token_ids = []
        for level in range(self.sid_levels):
            ids = torch.full((self._word("sizes", level),), -1, dtype=torch.int64, device="cpu")
            count, table = self._word("num_symbols", level), self._word("table", level)
            if table < 0:
                ids[:] = torch.arange(count, device="cpu") + self._word("first_token", level)
            else:
                begin = [self._word(section) + 4 * table for section in ("codes", "tokens")]
                codes, tokens = (header_bytes[b : b + 4 * count].view(torch.int32).long() for b in begin)
                ids[codes[codes >= 0]] = tokens[codes >= 0]
            token_ids.append(ids)
        return SIDVocab([len(ids) for ids in token_ids], eos=self.eos, token_ids=token_ids)

    def __repr__(self) -> str:
        return (
            f"TrieIndex(num_items={self.num_items}, num_sids={self.num_sids}, num_nodes={self.num_nodes}, "
            f"levels={self.levels}, nbytes={self.nbytes}, device='{self.device}')"
        )


def _header_of(data: Tensor) -> Tensor:
    return data[: _C.HEADER_WORDS * 8].view(torch.int64).clone()
