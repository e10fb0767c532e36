"""What the demo recommends from: a catalogue with its purchases, and the real ones read from a folder."""

from __future__ import annotations

import csv
import html
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raddpo_ext.readers import read_sids

CODES = 256  # a level, the least that a codebook is given


class Case(NamedTuple):
    """A held-out purchase: the items bought before it, oldest first, and the item."""

    history: list[int]
    item: int


@dataclass(frozen=True)
class Catalogue:
    """Items are row numbers.

    Attributes:
        name: short, for file names.
        sids: int64 codes ``[N, L]``.
        lengths: int64 ``[N]``, or None where all SIDs have ``L`` codes.
        sizes: codes of each level.
        titles: ``[N]``.
        train: purchases of one shopper each, in order.
        test: what the demo reports on.
        epochs: enough to train on ``train``.
    """

    name: str
    sids: np.ndarray
    lengths: np.ndarray | None
    sizes: tuple[int, ...]
    titles: list[str]
    train: list[list[int]]
    test: list[Case]
    epochs: int


def spread(cases: list[Case], most: int) -> list[Case]:
    """At most ``most`` of the cases, evenly spread: the first users of a file are seldom like the others."""
    return cases[:: math.ceil(len(cases) / most)]


def load_catalogue(folder: Path, max_cases: int) -> Catalogue:
    """Reads a real catalogue, of one of two layouts told apart by the files.

    ``*.index.json`` holds the SIDs in both, ``*.item.json`` the titles where it is there.

    - LETTER, LC-Rec: ``*.inter.json`` is ``{"user": [item, ...]}``, in order of time. The last item of a user is the
      test, the one before it is left out (it is for tuning), the rest is for training.
    - MiniOneRec: ``valid.csv`` and ``test.csv`` with ``user_id``, ``history_item_id`` and ``item_id``. Training is on
      the first, in which every further row of a user adds one purchase to the same history.

    Args:
        folder: the folder.
        max_cases: at most this many test cases.

    Raises:
        ValueError, OSError: naming the file or folder and what is wrong.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'is no folder' if folder.exists() else 'no such folder'}")
    index_path = _only(folder, "*.index.json")
    table = read_sids(index_path)
    assert table.item_ids is not None  # an index.json names its items
    row_of = {int(item): row for row, item in enumerate(table.item_ids)}
    if (folder / "valid.csv").exists() and (folder / "test.csv").exists():
        train = _merge(_read_csv(folder / "valid.csv", row_of))
        test = [case for _, case in _read_csv(folder / "test.csv", row_of)]
        epochs = 10
    else:
        purchases = _read_interactions(_only(folder, "*.inter.json", "valid.csv and test.csv"), row_of)
        train = [items[:-2] for items in purchases if len(items) > 2]
        test = [Case(items[:-1], items[-1]) for items in purchases if len(items) > 2]
        epochs = 6
    if not train or not test:
        raise ValueError(f"{folder}: nothing to train on or nothing to report on")
    return Catalogue(
        name=index_path.name.split(".")[0].lower(),
        sids=table.sids.astype(np.int64),
        lengths=table.lengths,
        sizes=tuple(max(size, CODES) for size in table.sizes),
        titles=_read_titles(folder, row_of, table.sids),
        train=train,
        test=spread(test, max_cases),
        epochs=epochs,
    )


def _only(folder: Path, pattern: str, otherwise: str = "") -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        expected = f"{pattern}, or {otherwise}" if otherwise else pattern
        raise ValueError(f"{folder}: expected one file {expected}, found {len(found)}")
    return found[0]


def _read_interactions(path: Path, row_of: dict[int, int]) -> list[list[int]]:
    users = _read_json(path)
    if not all(isinstance(items, list) for items in users.values()):
        raise ValueError(f"{path}: expected lists of items")
    return [_rows(path, items, row_of) for items in users.values()]


def _read_csv(path: Path, row_of: dict[int, int]) -> list[tuple[str, Case]]:
    """The user and the case of each line."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from None
    cases = []
    for number, line in enumerate(lines, 1):
        try:
            user, history, item = line["user_id"], json.loads(line["history_item_id"]), int(line["item_id"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: row {number}: {type(error).__name__}: {error}") from None
        cases.append((user, Case(_rows(path, history, row_of), *_rows(path, [item], row_of))))
    return cases


def _merge(cases: Iterable[tuple[str, Case]]) -> list[list[int]]:
    """The purchases of each user."""
    users: dict[str, list[int]] = {}
    for user, case in cases:
        users.setdefault(user, list(case.history)).append(case.item)
    return list(users.values())


def _rows(path: Path, items: Iterable[int], row_of: dict[int, int]) -> list[int]:
    try:
        return [row_of[item] for item in items]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: item {error} is not in the catalogue") from None


def _read_titles(folder: Path, row_of: dict[int, int], sids: np.ndarray) -> list[str]:
    titles = [f"item {item}, SID {' '.join(map(str, sids[row]))}" for item, row in row_of.items()]
    for path in folder.glob("*.item.json"):
        for item, fields in _read_json(path).items():
            if item.isdecimal() and int(item) in row_of and isinstance(fields, dict) and fields.get("title"):
                titles[row_of[int(item)]] = html.unescape(str(fields["title"]))
    return titles


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value
