"""TrieIndex.load on any bytes; an index that loads is one that ``build`` gives, and everything can be done with it."""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch

import raddpo_ext as rx
from fuzz.scratch import FOLDER, names
from raddpo_ext import _C

_HEADER_BYTES = 8 * _C.HEADER_WORDS
_SECTIONS = ("symbols", "child_bits", "child_ranks", "child_hints", "item_bits", "item_ranks", "item_hints", "items")
_FEW_TOKENS = 5000  # as many logits a beam


def run(data: bytes) -> None:
    path = FOLDER / "shop.trie"
    path.write_bytes(signed(data))
    try:
        index = rx.TrieIndex.load(path)
    except ValueError as error:
        return names(error, path)
    check_usable(index)


def signed(data: bytes) -> bytes:
    """With the magic, version, size and checksum that let the rest be looked at."""
    if len(data) < _HEADER_BYTES:
        return data
    content = np.frombuffer(data, np.uint8).copy()
    content[:8] = np.frombuffer(b"RADTRIE\0", np.uint8)
    words = content[:_HEADER_BYTES].view(np.uint64)
    words[_C.HEADER["version"]] = _C.FORMAT_VERSION
    words[_C.HEADER["bytes"]] = len(data)
    words[_C.HEADER["checksum"]] = _C.trie_checksum(content)
    return content.tobytes()


def check_usable(index: rx.TrieIndex) -> None:
    nodes = torch.arange(index.num_nodes)
    first, count = index.item_ranges(nodes)
    leaves = nodes.repeat_interleave(count)
    sids, depths = index.paths(leaves)
    lengths = depths - int(index.vocab is not None and index.vocab.eos is not None)
    assert torch.equal(first[leaves].unique(), first[count > 0])
    items = index.items
    distinct = items.unique()
    if len(distinct) < len(items):  # which is not looked for where ids are sparse
        assert int(items.max()) >= 16 * len(items)
        return
    built = rx.TrieIndex.build(sids, lengths=lengths, item_ids=items, vocab=index.vocab)
    assert torch.equal(built.data, index.data)

    found, offsets = index.lookup(sids, lengths)
    shared = found.tolist()
    bounds = itertools.pairwise(offsets.tolist())
    assert all(item in shared[begin:end] for item, (begin, end) in zip(items.tolist(), bounds, strict=True))
    half = distinct[::2]
    kept = index.restrict(half)
    assert sorted(kept.items.tolist()) == half.tolist()
    if len(distinct) > 1:
        assert torch.equal(index.discard(distinct[1::2]).items, kept.items)
        gone = torch.isin(items, distinct[1::2])
        whole = kept.add(sids[gone], item_ids=items[gone], lengths=lengths[gone])
        assert sorted(whole.items.tolist()) == distinct.tolist()
        assert whole.contains(sids, lengths).all()
    kept.save(FOLDER / "kept.trie")
    assert torch.equal(rx.TrieIndex.load(FOLDER / "kept.trie").items, kept.items)
    if max(index.max_tokens) < _FEW_TOKENS and index.num_sids <= 64:
        check_search(kept)


def check_search(index: rx.TrieIndex) -> None:
    """A beam that holds every SID finds every item."""

    def step(tokens: torch.Tensor, parents: torch.Tensor, level: int) -> torch.Tensor:
        return torch.zeros(*tokens.shape, max(index.max_tokens) + 1)

    found = rx.beam_search(step, index, batch_size=1, beam_width=index.num_sids, top_k=index.num_items)
    assert sorted(found.items[0].tolist()) == sorted(index.items.tolist())
    assert torch.isfinite(found.scores).all()


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """A new small index now and then; else a change to a header word or in a section."""
    rng = random.Random(seed)
    if len(data) < _HEADER_BYTES or rng.random() < 0.1:
        data = _fresh(rng)
    content = np.frombuffer(data[:most], np.uint8).copy()
    if len(content) < _HEADER_BYTES:
        return data[:most]
    words = content[:_HEADER_BYTES].view(np.int64)
    for _ in range(rng.randint(0, 2)):
        if rng.random() < 0.3:
            at = rng.choice([*_C.HEADER.values()]) + rng.choice([0, 0, 0, 1, 2])
            values = (words[at] ^ np.int64(1 << rng.randrange(31)), rng.randrange(-1, 5), words[rng.randrange(512)])
            words[at] = rng.choice(values)
        else:
            begin = int(words[_C.HEADER[rng.choice(_SECTIONS)]])
            begin = begin if 0 <= begin < len(content) else 0
            content[min(begin + rng.randrange(64), len(content) - 1)] ^= 1 << rng.randrange(8)
    return content.tobytes()


def _fresh(rng: random.Random) -> bytes:
    numbers = np.random.default_rng(rng.randrange(2**32))
    rows, columns, size = rng.choice([1, 2, 9, 40]), rng.randint(1, 4), rng.choice([1, 3, 30])
    sids = numbers.integers(0, size, (rows, columns))
    ids = numbers.permutation(rows) * rng.choice([1, 3, 2**31])
    if rng.random() < 0.3:
        return rx.TrieIndex.build(sids, item_ids=ids).data.numpy().tobytes()
    eos = rng.choice([None, 0])
    tokens = [1 + numbers.permutation(size + rng.randrange(2))[:size] for _ in range(columns)]
    lengths = None if eos is None else numbers.integers(1, columns + 1, rows)
    vocab = rx.SIDVocab([size] * columns, token_ids=[ids.tolist() for ids in tokens], eos=eos)
    return rx.TrieIndex.build(sids, item_ids=ids, lengths=lengths, vocab=vocab).data.numpy().tobytes()
