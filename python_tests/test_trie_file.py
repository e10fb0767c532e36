"""TrieIndex.save and load: whole files only, and never a half-written one."""

from __future__ import annotations

import itertools
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.strategies import Catalogue, catalogues

import raddpo_ext as rx
from raddpo_ext import _C

SECTIONS = ("symbols", "child_bits", "child_ranks", "child_hints", "item_bits", "item_ranks", "item_hints")
SECTIONS += ("items", "tokens", "codes")
HEADER_BYTES = 8 * _C.HEADER_WORDS


def make_index() -> rx.TrieIndex:
    """Every section of this one holds something."""
    rng = np.random.default_rng(0)
    vocab = rx.SIDVocab([30, 30], token_ids=[rng.permutation(30), 40 + rng.permutation(30)], eos=35)
    return rx.TrieIndex.build(rng.integers(0, 30, (100, 2)), lengths=rng.integers(1, 3, 100), vocab=vocab)


@pytest.fixture
def index() -> rx.TrieIndex:
    return make_index()


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


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.trie"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises((ValueError, IsADirectoryError), match=str(path)):
        rx.TrieIndex.load(path)


def test_written_into_while_mapped(path: Path, index: rx.TrieIndex) -> None:
    """What the documentation warns of: the index of a file that is written into changes, that of a replaced one not."""
    loaded = rx.TrieIndex.load(path)
    rx.TrieIndex.build([[0]]).save(path)
    assert loaded.data.equal(index.data)
    loaded = rx.TrieIndex.load(path)
    with open(path, "r+b") as file:
        file.write(b"x")
    assert loaded.data[0] == ord("x")
