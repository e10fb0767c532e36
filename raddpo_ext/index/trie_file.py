"""A saved TrieIndex as the block of bytes that it is, mapped into memory and checked."""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor

from raddpo_ext import _C
from raddpo_ext._files import open_regular

_BYTES_PER_THREAD = 2**20  # are checked in the time that a thread takes to start


def mapped_block(path: str | os.PathLike[str]) -> Tensor:
    """uint8; raises what :meth:`TrieIndex.load` does."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # A private mapping: writable as torch wants it, yet the file stays as it is and its pages stay shared.
        try:
            content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else b""
        except OSError as error:
            error.filename = os.fspath(path)
            raise
    try:
        _C.trie_check(content, min(torch.get_num_threads(), 1 + size // _BYTES_PER_THREAD))
    except (ValueError, MemoryError) as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from None
    return torch.frombuffer(content, dtype=torch.uint8)
