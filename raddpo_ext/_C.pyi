from collections.abc import Callable, Sequence
from mmap import mmap

import numpy as np
import numpy.typing as npt

HEADER: dict[str, int]
HEADER_WORDS: int
MAX_LEVELS: int
MAX_CODES: int
FORMAT_VERSION: int

_Int32s = npt.NDArray[np.int32]
_Int64s = npt.NDArray[np.int64]

def trie_build(
    sids: npt.NDArray[np.integer],
    lengths: _Int64s | None,
    item_ids: _Int64s | None,
    levels: Sequence[tuple[int, int, int, _Int32s, _Int32s, _Int32s]],
    eos: int,
    has_vocab: bool,
    threads: int,
    progress: Callable[[float], None] | None,
) -> npt.NDArray[np.uint8]: ...
def trie_live(
    trie: npt.NDArray[np.uint8],
    live: npt.NDArray[np.uint8] | None,
    ids: _Int64s | None,
    mask: npt.NDArray[np.bool_] | None,
    keep: bool,
    threads: int,
) -> tuple[npt.NDArray[np.uint8], int, int, int, int]: ...
def trie_compact(
    trie: npt.NDArray[np.uint8], live: npt.NDArray[np.uint8], sids: int, threads: int
) -> npt.NDArray[np.uint8]: ...
def trie_merge(trie: npt.NDArray[np.uint8], added: npt.NDArray[np.uint8], threads: int) -> npt.NDArray[np.uint8]: ...
def trie_first_known(trie: npt.NDArray[np.uint8], ids: _Int64s, threads: int) -> int: ...
def trie_check(data: bytes | mmap, threads: int) -> None: ...
def trie_checksum(data: npt.NDArray[np.uint8]) -> int: ...
def isa() -> str: ...
def best_isa() -> str: ...
def set_isa(isa: str) -> None: ...
def advise_huge_pages(address: int, bytes: int) -> None: ...
