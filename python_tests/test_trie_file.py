"""TrieIndex.save and load: whole files only, and never a half-written one."""

from __future__ import annotations

import itertools
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import Catalogue, catalogues

import raddpo_ext as rx
from fuzz import index_file
from fuzz.index_file import signed
from raddpo_ext import _C

SECTIONS = ("symbols", "child_bits", "child_ranks", "child_hints", "item_bits", "item_ranks", "item_hints")
SECTIONS += ("items", "tokens", "codes")
HEADER_BYTES = 8 * _C.HEADER_WORDS


@pytest.fixture
def index() -> rx.TrieIndex:
    """Every section of this one holds something."""
    rng = np.random.default_rng(0)
    vocab = rx.SIDVocab([30, 30], token_ids=[rng.permutation(30), 40 + rng.permutation(30)], eos=35)
    return rx.TrieIndex.build(rng.integers(0, 30, (100, 2)), lengths=rng.integers(1, 3, 100), vocab=vocab)


@pytest.fixture
def path(tmp_path: Path, index: rx.TrieIndex) -> Path:
    index.save(tmp_path / "shop.trie")
    return tmp_path / "shop.trie"


def boundaries(index: rx.TrieIndex) -> list[int]:
    """Where each section begins; the header words of all ten follow one another."""
    first = _C.HEADER["symbols"]
    return [int(word) for word in index.header[first : first + len(SECTIONS)]] + [index.nbytes]


@settings(max_examples=15)
@given(catalogues())
def test_load_equals_what_was_saved(tmp_path: Path, catalogue: Catalogue) -> None:
    index = rx.TrieIndex.build(**catalogue.arguments())
    index.save(tmp_path / "shop.trie")
    loaded = rx.TrieIndex.load(tmp_path / "shop.trie")
    assert torch.equal(loaded.data, index.data)
    assert torch.equal(loaded.header, index.header)
    assert loaded.vocab == index.vocab
    assert loaded.contains(catalogue.sids, catalogue.lengths).all()
    assert repr(loaded) == repr(index)


def test_file_is_the_block_of_bytes(path: Path, index: rx.TrieIndex) -> None:
    assert path.read_bytes() == index.data.numpy().tobytes()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_sections_are_known(index: rx.TrieIndex) -> None:
    starts = boundaries(index)
    assert starts[0] == HEADER_BYTES
    assert starts == sorted(starts)
    assert all(start % 64 == 0 for start in starts)
    for name in ("items", "tokens", "codes"):
        assert starts[SECTIONS.index(name)] == index.header[_C.HEADER[name]]
        assert starts[SECTIONS.index(name)] < starts[SECTIONS.index(name) + 1]


def test_truncated_anywhere(path: Path, index: rx.TrieIndex) -> None:
    whole = path.read_bytes()
    lengths = {0, 1, 8, HEADER_BYTES - 1, *range(0, len(whole), 97)}
    for start in boundaries(index):
        lengths |= {start - 64, start - 1, start, start + 1, start + 64}
    for length in sorted(length for length in lengths if 0 <= length < len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated") as error:
            rx.TrieIndex.load(path)
        assert str(path) in str(error.value)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=f"{len(whole) + 1} bytes where {len(whole)} were written"):
        rx.TrieIndex.load(path)


def test_flipped_bits_are_seen(path: Path, index: rx.TrieIndex) -> None:
    """Every bit of the first four words and many of each section, its padding included."""
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    bits = list(range(4 * 64))
    for begin, end in itertools.pairwise([0, *boundaries(index)]):
        bits += [8 * begin, 8 * end - 1, *rng.integers(8 * begin, 8 * end, 60).tolist()]
    for bit in bits:
        whole[bit // 8] ^= 1 << bit % 8
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=r"altered|not a TrieIndex|format version"):
            rx.TrieIndex.load(path)
        whole[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("content", [b"", b"RADTRIE\0", b"x" * 100, b"{}" * 5000, bytes(10000)])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "shop.trie").write_bytes(content)
    with pytest.raises(ValueError, match=r"shop\.trie: not a TrieIndex file"):
        rx.TrieIndex.load(tmp_path / "shop.trie")


def test_other_version(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[8 * _C.HEADER["version"]] = 77
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=f"format version 77, this build reads {_C.FORMAT_VERSION}"):
        rx.TrieIndex.load(path)


def test_missing_file_and_folder(tmp_path: Path, index: rx.TrieIndex) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rx.TrieIndex.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        index.save(tmp_path / "nowhere/shop.trie")
    with pytest.raises(IsADirectoryError):
        index.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        rx.TrieIndex.build([[1, 2, 3]]).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_killed_write_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    script = (
        "import os, signal, sys, raddpo_ext as rx\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "rx.TrieIndex.build([[1, 2, 3]]).save(sys.argv[1])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    rx.TrieIndex.load(path)


def test_read_only_folder(path: Path, index: rx.TrieIndex) -> None:
    before = path.read_bytes()
    path.parent.chmod(0o555)
    root = os.geteuid() == 0  # whom no permission stops
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(PermissionError):
            index.save(path)
    finally:
        if root:
            os.seteuid(0)
        path.parent.chmod(0o755)
    assert path.read_bytes() == before


def test_overwriting_the_file_it_was_loaded_from(path: Path) -> None:
    loaded = rx.TrieIndex.load(path)
    data = loaded.data.clone()
    rx.TrieIndex.build([[1, 2, 3]]).save(path)
    assert torch.equal(loaded.data, data)
    loaded.save(path)
    assert torch.equal(rx.TrieIndex.load(path).data, data)


def test_writing_into_a_loaded_index_leaves_the_file(path: Path) -> None:
    before = path.read_bytes()
    rx.TrieIndex.load(path).data.zero_()
    assert path.read_bytes() == before


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


@pytest.fixture(scope="module")
def large() -> rx.TrieIndex:
    """More than one block of bits and one hint; no vocab."""
    return rx.TrieIndex.build(np.random.default_rng(0).integers(0, 40, (2000, 2)), item_ids=np.arange(2000))


def test_every_header_word_is_checked(index: rx.TrieIndex) -> None:
    signed_words = [_C.HEADER[name] for name in ("magic", "version", "bytes", "checksum")]
    for word in sorted(set(range(_C.HEADER_WORDS)) - set(signed_words)):
        for value in (0, 1, 3, 2**31, 2**63 - 1, -(2**63)):
            forgery = Forgery(index)
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
def test_header_word_is_named(tmp_path: Path, index: rx.TrieIndex, name: str, change: int) -> None:
    forgery = Forgery(index)
    forgery.words[_C.HEADER[name]] = change
    forgery.refused(tmp_path / "shop.trie", rf"malformed: {name}(\[0\])? is {change}, ")


def test_ranks_and_hints_are_checked(tmp_path: Path, large: rx.TrieIndex) -> None:
    for name in ("child_ranks", "child_hints", "item_ranks", "item_hints"):
        for entry in (0, 1):
            for value in (2, 2**32 - 1):
                forgery = Forgery(large)
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
        (lambda f: f.section("items", np.int32).__setitem__(4, 9), "not zero behind items"),
    ],
)
def test_bits_symbols_and_items_are_checked(tmp_path: Path, change: Callable[[Forgery], None], message: str) -> None:
    forgery = Forgery(SMALL)
    change(forgery)
    forgery.refused(tmp_path / "shop.trie", f"malformed: {message}")


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
        (lambda f: swap(f.section("tokens", np.int32), 0, 1), "the tokens of level 0 do not ascend from 0 up"),
        (lambda f: f.section("tokens", np.int32).__setitem__(0, -1), "the tokens of level 0 do not ascend from 0 up"),
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


def test_eos_among_consecutive_tokens(tmp_path: Path) -> None:
    forgery = Forgery(rx.TrieIndex.build([[0], [1]], vocab=rx.SIDVocab([2], eos=9)))
    forgery.words[_C.HEADER["eos"]] = 1
    forgery.refused(tmp_path / "shop.trie", "malformed: eos is 1, also the token of a code of level 0")


def test_any_bit_is_refused_or_is_another_index(
    isa: str, threads: int, index: rx.TrieIndex, large: rx.TrieIndex
) -> None:
    rng = np.random.default_rng(0)
    for whole, count in ((SMALL, 12), (TABLES, 12), (index, 6), (large, 2)):
        for begin, end in itertools.pairwise(boundaries(whole)):
            for bit in rng.integers(8 * begin, 8 * end, count if end > begin else 0):
                content = whole.data.numpy().copy()
                content[bit // 8] ^= 1 << bit % 8
                index_file.run(content.tobytes())
