"""Public catalogues with their purchases, read from the folders that LETTER (LC-Rec) and MiniOneRec publish."""

from __future__ import annotations

import csv
import hashlib
import html
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raddpo_ext.index.readers import read_sids

CODES = 256  # minimum size of a level, that of a usual codebook

#: SHA-256 of the public files with which the measurements of this project were made: LETTER's Musical Instruments and
#: MiniOneRec's Industrial & Scientific, both from the Amazon reviews of 2018.
KNOWN_HASHES = {
    "instruments": {
        "Instruments.index.json": "33c87e28c52ae367985bdf494cb49d676d181e13a39497b4ad035f46111546dd",
        "Instruments.inter.json": "0a11d47791d90483005da93c36d826679e20e4592d1d2b86518d5f56f218e743",
    },
    "industrial": {
        "Industrial_and_Scientific.index.json": "53f1aefbe8b8aa774326c122606c6525300c5a325e7b78817739d465aeb335f8",
        "Industrial_and_Scientific.item.json": "937600c7a03652f55864a1d12d6e9fe8ca3e24ecc4e255a88216b25c5f949496",
        "test.csv": "973dd1db4fd549f3f2b40a0f039dbae157ebb92c716197cc246401e4e82c3a46",
        "valid.csv": "12bbb02bced0bd754a8b4e0f9ca4086416e30d12b0b73a2c95e7b195dd67385a",
    },
}
_READ = ("*.index.json", "*.item.json", "*.inter.json", "train.csv", "valid.csv", "test.csv")


class Case(NamedTuple):
    """A held-out purchase: the items bought before it, oldest first and at least one, and the item."""

    history: list[int]
    item: int


@dataclass(frozen=True)
class Catalogue:
    """A public catalogue with its purchases. Items are row numbers.

    Attributes:
        name: short, for file names.
        sids: int64 codes ``[N, L]``, -1 beyond a shorter SID's length.
        lengths: int64 ``[N]``, or None if all SIDs have ``L`` codes.
        sizes: number of codes of each level, at least 256.
        titles: ``[N]``.
        train: one sequence of purchases per user, oldest first.
        valid: the cases to choose settings on; their items to predict are not in ``train``. May be empty.
        test: the cases to report results on.
    """

    name: str
    sids: np.ndarray
    lengths: np.ndarray | None
    sizes: tuple[int, ...]
    titles: list[str]
    train: list[list[int]]
    valid: list[Case]
    test: list[Case]


def load_catalogue(folder: str | os.PathLike[str]) -> Catalogue:
    """Read a public catalogue from its folder. The files tell which of two layouts it has.

    ``*.index.json`` holds the SIDs in both layouts, ``*.item.json`` the titles if it exists.

    - LETTER, LC-Rec: ``*.inter.json`` is ``{"user": [item, ...]}``, oldest first. Leave-one-out: of a user's ``items``,
      the training sequence is ``items[:-2]``, the validation case ``items[:-2] -> items[-2]`` and the test case
      ``items[:-1] -> items[-1]``. Users with fewer than 3 items are skipped.
    - MiniOneRec has its own split by time: ``valid.csv`` and ``test.csv`` with ``user_id``, ``history_item_id`` and
      ``item_id``, one case per row. A user's rows of ``train.csv`` make one training sequence: the first row's history
      and then every row's item. Without that file, the sequence is the history of the user's first row in ``valid.csv``
      or else in ``test.csv``: these items were bought before any item that is to be predicted.

    Raises:
        ValueError: a file is missing or malformed; names the file or folder, and the row or user if any.
        OSError: a file cannot be opened.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
    # The items and their SIDs.
    index_path = _only(folder, "*.index.json")
    table = read_sids(index_path)
    if table.item_ids is None:
        raise ValueError(f"{index_path}: item ids must be integers, got {(table.ids or [])[:1]}")
    row_of = {int(item): row for row, item in enumerate(table.item_ids)}
    # The purchases: MiniOneRec has its own split, LETTER one sequence per user.
    if (folder / "valid.csv").exists() and (folder / "test.csv").exists():
        train, valid, test = _own_split(folder, row_of)
    else:
        train, valid, test = _leave_one_out(_only(folder, "*.inter.json", "valid.csv and test.csv"), row_of)
    if not train or not test:
        raise ValueError(f"{folder}: has no training sequence or no test case")
    return Catalogue(
        name=index_path.name.split(".")[0].lower(),
        sids=table.sids.astype(np.int64),
        lengths=table.lengths,
        sizes=tuple(max(size, CODES) for size in table.sizes),
        titles=_read_titles(folder, row_of, table.sids),
        train=train,
        valid=valid,
        test=test,
    )


def known_version(folder: str | os.PathLike[str]) -> str | None:
    """The name in :data:`KNOWN_HASHES` of the files in a folder, or None.

    If there is a name, :func:`load_catalogue` reads exactly the files that this project's measurements were made on.
    """
    folder = Path(folder)
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for pattern in _READ for path in folder.glob(pattern)
    }
    return next((name for name, known in KNOWN_HASHES.items() if known == hashes), None)


def _only(folder: Path, pattern: str, otherwise: str = "") -> Path:
    """The only file of a folder with this pattern; raises ValueError if there is none or several."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        expected = f"{pattern}, or {otherwise}" if otherwise else pattern
        raise ValueError(f"{folder}: expected one file {expected}, found {len(found)}")
    return found[0]


def _leave_one_out(path: Path, row_of: dict[int, int]) -> tuple[list[list[int]], list[Case], list[Case]]:
    """LETTER's layout: training sequences, and a validation and a test case per user."""
    users = [_rows(f"{path}: user {user!r}", items, row_of) for user, items in _read_json(path).items()]
    users = [items for items in users if len(items) > 2]
    return (
        [items[:-2] for items in users],
        [Case(items[:-2], items[-2]) for items in users],
        [Case(items[:-1], items[-1]) for items in users],
    )


def _own_split(folder: Path, row_of: dict[int, int]) -> tuple[list[list[int]], list[Case], list[Case]]:
    """MiniOneRec's layout: training sequences by user, and the cases of its own split."""
    valid, test = (_read_csv(folder / f"{name}.csv", row_of) for name in ("valid", "test"))
    train: dict[str, list[int]] = {}
    if (folder / "train.csv").exists():
        for user, case in _read_csv(folder / "train.csv", row_of):
            train.setdefault(user, list(case.history)).append(case.item)
    else:
        for user, case in valid + test:
            train.setdefault(user, case.history)
    return list(train.values()), [case for _, case in valid], [case for _, case in test]


def _read_csv(path: Path, row_of: dict[int, int]) -> list[tuple[str, Case]]:
    """The user and the case of each row."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from None
    cases = []
    for number, line in enumerate(lines, 1):
        where = f"{path}: row {number}"
        try:
            user, history, item = line["user_id"], json.loads(line["history_item_id"]), int(line["item_id"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from None
        # The history and the item that was bought after it.
        *before, bought = _rows(where, history, row_of) + _rows(where, [item], row_of)
        if not before:
            raise ValueError(f"{where}: the history is empty")
        cases.append((user, Case(before, bought)))
    return cases


def _rows(where: str, items: Any, row_of: dict[int, int]) -> list[int]:
    """The row numbers of item ids; ``where`` names the place in errors."""
    if not isinstance(items, list):
        raise ValueError(f"{where}: expected a list of items, got {type(items).__name__}")
    for item in items:
        if type(item) is not int or item not in row_of:
            raise ValueError(f"{where}: item {item!r} is not in the catalogue")
    return [row_of[item] for item in items]


def _read_titles(folder: Path, row_of: dict[int, int], sids: np.ndarray) -> list[str]:
    """The title of each row."""
    # An item without a title is called by its number and SID.
    titles = [f"item {item}, SID {' '.join(map(str, sids[row]))}" for item, row in row_of.items()]
    for path in folder.glob("*.item.json"):
        for item, fields in _read_json(path).items():
            title = fields.get("title") if isinstance(fields, dict) else None
            if not title or not isinstance(title, str) or not re.fullmatch("[0-9]{1,18}", item):
                continue
            if (row := row_of.get(int(item))) is not None:
                try:
                    titles[row] = html.unescape(title)
                except ValueError as error:  # &# and more digits than int() accepts
                    raise ValueError(f"{path}: item {item!r}: {error}") from None
    return titles


def _read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value
