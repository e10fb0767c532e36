"""IdMap: a shop's own item ids and titles, for an index, whose item ids are integers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raddpo_ext import _C
from raddpo_ext._files import replacing
from raddpo_ext.index.item_ids import LARGEST_ITEM, UnknownItem
from raddpo_ext.index.sid_text import shown
from raddpo_ext.index.trie_file import map_path

# A map is loaded without torch, for `index info`: what needs torch is imported where it is used.
if TYPE_CHECKING:
    from raddpo_ext.index.readers import SIDTable

_FORMAT = "raddpo_ext id map 1"


class IdMap:
    """Maps a shop's item ids (SKU, ASIN, UUID) to the integer item ids of an index and back, and holds item titles.

    It is saved beside the index, as ``FILE.idmap`` for the index ``FILE``, and bound to it: :meth:`load` refuses a map
    that was saved for another index. Takes about 200 bytes per item in memory.

    Args:
        ids: the items' ids, distinct strings ``[N]``, or None if an item's id is its integer.
        titles: strings ``[N]``, empty for an item without one, or None.
        items: the item ids in the index, integers ``[N]``. Default: 0 to ``N - 1``.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> names = rx.IdMap(["HAT-01", "CAP-07"], titles=["Hat", "Cap"])
        >>> names.items_of(["CAP-07"])
        [1]
        >>> names.ids_of([[1, 0, -1]]), names.titles_of([0])
        ([['CAP-07', 'HAT-01', None]], ['Hat'])
    """

    def __init__(
        self, ids: Sequence[str] | None = None, titles: Sequence[str] | None = None, items: Sequence[int] | None = None
    ) -> None:
        given = {"ids": ids, "titles": titles, "items": items}
        for name, value in given.items():
            if isinstance(value, (str, bytes, Mapping, Set)):
                raise TypeError(f"{name} must be a list, got {shown(value)}")
        counts = {name: len(value) for name, value in given.items() if value is not None}
        if ids is None and titles is None:
            raise ValueError("ids or titles must be given")
        if len(set(counts.values())) > 1:
            raise ValueError(f"ids, titles and items must have one entry per item, got {counts}")
        for name in ("ids", "titles"):
            wrong = next((value for value in given[name] or () if not isinstance(value, str)), None)
            if wrong is not None:
                raise TypeError(f"{name} must hold strings, got {shown(wrong)}")
        self.ids = None if ids is None else list(ids)
        self.titles = None if titles is None else list(titles)
        (count,) = set(counts.values())
        #: The item ids in the index, int64 ``[N]``.
        self.items = np.arange(count) if items is None else _item_ids(items)
        self._items: list[int] = self.items.tolist()
        self._row = _rows("items", self._items)
        self._row_of_id = None if self.ids is None else _rows("ids", self.ids)

    @classmethod
    def of(cls, table: SIDTable) -> IdMap | None:
        """The map of a table's ids and titles. None if the ids are integers and there are no titles."""
        if table.ids is None and table.titles is None:
            return None
        return cls(table.ids, table.titles, None if table.item_ids is None else table.item_ids.tolist())

    def items_of(self, ids: Sequence[Any], name: str = "ids") -> list[int]:
        """The integer item ids of these ids, as the functions of this package take them.

        Raises:
            UnknownItem: a ValueError that names the first id that the map lacks, and its position.
        """
        known = self._row if self._row_of_id is None else self._row_of_id
        for position, wanted in enumerate(ids):
            if wanted not in self:
                raise UnknownItem(f"{name}[{position}]", wanted, position)
        return [self._items[known[wanted]] for wanted in ids]

    def __contains__(self, wanted: object) -> bool:
        """Whether the map has an item with this id."""
        if self._row_of_id is None:
            return type(wanted) is int and wanted in self._row
        return type(wanted) is str and wanted in self._row_of_id

    def ids_of(self, items: Any) -> Any:
        """The ids of integer item ids, as nested lists in the shape of ``items``; None for -1 (an empty row).

        Args:
            items: integers of any shape, such as :attr:`BeamResult.items`.

        Raises:
            ValueError: the map lacks one of the integers.
        """
        return self._of(items, self._items if self.ids is None else self.ids)

    def titles_of(self, items: Any) -> Any:
        """The titles of integer item ids, in the form of :meth:`ids_of`; empty strings for items without a title."""
        return self._of(items, self.titles or [""] * len(self.items))

    def _of(self, items: Any, values: Sequence[Any]) -> Any:
        """The value of each item, in the shape of ``items``."""
        if hasattr(items, "tolist"):  # a tensor or an array
            items = items.tolist()
        if isinstance(items, list):
            return [self._of(item, values) for item in items]
        if items == -1:
            return None
        if items not in self._row:
            raise ValueError(f"items hold {shown(items)}, which is not in the map")
        return values[self._row[items]]

    def save(self, index: str | os.PathLike[str]) -> None:
        """Write the map beside a saved index, atomically.

        Args:
            index: the file of the index.

        Raises:
            ValueError: the map lacks an item of the index, or the index file is damaged.
        """
        from raddpo_ext.index.trie import TrieIndex

        # Every item of the index is in the map.
        there = TrieIndex.load(index).items.long().numpy()
        missing = there[~np.isin(there, self.items)]
        if len(missing):
            raise ValueError(f"{os.fspath(index)}: the id map lacks the item {missing[0]}")
        # Row numbers as item ids need not be written.
        arange = np.array_equal(self.items, np.arange(len(self.items)))
        content = {"ids": self.ids, "titles": self.titles, "items": None if arange else self.items.tolist()}
        body = json.dumps(content, separators=(",", ":")).encode()
        head = {"format": _FORMAT, "index": _stamp(index), "sha256": hashlib.sha256(body).hexdigest()}
        with replacing(map_path(index)) as file:
            file.write(json.dumps(head).encode() + b"\n" + body)

    @classmethod
    def load(cls, index: str | os.PathLike[str]) -> IdMap | None:
        """Read the map beside a saved index; None if there is no map.

        Raises:
            ValueError: the map is damaged, or belongs to another index; names its file.
            OSError: the map or the index cannot be opened.
        """
        path = map_path(index)
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            raise ValueError(f"{path}: is not a regular file")
        # The first line has the format, the stamp of the index and the checksum of the rest.
        first, _, body = path.read_bytes().partition(b"\n")
        try:
            head = json.loads(first)
            if head["format"] != _FORMAT:
                raise ValueError(f"its format is {shown(head['format'])}")
            if head["sha256"] != hashlib.sha256(body).hexdigest():
                raise ValueError("its checksum is wrong")
            stamp, found = head["index"], cls(**json.loads(body))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}: not an id map, truncated or altered: {' '.join(str(error).split())}") from None
        if stamp != _stamp(index):
            raise ValueError(
                f"{path}: the id map belongs to another index than {os.fspath(index)}: build both together or remove it"
            )
        return found


def move_map(staged: Path, index: Path) -> None:
    """Move the map of a staged index to its final path. Call this before the index itself is moved."""
    if map_path(staged).exists():
        os.replace(map_path(staged), map_path(index))
    elif map_path(index).exists():  # left by a publisher that was killed
        map_path(index).unlink()


def _stamp(index: str | os.PathLike[str]) -> list[int]:
    """The size and checksum in the header of an index, which identify it."""
    with open(index, "rb") as file:
        header = np.frombuffer(file.read(8 * (_C.HEADER["checksum"] + 1)), np.int64)
    if len(header) <= _C.HEADER["checksum"]:
        raise ValueError(f"{os.fspath(index)}: not a TrieIndex file")
    return [int(header[_C.HEADER[name]]) for name in ("bytes", "checksum")]


def _item_ids(items: Sequence[int]) -> np.ndarray:
    """Item ids as int64 ``[N]``, checked."""
    if isinstance(items, list) and all(type(item) is int and 0 <= item <= LARGEST_ITEM for item in items):
        return np.array(items, np.int64)
    from raddpo_ext.index.trie_input import item_ids_of

    return item_ids_of(items, "items", least=0)


def _rows(name: str, values: Sequence[Any]) -> dict[Any, int]:
    """The row of each value; raises ValueError if one repeats."""
    rows = {value: row for row, value in enumerate(values)}
    if len(rows) < len(values):
        twice = next(value for row, value in enumerate(values) if rows[value] != row)
        raise ValueError(f"{name} must be distinct, got {shown(twice)} twice")
    return rows
