"""The support of a token's softmax: the whole vocabulary, its level's tokens, or its prefix's children in a trie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._choices import NORMALIZE
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab


class Lists(NamedTuple):
    """Ragged lists of columns: row ``r`` has ``columns[begins[r] : begins[r] + counts[r]]``, in ascending order.

    Attributes:
        columns: int32.
        begins, counts: int64, one per row.
    """

    columns: Tensor
    begins: Tensor
    counts: Tensor


class SoftmaxSupport(NamedTuple):
    """The tokens that each target competes with.

    Attributes:
        lists: token ids; ``begins`` and ``counts`` have the shape of the targets.
        groups: int64, in the shape of the targets: the level, or the depth of the prefix. Rows of a group have most of
            their columns in common. -1 where the support is empty.
        num_groups: number of groups.
        vocab: the vocabulary, if the groups are its levels; else None.
        period: size of the last dimension, if the groups are positions in it; else 0.
    """

    lists: Lists
    groups: Tensor
    num_groups: int
    vocab: SIDVocab | None
    period: int

    def flatten(self) -> SoftmaxSupport:
        """The support of ``targets.reshape(-1)``."""
        columns, begins, counts = self.lists
        lists = Lists(columns, begins.reshape(-1), counts.reshape(-1))
        return self._replace(lists=lists, groups=self.groups.reshape(-1))


def support_of(
    targets: Tensor,
    normalize: str,
    vocab: SIDVocab | None,
    levels: Tensor | None,
    index: TrieIndex | None,
    nodes: Tensor | None,
    num_columns: int,
    ignore_index: int,
    check: bool,
) -> SoftmaxSupport | None:
    """The support of each target, None for the whole vocabulary; arguments are those of :func:`token_logps`."""
    _check.choice(normalize, "normalize", NORMALIZE)
    if normalize == "vocab":
        return None
    check = _check.reads_values(targets, check)
    if normalize == "level":
        return _of_levels(targets, vocab, levels, num_columns, ignore_index, check)
    return _of_nodes(targets, index, nodes, num_columns, check)


def _of_levels(
    targets: Tensor, vocab: SIDVocab | None, levels: Tensor | None, num_columns: int, ignore_index: int, check: bool
) -> SoftmaxSupport:
    """The tokens of each target's level."""
    if vocab is None:
        raise ValueError("normalize = 'level' needs vocab")
    _check.instance(vocab, "vocab", SIDVocab)
    if vocab.max_token >= num_columns:
        raise ValueError(f"vocab has token {vocab.max_token}, beyond the {num_columns} columns of the logits")
    # The level of each target: as given, or its position in the last dimension.
    num_levels = vocab.levels + (vocab.eos is not None)
    period = 0
    if levels is None:
        if targets.dim() == 0:
            raise ValueError("levels must be given for a target without dimensions")
        period = targets.shape[-1]
        levels = torch.arange(period, device=targets.device)
    else:
        _check.int64_tensor(levels, "levels")
    if levels.device != targets.device:
        raise ValueError(f"levels must be on the device of targets, {targets.device}, got {levels.device}")
    try:
        levels = levels.expand(targets.shape)
    except RuntimeError:
        raise ValueError(
            f"levels must broadcast to the shape of targets, {tuple(targets.shape)}, got {tuple(levels.shape)}"
        ) from None
    # A level outside the vocabulary has an empty support, as no token belongs to it.
    outside = (levels < 0) | (levels >= num_levels)
    if check:
        wrong = outside & (targets != ignore_index)
        if bool(wrong.any()):
            raise ValueError(f"levels hold {int(levels[wrong][0])}, outside [0, {num_levels}), the levels of vocab")
    columns, begins, counts = vocab.level_columns(targets.device)
    known = torch.where(outside, 0, levels)
    counts = torch.where(outside, 0, counts.take(known))
    lists = Lists(columns, begins.take(known), counts)
    return SoftmaxSupport(lists, torch.where(outside, -1, levels), num_levels, vocab, period)


def _of_nodes(
    targets: Tensor, index: TrieIndex | None, nodes: Tensor | None, num_columns: int, check: bool
) -> SoftmaxSupport:
    """The children of each target's prefix."""
    if index is None or nodes is None:
        raise ValueError(f"normalize = 'trie' needs {'index' if index is None else 'nodes'}")
    _check.instance(index, "index", TrieIndex)
    _check.int64_tensor(nodes, "nodes")
    if nodes.shape != targets.shape:
        raise ValueError(f"nodes must have the shape of targets, {tuple(targets.shape)}, got {tuple(nodes.shape)}")
    if not nodes.device == targets.device == index.device:
        raise ValueError(
            f"targets, nodes and index must be on one device, got {targets.device}, {nodes.device}, {index.device}"
        )
    if max(index.max_tokens) >= num_columns:
        raise ValueError(f"index has token {max(index.max_tokens)}, beyond the {num_columns} columns of the logits")
    if check:
        wrong = (nodes < -1) | (nodes >= index.node_bound)
        if bool(wrong.any()):
            raise ValueError(f"nodes must be in [-1, {index.node_bound}), got {int(nodes[wrong][0])}")
    if torch.compiler.is_compiling() and not index.has_node_tokens:
        raise ValueError("index.node_tokens must be read once before torch.compile traces normalize = 'trie'")
    # A node without children has an empty support, and so has -1, which is no node.
    first, count = index.child_ranges(nodes)
    groups = torch.where(count > 0, index.depths(nodes), -1)
    lists = Lists(index.node_tokens, torch.where(count > 0, first, 0), count)
    return SoftmaxSupport(lists, groups, index.levels, None, 0)
