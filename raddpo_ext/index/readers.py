"""Read a catalogue's semantic IDs (SIDs) from tables and from the files that public SID models and numpy write."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from raddpo_ext.index.catalogue_tables import read_columns
from raddpo_ext.index.item_ids import LARGEST_ITEM, integer_id
from raddpo_ext.index.sid_text import code_of, shown, without_markers

_ARRAYS = ("sids", "lengths", "item_ids")
_TABLES = (".csv", ".tsv", ".parquet")


class SIDTable(NamedTuple):
    """A catalogue of ``N`` items, as :meth:`TrieIndex.build` takes it.

    Attributes:
        sids: integer codes ``[N, L]``. Codes beyond a SID's length are padding of any value.
        lengths: int64 ``[N]`` in ``[1, L]``, or None if every SID has ``L`` codes.
        item_ids: integer ``[N]``, or None if the item ids are the row numbers.
        sizes: for each level, one more than its largest code.
        ids: the items' own ids if these are strings, ``[N]``; the item ids are the row numbers then. Else None.
        titles: ``[N]``, empty for an item without a title, or None if there are no titles.
    """

    sids: np.ndarray
    lengths: np.ndarray | None
    item_ids: np.ndarray | None
    sizes: tuple[int, ...]
    ids: list[str] | None = None
    titles: list[str] | None = None


def read_sids(
    path: str | os.PathLike[str],
    *,
    item: str | None = None,
    sid: str | Sequence[str] | None = None,
    title: str | None = None,
) -> SIDTable:
    """Read the SIDs of a catalogue from a file. The suffix tells the format.

    - ``.json``: the ``index.json`` of LC-Rec, LETTER and MiniOneRec, ``{"7": ["<a_12>", "<b_3>", ...], ...}``. Keys are
      item ids, the letter is the level, the number is the code. Tokens ``<s_a_12>`` (OneRec) and markers around a SID
      are read too.
    - ``.csv``, ``.tsv`` and ``.parquet`` (needs pyarrow): one item per row, in named columns. The SID is one column
      (``<a_12><b_3>``, ``12,3`` or a list), or one column per code, empty or -1 beyond the end of a shorter SID.
    - ``.npy``: integers ``[N, L]``. A shorter SID ends in -1.
    - ``.npz``: the array ``sids``, as above, and optionally ``lengths`` ``[N]`` and ``item_ids`` ``[N]``. With
      ``lengths``, codes beyond a SID's length are ignored.

    Item ids in text are read as integers if every one of them is an integer from 0 to 2**63 - 1 without a leading zero.
    Otherwise all of them stay strings: see ``ids`` of the result, and :class:`IdMap`.

    Args:
        path: the file. Nothing in it is ever unpickled.
        item: the column of the item's id in a table. Default: ``item_id``, ``item``, ``id``, ``asin``, ``parent_asin``
            or ``sku``.
        sid: the column of the SID, or the columns of its codes in their order. Default: ``sid`` or ``semantic_id``, or
            numbered columns such as ``code_0, code_1, ...`` (also ``sid``, ``c``, ``level`` or ``l``, from 0 or 1).
        title: the column of the title. Default: ``title``, if there is one.

    Returns:
        :class:`SIDTable`.

    Raises:
        ValueError: the file is malformed, or none or several of its columns have a default name; names the file.
        OSError: the file cannot be opened.

    Example:
        >>> with open("index.json", "w") as file:
        ...     _ = file.write('{"7": ["<a_0>", "<b_2>"], "9": ["<a_1>", "<b_0>"]}')
        >>> table = rx.read_sids("index.json")
        >>> table.sids.tolist(), table.item_ids.tolist(), table.sizes
        ([[0, 2], [1, 0]], [7, 9], (2, 3))
        >>> index = rx.TrieIndex.build(table.sids, item_ids=table.item_ids, lengths=table.lengths)
    """
    path = Path(path)
    if path.suffix in _TABLES:
        return _read_table(path, item, [sid] if isinstance(sid, str) else sid, title)
    if not item is sid is title is None:
        _refuse(path, "item, sid and title name columns of a .csv, .tsv or .parquet file")
    if path.suffix == ".json":
        return _read_index_json(path)
    if path.suffix in (".npy", ".npz"):
        return _read_numpy(path)
    _refuse(path, f"not a kind of file that holds SIDs: expected .json, .npy, .npz, {', '.join(_TABLES)}")


def _read_table(path: Path, item: str | None, sid: Sequence[str] | None, title: str | None) -> SIDTable:
    """Read a CSV, TSV or Parquet table."""
    try:
        columns = read_columns(path, item, sid, title)
    except ValueError as error:
        _refuse(path, str(error))
    item_ids, ids = _item_ids(path, columns.items, columns.rows)
    sids, lengths = _padded(columns.codes)
    return SIDTable(sids, lengths, item_ids, _sizes(sids), ids, columns.titles)


def _item_ids(
    path: Path, names: Sequence[str], rows: Sequence[int] | None = None
) -> tuple[np.ndarray | None, list[str] | None]:
    """The ids, as integers or else as strings. ``rows`` are their row numbers for error messages."""
    seen: set[str] = set()
    integers = True
    for at, name in enumerate(names):
        what = f"item {shown(name)}" if rows is None else f"row {rows[at]}: item {shown(name)}"
        if name in seen:
            _refuse(path, f"{what} appears twice")
        if re.fullmatch("-[0-9]+", name):
            _refuse(path, f"{what} is not an integer from 0 to {LARGEST_ITEM}")
        if not name or name != name.strip() or not name.isprintable():
            _refuse(path, f"{what} is empty, begins or ends with white space, or has characters that cannot be printed")
        seen.add(name)
        integers = integers and integer_id(name) is not None
    return (np.array([*map(int, names)], np.int64), None) if integers else (None, list(names))


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes ``[N, L]``, -1 beyond each row's end, and the lengths, or None if all are ``L``."""
    lengths = np.array([len(row) for row in rows])
    sids = np.full((len(rows), lengths.max()), -1, np.int32)
    sids[np.arange(sids.shape[1]) < lengths[:, None]] = [code for row in rows for code in row]
    return sids, None if lengths.min() == sids.shape[1] else lengths


def _sizes(sids: np.ndarray) -> tuple[int, ...]:
    """One more than the largest code of each level."""
    return tuple(int(size) + 1 for size in sids.max(0))


class _Object(list[tuple[str, Any]]):
    """A JSON object as a list of its pairs, which keeps repeated keys."""


def _read_index_json(path: Path) -> SIDTable:
    """Read the ``index.json`` of LC-Rec, LETTER and MiniOneRec, or of OneRec."""
    try:
        pairs = json.loads(path.read_bytes(), object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"not valid JSON: {error or type(error).__name__}")
    # The form of the file.
    if not isinstance(pairs, _Object):
        _refuse(path, 'expected an object {"item": ["<a_12>", ...], ...}, got ' + type(pairs).__name__)
    if not pairs:
        _refuse(path, "holds no items")
    # The SID of each item, token by token.
    item_ids, ids = _item_ids(path, [key for key, _ in pairs])
    known: list[dict[str, int]] = []  # per level the code of each token, so that a token is parsed once
    rows: list[list[int]] = []
    for key, given in pairs:
        tokens = without_markers(given) if isinstance(given, list) and not isinstance(given, _Object) else ()
        if not tokens:
            _refuse(path, f"item {key!r} must have a list of tokens, got {shown(given)}")
        for level, token in enumerate(tokens):
            if level == len(known):
                known.append({})
            if not isinstance(token, str) or token not in known[level]:
                try:
                    known[level][token] = code_of(token, level)
                except ValueError as error:
                    _refuse(path, f"item {key!r}, {error}")
        rows.append([codes[token] for codes, token in zip(known, tokens, strict=False)])
    sids, lengths = _padded(rows)
    return SIDTable(sids, lengths, item_ids, _sizes(sids), ids)


def _read_numpy(path: Path) -> SIDTable:
    """Read an array of codes, or an archive of codes, lengths and item ids."""
    with open(path, "rb") as file:
        try:
            arrays = _load_archive(file) if zipfile.is_zipfile(file) else {"sids": np.lib.format.open_memmap(path, "c")}
        except Exception as error:  # numpy and zipfile raise a dozen types for a damaged file, OSError among them
            _refuse(path, f"not a numpy file of plain integers, or damaged: {' '.join(str(error).split())}")
    if "sids" not in arrays:
        _refuse(path, f"has no array 'sids', only {', '.join(map(repr, arrays)) or 'none at all'}")
    sids, item_ids = arrays["sids"], arrays.get("item_ids")
    for name, dim in zip(_ARRAYS, (2, 1, 1), strict=True):
        if name in arrays:
            _check_array(path, name, arrays[name], dim, len(sids) if sids.ndim else 0)
    if 0 in sids.shape:
        _refuse(path, f"sids holds no SIDs: its shape is {sids.shape}")
    # No code within a SID may be negative; beyond its end any value is padding.
    lengths = _lengths(path, sids, arrays.get("lengths"))
    columns = [sids[:, level] if lengths is None else sids[lengths > level, level] for level in range(sids.shape[1])]
    for level, column in enumerate(columns):
        if len(column) and column.min() < 0:
            _refuse(path, f"sids holds the negative code {column.min()} at level {level}")
    return SIDTable(sids, lengths, item_ids, tuple(int(column.max(initial=0)) + 1 for column in columns))


def _load_archive(file: BinaryIO) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file; raises ValueError for an unknown one."""
    arrays = {}
    file.seek(0)
    with np.load(file, allow_pickle=False) as members:
        for name in members.files:
            if name not in _ARRAYS:
                raise ValueError(f"unknown array {name!r}, expected sids and optionally lengths, item_ids")
            arrays[name] = members[name]
            if not isinstance(arrays[name], np.ndarray):
                raise ValueError(f"{name!r} is not an array")
    return arrays


def _check_array(path: Path, name: str, array: np.ndarray, dim: int, rows: int) -> None:
    """Refuse an array of another type, dimension or length."""
    if array.dtype.kind not in "iu":
        _refuse(path, f"{name} must hold integers, got {array.dtype}")
    if array.ndim != dim:
        _refuse(path, f"{name} must have {dim} dimension{'s' * (dim > 1)}, got shape {array.shape}")
    if len(array) != rows:
        _refuse(path, f"{name} must have one entry per row of sids ({rows}), got {len(array)}")


def _lengths(path: Path, sids: np.ndarray, lengths: np.ndarray | None) -> np.ndarray | None:
    """The length of each SID: as given, or up to its last code that is not -1; None if all are full."""
    levels = sids.shape[1]
    if lengths is None:
        if sids.min() >= 0:
            return None
        # A SID ends with its last code that is not -1. In a row of only -1, argmax finds no end.
        lengths = levels - np.argmax(sids[:, ::-1] != -1, axis=1)
        lengths[(sids == -1).all(axis=1)] = 0
    outside = (lengths < 1) | (lengths > levels)
    if outside.any():
        row = int(outside.argmax())
        _refuse(path, f"the SID of row {row} has length {lengths[row]}, outside [1, {levels}]")
    return lengths.astype(np.int64)


def _refuse(path: Path, why: str) -> NoReturn:
    """Raise ValueError that names the file."""
    raise ValueError(f"{path}: {why}") from None
