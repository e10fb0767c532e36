"""A changing catalogue: which rows of one are left, and what it means for an index to hold just these."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

import raddpo_ext as rx

from .agreement import ToyModel
from .strategies import Catalogue


def part_of(catalogue: Catalogue, rows: list[int]) -> Catalogue:
    """Some rows of it, in this order; their item ids stay."""
    return dataclasses.replace(
        catalogue,
        sids=catalogue.sids[rows],
        lengths=None if catalogue.lengths is None else catalogue.lengths[rows],
        item_ids=np.array(catalogue.items(), np.int64)[rows],
    )


def assert_holds(index: rx.TrieIndex, catalogue: Catalogue, rows: list[int], seed: int) -> None:
    """The index behaves as one built from these rows of the catalogue, node numbers apart."""
    if not rows:
        return assert_empty(index, catalogue)
    built = rx.TrieIndex.build(**part_of(catalogue, rows).arguments())
    for name in ("num_items", "num_sids", "num_nodes", "sid_levels"):
        assert getattr(index, name) == getattr(built, name), name
    assert index.vocab == built.vocab
    assert index.items.tolist() == built.items.tolist()
    assert index.items_at(torch.arange(index.num_items)).tolist() == built.items.tolist()
    assert index.node_tokens.tolist() == built.node_tokens.tolist()
    nodes = torch.arange(built.num_nodes)
    numbers = index.nodes_at(nodes)
    assert numbers.tolist() == sorted(set(numbers.tolist()))
    for method in ("paths", "item_ranges", "child_ranges"):
        for mine, theirs in zip(getattr(index, method)(numbers), getattr(built, method)(nodes), strict=True):
            assert mine.tolist() == theirs.tolist(), method
    for mine, theirs in zip(index.top_items(numbers[None], 9), built.top_items(nodes[None], 9), strict=True):
        assert mine.tolist() == theirs.tolist()
    assert index.depths(numbers).tolist() == built.depths(nodes).tolist()
    gone = torch.tensor(sorted(set(range(-2, index.node_bound + 2)) - set(numbers.tolist())))
    assert set(index.paths(gone)[1].tolist()) <= {-1}
    for method in ("item_ranges", "child_ranges"):
        assert all(set(part.tolist()) <= {0} for part in getattr(index, method)(gone))
    assert all(set(part.flatten().tolist()) <= {-1} for part in index.top_items(gone[None], 2))

    sids, ends = catalogue.sids.astype(np.int64), catalogue.ends()
    for mine, theirs in zip(index.lookup(sids, ends), built.lookup(sids, ends), strict=True):
        assert mine.tolist() == theirs.tolist()
    assert index.contains(sids, ends).tolist() == built.contains(sids, ends).tolist()
    for code in catalogue.codes()[:3]:
        for end in range(len(code) + 1):
            assert index.children(code[:end]).tolist() == built.children(code[:end]).tolist()
    tokens = tokens_of(catalogue)
    theirs = built.nodes(tokens)
    assert index.nodes(tokens).tolist() == torch.where(theirs < 0, -1, numbers[theirs.clamp(min=0)]).tolist()
    assert index._compact().tobytes() == built.data.numpy().tobytes()
    assert_same_search(index, built, catalogue, seed)


def tokens_of(catalogue: Catalogue) -> torch.Tensor:
    """Every row's token ids, padded with -1."""
    paths = catalogue.tokens()
    tokens = torch.full((len(paths), max(map(len, paths)) + 1), -1)
    for row, path in enumerate(paths):
        tokens[row, : len(path)] = torch.tensor(path)
    return tokens


def assert_same_search(index: rx.TrieIndex, built: rx.TrieIndex, catalogue: Catalogue, seed: int) -> None:
    """To the bit, for every support, type of logits, tie and top_k; from logits, and from states and a head."""
    generator = torch.Generator().manual_seed(seed)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    make = (ToyModel.random, ToyModel.tied)[seed // 3 % 2]
    width = (1, 3, 1000)[seed // 6 % 3]
    options: dict[str, Any] = {"batch_size": 2, "beam_width": width, "top_k": (None, 5)[seed // 18 % 2]}
    options["length_penalty"] = (0.0, 0.7)[seed // 36 % 2]
    options["return_token_logps"] = True
    tables = make(index.levels, 2, catalogue.columns, dtype, seed).tables
    hidden = torch.randn(index.levels, 2, 17, 4, generator=generator).to(dtype)
    weight = torch.randn(catalogue.columns, 4, generator=generator).to(dtype)
    for normalize in ("vocab", "trie", *(("level",) if index.vocab is not None else ())):
        for values, head in ((tables, None), (hidden, weight)):
            results = [
                rx.beam_search(ToyModel(values), trie, normalize=normalize, weight=head, **options)
                for trie in (index, built)
            ]
            for mine, theirs in zip(*results, strict=True):
                assert mine.tolist() == theirs.tolist(), normalize


def assert_empty(index: rx.TrieIndex, catalogue: Catalogue) -> None:
    assert (index.num_items, index.num_sids, index.num_nodes) == (0, 0, 1)
    assert index.items.tolist() == index.children([]).tolist() == []
    assert not index.contains(catalogue.sids.astype(np.int64), catalogue.ends()).any()
    assert (index.nodes(tokens_of(catalogue))[:, 1:] == -1).all()
    assert index.node_tokens.tolist() == [-1]
    for normalize in ("vocab", "trie"):
        for top_k in (None, 4):
            got = rx.beam_search(
                lambda tokens, parents, level: torch.zeros(*tokens.shape, catalogue.columns),
                index,
                batch_size=2,
                beam_width=3,
                normalize=normalize,
                top_k=top_k,
            )
            rows = 3 if top_k is None else top_k
            assert got.items.tolist() == [[-1] * rows] * 2
            assert got.scores.tolist() == [[-torch.inf] * rows] * 2
            assert (got.sids == -1).all()
