"""Reads a catalogue's semantic IDs (SIDs) from the files that public SID models and numpy write."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

_TOKEN = re.compile(r"<([a-z])_([0-9]{1,10})>")
_ARRAYS = ("sids", "lengths", "item_ids")


class SIDTable(NamedTuple):
    """A catalogue of ``N`` items, as :meth:`TrieIndex.build` takes it.

    Attributes:
        sids: integer codes ``[N, L]``; of a shorter SID the rest is padding, not to be read.
        lengths: int64 ``[N]`` in ``[1, L]``, or None where every SID has ``L`` codes.
        item_ids: integer ``[N]``, or None where an item is its row number.
        sizes: for each level the number of codes that its largest code asks for.
    """

    sids: np.ndarray
    lengths: np.ndarray | None
    item_ids: np.ndarray | None
    sizes: tuple[int, ...]


def read_sids(path: str | os.PathLike[str]) -> SIDTable:
    """Reads SIDs from a file, by its suffix.

    - ``.json``: the ``index.json`` of LC-Rec, LETTER and MiniOneRec, ``{"7": ["<a_12>", "<b_3>", ...], ...}``. Keys are
      item ids, the letter is the level, the number the code. Item ids that are no integers are refused.
    - ``.npy``: integers ``[N, L]``. A row may end in -1s: its SID is shorter.
    - ``.npz``: the array ``sids``, as above, and optionally ``lengths`` ``[N]`` and ``item_ids`` ``[N]``. With
      ``lengths``, whatever lies beyond them is ignored.

    Args:
        path: the file. Nothing in it is ever unpickled.

    Returns:
        :class:`SIDTable`.

    Raises:
        ValueError: naming the file and what is wrong with it.
        OSError: it cannot be opened.
    """
    path = Path(path)
    if path.suffix == ".json":
        return _read_index_json(path)
    if path.suffix in (".npy", ".npz"):
        return _read_numpy(path)
    _refuse(path, "not a kind of file that holds SIDs: expected .json, .npy or .npz")


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a repeated key is seen."""


def _read_index_json(path: Path) -> SIDTable:
    try:
        pairs = json.loads(path.read_bytes(), object_pairs_hook=_Object)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"not valid JSON: {error or type(error).__name__}")
    if not isinstance(pairs, _Object):
        _refuse(path, 'expected an object {"item": ["<a_12>", ...], ...}, got ' + type(pairs).__name__)
    if not pairs:
        _refuse(path, "holds no items")
    seen: set[str] = set()
    known: list[dict[str, int]] = []  # of each level the code of each token, so that a token is parsed once
    for key, tokens in pairs:
        if not re.fullmatch("[0-9]{1,18}", key):
            _refuse(path, f"item {key!r} is no integer from 0 to 10**18 - 1; number the items first")
        if key in seen:
            _refuse(path, f"item {key!r} appears twice")
        seen.add(key)
        if not isinstance(tokens, list) or isinstance(tokens, _Object) or not tokens:
            _refuse(path, f"item {key!r} must have a list of tokens, got {_short(tokens)}")
        for level, token in enumerate(tokens):
            if level == len(known):
                known.append({})
            if not isinstance(token, str) or token not in known[level]:
                known[level][token] = _code(path, key, level, token)
    lengths = np.array([len(tokens) for _, tokens in pairs])
    sids = np.full((len(pairs), len(known)), -1, np.int32)
    for row, (_, tokens) in enumerate(pairs):
        sids[row, : len(tokens)] = [codes[token] for codes, token in zip(known, tokens, strict=False)]
    item_ids = np.array([int(key) for key, _ in pairs])
    sizes = tuple(max(codes.values()) + 1 for codes in known)
    return SIDTable(sids, None if lengths.min() == len(known) else lengths, item_ids, sizes)


def _code(path: Path, key: str, level: int, token: Any) -> int:
    match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
    if match is None or int(match[2]) > 2**31 - 2:
        _refuse(path, f"item {key!r}, level {level}: expected a token such as '<a_12>', got {_short(token)}")
    if ord(match[1]) - ord("a") != level:
        expected = f"expected <{chr(ord('a') + level)}_..>" if level < 26 else "at most 26 levels have a letter"
        _refuse(path, f"item {key!r}: token {token!r} stands at level {level}, {expected}")
    return int(match[2])


def _read_numpy(path: Path) -> SIDTable:
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
    lengths = _lengths(path, sids, arrays.get("lengths"))
    columns = [sids[:, level] if lengths is None else sids[lengths > level, level] for level in range(sids.shape[1])]
    for level, column in enumerate(columns):
        if len(column) and column.min() < 0:
            _refuse(path, f"sids holds the negative code {column.min()} at level {level}")
    return SIDTable(sids, lengths, item_ids, tuple(int(column.max(initial=0)) + 1 for column in columns))


def _load_archive(file: BinaryIO) -> dict[str, np.ndarray]:
    arrays = {}
    file.seek(0)
    with np.load(file, allow_pickle=False) as members:
        for name in members.files:
            if name not in _ARRAYS:
                raise ValueError(f"unknown array {name!r}, expected sids and optionally lengths, item_ids")
            arrays[name] = members[name]
            if not isinstance(arrays[name], np.ndarray):
                raise ValueError(f"{name!r} is no array")
    return arrays


def _check_array(path: Path, name: str, array: np.ndarray, dim: int, rows: int) -> None:
    if array.dtype.kind not in "iu":
        _refuse(path, f"{name} must hold integers, got {array.dtype}")
    if array.ndim != dim:
        _refuse(path, f"{name} must have {dim} dimension{'s' * (dim > 1)}, got shape {array.shape}")
    if len(array) != rows:
        _refuse(path, f"{name} must have one entry a row of sids ({rows}), got {len(array)}")


def _lengths(path: Path, sids: np.ndarray, lengths: np.ndarray | None) -> np.ndarray | None:
    levels = sids.shape[1]
    if lengths is None:
        if sids.min() >= 0:
            return None
        lengths = levels - np.argmax(sids[:, ::-1] != -1, axis=1)
        lengths[(sids == -1).all(axis=1)] = 0
    outside = (lengths < 1) | (lengths > levels)
    if outside.any():
        row = int(outside.argmax())
        _refuse(path, f"the SID of row {row} has length {lengths[row]}, outside [1, {levels}]")
    return lengths.astype(np.int64)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:  # JSON may nest just so deep that it can be read and not be shown
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(path: Path, why: str) -> NoReturn:
    raise ValueError(f"{path}: {why}") from None
