"""IdMap: the shop's own item ids and titles, beside an index, which knows integers alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raddpo_ext import _C
from raddpo_ext._files import replacing
from raddpo_ext.index.readers import SIDTable
from raddpo_ext.index.sid_text import shown
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.trie_input import item_ids_of
from raddpo_ext.index.trie_items import UnknownItem

_FORMAT = "raddpo_ext id map 1"


class IdMap:
    """From a shop's item ids (SKU, ASIN, UUID) to the integers of an index, and back; and the items' titles.

    It is saved beside the index, as ``FILE.idmap`` for the index ``FILE``, and bound to it: another index of that name
    refuses it. Takes about 200 bytes an item in memory.

    Args:
        ids: the items' ids, distinct strings ``[N]``, or None where an item's id is its integer.
        titles: strings ``[N]``, empty for an item without one, or None.
        items: the integers of the items in the index, ``[N]``. Default: 0 to ``N - 1``.

    Raises:
        ValueError, TypeError: naming the argument and the value.
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
            raise ValueError(f"ids, titles and items must have one entry an item, got {counts}")
        for name in ("ids", "titles"):
            wrong = next((value for value in given[name] or () if not isinstance(value, str)), None)
            if wrong is not None:
                raise TypeError(f"{name} must hold strings, got {shown(wrong)}")
        self.ids = None if ids is None else list(ids)
        self.titles = None if titles is None else list(titles)
        (count,) = set(counts.values())
        #: int64 ``[N]``.
        self.items = np.arange(count) if items is None else item_ids_of(items, "items", least=0)
        self._items: list[int] = self.items.tolist()
        self._row = _rows("items", self._items)
        self._row_of_id = None if self.ids is None else _rows("ids", self.ids)

    @classmethod
    def of(cls, table: SIDTable) -> IdMap | None:
        """The map that a table asks for: None where its ids are integers and it has no titles."""
        if table.ids is None and table.titles is None:
            return None
        return cls(table.ids, table.titles, None if table.item_ids is None else table.item_ids.tolist())

    def items_of(self, ids: Sequence[Any], name: str = "ids") -> list[int]:
        """The integers of these ids, which the functions of this package take.

        Raises:
            UnknownItem: a ValueError, naming the first id that the map lacks and where it stands.
        """
        known = self._row if self._row_of_id is None else self._row_of_id
        for position, wanted in enumerate(ids):
            if wanted not in self:
                raise UnknownItem(f"{name}[{position}]", wanted, position)
        return [self._items[known[wanted]] for wanted in ids]

    def __contains__(self, wanted: object) -> bool:
        """Whether an item has this id."""
        if self._row_of_id is None:
            return type(wanted) is int and wanted in self._row
        return type(wanted) is str and wanted in self._row_of_id

    def ids_of(self, items: Any) -> Any:
        """The ids of integers: nested lists in the shape of ``items``, None where it is -1 (an empty row).

        Args:
            items: integers of any shape, such as :attr:`BeamResult.items`.

        Raises:
            ValueError: an integer that the map lacks.
        """
        return self._of(items, self._items if self.ids is None else self.ids)

    def titles_of(self, items: Any) -> Any:
        """The titles likewise; empty strings where the map has none."""
        return self._of(items, self.titles or [""] * len(self.items))

    def _of(self, items: Any, values: Sequence[Any]) -> Any:
        if isinstance(items, (torch.Tensor, np.ndarray)):
            items = items.tolist()
        if isinstance(items, list):
            return [self._of(item, values) for item in items]
        if items == -1:
            return None
        if items not in self._row:
            raise ValueError(f"items hold {shown(items)}, which is not in the map")
        return values[self._row[items]]

    def save(self, index: str | os.PathLike[str]) -> None:
        """Writes the map beside a saved index, atomically.

        Raises:
            ValueError: the index has an item that the map lacks, or its file is damaged.
        """
        there = TrieIndex.load(index).items.long().numpy()
        missing = there[~np.isin(there, self.items)]
        if len(missing):
            raise ValueError(f"{os.fspath(index)}: the id map lacks the item {missing[0]}")
        arange = np.array_equal(self.items, np.arange(len(self.items)))
        content = {"ids": self.ids, "titles": self.titles, "items": None if arange else self.items.tolist()}
        body = json.dumps(content, separators=(",", ":")).encode()
        head = {"format": _FORMAT, "index": _stamp(index), "sha256": hashlib.sha256(body).hexdigest()}
        with replacing(map_path(index)) as file:
            file.write(json.dumps(head).encode() + b"\n" + body)

    @classmethod
    def load(cls, index: str | os.PathLike[str]) -> IdMap | None:
        """The map beside a saved index, or None where there is none.

        Raises:
            ValueError: it is damaged, or of another index; naming its file.
            OSError: it or the index cannot be opened.
        """
        path = map_path(index)
        if not os.path.lexists(path):
            return None
        if not path.is_file():
            raise ValueError(f"{path}: is no regular file")
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
                f"{path}: the id map is of another index than {os.fspath(index)}: build them together, or remove it"
            )
        return found


def map_path(index: str | os.PathLike[str]) -> Path:
    """Where the id map of an index is, if it has one."""
    return Path(f"{os.fspath(index)}.idmap")


def move_map(staged: Path, index: Path) -> None:
    """Gives the map of an index the place that it has under the index's next name, before the index itself moves."""
    if map_path(staged).exists():
        os.replace(map_path(staged), map_path(index))
    elif map_path(index).exists():  # left by a publisher that was killed
        map_path(index).unlink()


def _stamp(index: str | os.PathLike[str]) -> list[int]:
    """What tells an index from others: its size and checksum, from its header."""
    with open(index, "rb") as file:
        header = np.frombuffer(file.read(8 * (_C.HEADER["checksum"] + 1)), np.int64)
    if len(header) <= _C.HEADER["checksum"]:
        raise ValueError(f"{os.fspath(index)}: not a TrieIndex file")
    return [int(header[_C.HEADER[name]]) for name in ("bytes", "checksum")]


def _rows(name: str, values: Sequence[Any]) -> dict[Any, int]:
    rows = {value: row for row, value in enumerate(values)}
    if len(rows) < len(values):
        twice = next(value for row, value in enumerate(values) if rows[value] != row)
        raise ValueError(f"{name} hold {shown(twice)} twice")
    return rows
