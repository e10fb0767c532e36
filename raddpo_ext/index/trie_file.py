"""The files of a saved TrieIndex: its block of bytes, mapped into memory and checked. Does not import torch."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from raddpo_ext import _C
from raddpo_ext._files import open_regular

_BYTES_PER_THREAD = 2**20  # checking them takes as long as starting a thread
_CHUNK = 2**20  # bytes


def mapped_block(path: str | os.PathLike[str], threads: int) -> mmap.mmap:
    """The block, checked by at most ``threads`` threads. Raises the errors of :meth:`TrieIndex.load`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # A private mapping is writable, as torch requires, but the file does not change and its pages stay shared.
        try:
            content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else b""
        except OSError as error:
            error.filename = os.fspath(path)
            raise
    try:
        _C.trie_check(content, min(threads, 1 + size // _BYTES_PER_THREAD))
    except (ValueError, MemoryError) as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from None
    assert isinstance(content, mmap.mmap)  # an empty file is refused
    return content


def items_that_share(block: mmap.mmap) -> int:
    """The number of items whose SID another item has too.

    The section ``item_bits`` has, node after node, a 1 per item and a closing 0. So a SID's only item is a 1 between
    zeros. The root's 0 comes first, and a 0 last.
    """
    words = memoryview(block).cast("q")
    begin, end = words[_C.HEADER["item_bits"]], words[_C.HEADER["item_ranks"]]
    alone = 0
    for first in range(begin, end, _CHUNK):
        last = min(first + _CHUNK, end)
        bits = int.from_bytes(block[first - 1 : last + 1], "little")  # with a byte on both sides
        single = (bits & ~(bits << 1) & ~(bits >> 1)) >> 8
        alone += (single & ((1 << 8 * (last - first)) - 1)).bit_count()
    return words[_C.HEADER["num_items"]] - alone


def map_path(index: str | os.PathLike[str]) -> Path:
    """The path of an index's id map. The file need not exist."""
    return Path(f"{os.fspath(index)}.idmap")
