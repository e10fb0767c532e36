"""What TrieIndex.load refuses: a corruption in every part of a file whose checksum was made to match."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_trie_file import HEADER_BYTES, SECTIONS, boundaries, make_index

import raddpo_ext as rx
from fuzz import index_file
from fuzz.index_file import signed
from raddpo_ext import _C
from raddpo_ext.__main__ import main


class Forgery:
    """A file's bytes with a matching checksum, whatever is changed in them."""

    def __init__(self, index: rx.TrieIndex) -> None:
        self.content = index.data.numpy().copy()
        self.words = self.content[:HEADER_BYTES].view(np.int64)

    def section(self, name: str, kind: type = np.uint8) -> np.ndarray:
        begin = self.words[_C.HEADER[name]]
        ends = [*self.words[_C.HEADER["symbols"] :][: len(SECTIONS)], len(self.content)]
        return self.content[begin : min(end for end in ends if end > begin)].view(kind)

    def refused(self, path: Path, message: str) -> None:
        path.write_bytes(signed(self.content.tobytes()))
        with pytest.raises(ValueError, match=message) as error:
            rx.TrieIndex.load(path)
        assert str(error.value).startswith(str(path))


INDEX = make_index()
# More than one block of bits and one hint; no vocab.
LARGE = rx.TrieIndex.build(np.random.default_rng(0).integers(0, 40, (2000, 2)), item_ids=np.arange(2000))


def test_every_header_word_is_checked() -> None:
    signed_words = [_C.HEADER[name] for name in ("magic", "version", "bytes", "checksum")]
    for word in sorted(set(range(_C.HEADER_WORDS)) - set(signed_words)):
        for value in (0, 1, 3, 2**31, 2**63 - 1, -(2**63)):
            forgery = Forgery(INDEX)
            if forgery.words[word] != value:
                forgery.words[word] = value
                with pytest.raises(ValueError, match="malformed: "):
                    _C.trie_check(signed(forgery.content.tobytes()), 1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("num_items", 10**9),
        ("num_sids", 1),
        ("num_nodes", 2**40),
        ("levels", 40),
        ("sid_levels", 0),
        ("wide", 1),
        ("item_bytes", 5),
        ("eos", 10**10),
        ("has_vocab", 2),
        ("child_ranks", 2**50),
        ("items", 4096),
        ("first_node", 1),
        ("num_symbols", 10**6),
        ("table", 5),
        ("first_token", -7),
        ("sizes", 2**30),
        ("max_token", 7),
    ],
)
def test_header_word_is_named(tmp_path: Path, name: str, change: int) -> None:
    forgery = Forgery(INDEX)
    forgery.words[_C.HEADER[name]] = change
    forgery.refused(tmp_path / "shop.trie", rf"malformed: {name}(\[0\])? is {change}, ")


def test_ranks_and_hints_are_checked(tmp_path: Path) -> None:
    for name in ("child_ranks", "child_hints", "item_ranks", "item_hints"):
        last = LARGE.num_nodes // 512 + 1 if name.endswith("hints") else 2
        for entry in (0, 1, last):
            for value in (2, 2**32 - 1):
                forgery = Forgery(LARGE)
                entries = forgery.section(name, np.uint32)
                entries[entry] = value + (entries[entry] == value)
                forgery.refused(tmp_path / "shop.trie", f"malformed: {name} do not fit the bits")


def swap(array: np.ndarray, first: int, second: int) -> None:
    array[[first, second]] = array[[second, first]]


def swap_bits(forgery: Forgery, name: str, first: int, second: int) -> None:
    bits = np.unpackbits(forgery.section(name), bitorder="little")
    assert bits[first] != bits[second]
    swap(bits, first, second)
    forgery.section(name)[:] = np.packbits(bits, bitorder="little")


# 0 -> 1 (0, 1) -> 3 (0), 4 (2), 5 (0) with items 7, 3, 9 and 2; children 110 110 10 0 0 0, items 000 10 10 110.
SMALL = rx.TrieIndex.build([[0, 0], [0, 2], [1, 0], [1, 0]], item_ids=[7, 3, 9, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: swap_bits(f, "child_bits", 1, 2),
            "the children of the nodes of depth 0 are not the nodes of depth 1",
        ),
        (
            lambda f: swap_bits(f, "child_bits", 6, 8),
            "the children of the nodes of depth 1 are not the nodes of depth 2",
        ),
        (lambda f: swap_bits(f, "child_bits", 6, 10), "child_bits hold 6 zeros for 6 nodes, or do not end there"),
        (lambda f: f.section("child_bits").__setitem__(0, 0), "child_bits hold 11 zeros for 6 nodes"),
        (lambda f: f.section("child_bits").__setitem__(40, 1), "child_bits hold 6 zeros for 6 nodes, or do not end"),
        (lambda f: swap_bits(f, "item_bits", 2, 3), "item_bits give items to a node with children, or none to a leaf"),
        (lambda f: swap_bits(f, "item_bits", 3, 9), "item_bits hold 6 zeros for 6 nodes, or do not end there"),
        (lambda f: swap(f.section("symbols", np.uint16), 3, 4), "symbols of level 1 do not ascend among siblings"),
        (lambda f: f.section("symbols", np.uint16).__setitem__(2, 0), "symbols of level 0 do not ascend"),
        (lambda f: f.section("symbols", np.uint16).__setitem__(4, 3), r"symbols of level 1 reach 3, num_symbols is 3"),
        (lambda f: f.section("symbols", np.uint16).__setitem__(4, 1), r"sizes\[1\] is 3, not 2"),
        (lambda f: f.section("symbols", np.uint16).__setitem__(0, 1), "symbols has 1 for the root"),
        (lambda f: f.section("symbols", np.uint16).__setitem__(6, 1), "not zero behind symbols"),
        (lambda f: f.section("items", np.int32).__setitem__(1, -5), "items hold -5"),
        (lambda f: f.section("items", np.int32).__setitem__(1, 9), "items hold 9 twice"),
        (
            lambda f: f.section("items", np.int32)[:4].__setitem__(slice(None), [7, 10**6, 9, 10**6]),
            "items hold 1000000 twice",
        ),
        (lambda f: f.section("items", np.int32).__setitem__(4, 9), "not zero behind items"),
    ],
)
def test_bits_symbols_and_items_are_checked(tmp_path: Path, change: Callable[[Forgery], None], message: str) -> None:
    forgery = Forgery(SMALL)
    change(forgery)
    forgery.refused(tmp_path / "shop.trie", f"malformed: {message}")


def test_sparse_ids_are_distinct(tmp_path: Path, isa: str) -> None:
    """Ids far apart, also such as fall on one place of a hash table: sound as long as none is there twice."""
    rng = np.random.default_rng(0)
    clash = (np.arange(2000, dtype=np.int64) << 52) + 5
    for ids in (rng.permutation(2**62 - np.arange(2000) * 10**9), rng.permutation(clash), 2**63 - 1 - np.arange(2000)):
        sids = np.stack([np.arange(2000) // 50, np.arange(2000) % 50], 1)
        index = rx.TrieIndex.build(sids, item_ids=ids)
        index.save(tmp_path / "sparse.trie")
        assert rx.TrieIndex.load(tmp_path / "sparse.trie").data.equal(index.data)
        for first, second in ((0, 1999), (700, 701)):
            forgery = Forgery(index)
            items = forgery.section("items", np.int64)
            items[second] = items[first]
            forgery.refused(tmp_path / "twice.trie", f"malformed: items hold {items[first]} twice")


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [rx.SIDVocab([2**24 - 1]), rx.SIDVocab([2**23] * 2, eos=2**24)])
def test_a_small_file_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab: rx.SIDVocab) -> None:
    """What it says of a vocab of 2**24 codes is believed only once somebody asks for the vocab."""
    rx.TrieIndex.build([[5] * vocab.levels], vocab=vocab).save(tmp_path / "small.trie")

    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("the vocab is made")

    with monkeypatch.context() as without:
        without.setattr("raddpo_ext.index.trie.SIDVocab", forbidden)
        index = rx.TrieIndex.load(tmp_path / "small.trie")
        assert index.eos == vocab.eos
        logits = torch.zeros(1, 1, 2**24 + 1)
        found = rx.beam_search(lambda tokens, parents, level: logits, index, batch_size=1, beam_width=1)
        assert found.items.tolist() == [[0]]
        assert index.restrict([0]).num_items == 1
        assert main(["index", "info", str(tmp_path / "small.trie")]) == 0
    assert index.vocab == vocab


def test_narrow_ids_in_wide_items(tmp_path: Path) -> None:
    forgery = Forgery(rx.TrieIndex.build([[0], [1]], item_ids=[3, 2**40]))
    forgery.section("items", np.int64)[1] = 4
    forgery.refused(tmp_path / "shop.trie", "malformed: item_bytes is 8 for 4")


# Level 0: tokens 5, 7, 9 of the codes 1, 0, 2. Level 1: 6 (eos), 8, 10 with codes -1, 1, 0. Level 2: eos.
TABLES = rx.TrieIndex.build(
    [[0, 0], [1, 1], [2, 0]], lengths=[2, 2, 1], vocab=rx.SIDVocab([3, 2], token_ids=[[7, 5, 9], [10, 8]], eos=6)
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: swap(f.section("tokens", np.int32), 0, 1),
            "the tokens of level 0 do not ascend from 0 to 2147483646",
        ),
        (
            lambda f: f.section("tokens", np.int32).__setitem__(2, 2**31 - 1),
            "the tokens of level 0 do not ascend from 0 to 2147483646",
        ),
        (
            lambda f: f.section("tokens", np.int32).__setitem__(0, -1),
            "the tokens of level 0 do not ascend from 0 to 2147483646",
        ),
        (lambda f: f.section("tokens", np.int32).__setitem__(2, 11), r"max_token\[0\] is 9, not 11"),
        (lambda f: f.section("tokens", np.int32).__setitem__(0, 6), "codes of level 0 has 1 for token 6"),
        (lambda f: f.section("tokens", np.int32).__setitem__(3, 7), "codes of level 1 has -1 for token 7"),
        (lambda f: f.section("codes", np.int32).__setitem__(0, 0), "codes of level 0 has 0 for token 7"),
        (lambda f: f.section("codes", np.int32).__setitem__(4, 2), "codes of level 1 has 2 for token 8"),
        (lambda f: f.section("symbols", np.uint16).__setitem__(4, 0), "symbols of level 1 have eos elsewhere than"),
    ],
)
def test_tables_are_checked(tmp_path: Path, change: Callable[[Forgery], None], message: str) -> None:
    forgery = Forgery(TABLES)
    change(forgery)
    forgery.refused(tmp_path / "shop.trie", f"malformed: {message}")


def test_table_without_its_eos(tmp_path: Path) -> None:
    forgery = Forgery(TABLES)
    forgery.section("tokens", np.int32)[3] = 7
    forgery.section("codes", np.int32)[3:6] = [0, 1, 0]
    forgery.words[_C.HEADER["sizes"] + 1] = 3
    forgery.section("codes", np.int32)[5] = 2
    forgery.refused(tmp_path / "shop.trie", "malformed: the tokens of level 1 lack eos")


def test_needless_table(tmp_path: Path) -> None:
    forgery = Forgery(rx.TrieIndex.build([[0], [1]], vocab=rx.SIDVocab([2], token_ids=[[4, 3]])))
    forgery.section("codes", np.int32)[:2] = [0, 1]
    forgery.refused(tmp_path / "shop.trie", r"malformed: table\[0\] is 0 for codes that need none")


def test_needless_table_beside_eos(tmp_path: Path) -> None:
    vocab = rx.SIDVocab([2, 2], token_ids=[[4, 3], [6, 7]], eos=9)
    forgery = Forgery(rx.TrieIndex.build([[0, 0], [1, 1]], vocab=vocab))
    forgery.section("codes", np.int32)[:2] = [0, 1]
    forgery.refused(tmp_path / "shop.trie", r"malformed: table\[0\] is 0 for codes that need none")


@pytest.mark.parametrize("eos", [None, 9])
@pytest.mark.parametrize("levels", [31, 32])
def test_deepest_index(tmp_path: Path, levels: int, eos: int | None) -> None:
    codes = levels - (eos is not None)
    index = rx.TrieIndex.build(np.eye(3, codes, dtype=int), vocab=rx.SIDVocab([2] * codes, [0] * codes, eos=eos))
    index.save(tmp_path / "deep.trie")
    assert index.levels == levels
    assert rx.TrieIndex.load(tmp_path / "deep.trie").data.equal(index.data)


def test_eos_among_consecutive_tokens(tmp_path: Path) -> None:
    forgery = Forgery(rx.TrieIndex.build([[0], [1]], vocab=rx.SIDVocab([2], eos=9)))
    forgery.words[_C.HEADER["eos"]] = 1
    forgery.refused(tmp_path / "shop.trie", "malformed: eos is 1, also the token of a code of level 0")


def test_any_bit_is_refused_or_is_another_index(isa: str) -> None:
    rng = np.random.default_rng(0)
    for whole, count in ((SMALL, 12), (TABLES, 12), (INDEX, 6), (LARGE, 2)):
        for bit in some_bits(whole, count, rng):
            content = whole.data.numpy().copy()
            content[bit // 8] ^= 1 << bit % 8
            index_file.run(content.tobytes())


def some_bits(index: rx.TrieIndex, count: int, rng: np.random.Generator) -> list[int]:
    """So many of each section."""
    sections = [pair for pair in itertools.pairwise(boundaries(index)) if pair[0] < pair[1]]
    return [int(bit) for begin, end in sections for bit in rng.integers(8 * begin, 8 * end, count)]


def test_number_of_threads_makes_no_difference() -> None:
    def verdict(content: bytes, threads: int) -> str:
        try:
            _C.trie_check(content, threads)
        except ValueError as error:
            return str(error)
        return "sound"

    for whole in (SMALL, INDEX, LARGE):
        for bit in [None, *some_bits(whole, 4, np.random.default_rng(1))]:
            content = whole.data.numpy().copy()
            if bit is not None:
                content[bit // 8] ^= 1 << bit % 8
            verdicts = {verdict(signed(content.tobytes()), threads) for threads in (1, 2, 3, 8)}
            assert len(verdicts) == 1
            assert bit is not None or verdicts == {"sound"}


def test_the_operator_checks_likewise() -> None:
    for index in (SMALL, INDEX, LARGE):
        assert torch.ops.raddpo.trie_check(index.data, 2).equal(index.header)
        for bit in some_bits(index, 4, np.random.default_rng(2)):
            content = index.data.numpy().copy()
            content[bit // 8] ^= 1 << bit % 8
            # Which exception it is depends on torch.
            with pytest.raises((ValueError, RuntimeError), match=r"not a TrieIndex file|format version|altered"):
                torch.ops.raddpo.trie_check(torch.from_numpy(content), 1)


def test_the_operator_refuses_what_is_no_block() -> None:
    data = INDEX.data
    shifted = torch.cat([data.new_zeros(1), data])[1:]
    for trie in (data.view(torch.int32), data[None], data.repeat_interleave(2)[::2], shifted):
        with pytest.raises(RuntimeError, match="trie must be a contiguous vector of uint8, aligned to 8 bytes"):
            torch.ops.raddpo.trie_check(trie, 1)
    for threads in (0, -1, 2**32):
        with pytest.raises(RuntimeError, match=rf"threads must be in \[1, 1024\], got {threads}"):
            torch.ops.raddpo.trie_check(data, threads)
