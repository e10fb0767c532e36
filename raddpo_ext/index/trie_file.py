"""The block of bytes of a saved TrieIndex, mapped into memory and checked."""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor

from raddpo_ext import _C
from raddpo_ext._files import open_regular

_BYTES_PER_THREAD = 2**20  # checking them takes as long as starting a thread


def mapped_block(path: str | os.PathLike[str]) -> Tensor:
    """The block as uint8. Raises the errors of :meth:`TrieIndex.load`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # A private mapping is writable, as torch requires, but the file does not change and its pages stay shared.
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
