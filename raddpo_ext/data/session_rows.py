"""The rows of a session log, read from its file: which of them are sessions, and why the others are not."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from raddpo_ext.data.session_sids import SIDCheck, contained
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.trie_items import places_of
from raddpo_ext.index.vocab import SIDVocab

COLUMNS = ("prompt_ids", "positives", "negatives")
ITEMS = "items"  # the optional column
CHUNK = 8192  # sessions that are Python objects at the same time
SHOWN = 5  # bad rows per reason that a message names
_TOKENS = range(2**31 - 1)
_ITEM_IDS = range(2**63)


class BadRow(Exception):
    """Why a row is not a session: a reason to count by, and a message about this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def session_chunks(
    path: Path, vocab: SIDVocab | None = None, index: TrieIndex | None = None
) -> Iterator[tuple[dict[int, dict[str, Any]], dict[int, BadRow]]]:
    """The sessions of a log, and why its other rows are none, by the rows' numbers.

    They come in chunks, which bounds the Python objects in memory.
    """
    rows: Iterator[tuple[int, Any]] = _read_jsonl(path) if is_jsonl(path) else _read_parquet(path)
    while chunk := list(islice(rows, CHUNK)):
        yield _sort_out(chunk, vocab, index)


def place_kind(path: Path) -> str:
    """What a row's number counts: lines of jsonl from 1, rows of parquet from 0."""
    return "line" if is_jsonl(path) else "row"


def described(skipped: Mapping[str, Sequence[int]], kind: str) -> str:
    """How many rows were skipped for each reason, and the numbers of the first ones."""
    return "; ".join(
        f"{len(places)} {reason} ({kind} {', '.join(map(str, places[:SHOWN]))}{', ...' * (len(places) > SHOWN)})"
        for reason, places in skipped.items()
    )


def no_session(path: Path, skipped: Mapping[str, Sequence[int]]) -> ValueError:
    """The error for a log of skipped rows only."""
    return ValueError(
        f"{path}: holds no session" + (f"; skipped {described(skipped, place_kind(path))}" if skipped else "")
    )


def imported(name: str) -> Any:
    """Import an optional package, or raise an ImportError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"session logs need {name}, which `pip install datasets` brings: {error}") from error


def is_jsonl(path: Path) -> bool:
    """Whether a path names a jsonl file; raises ValueError for other files than jsonl and parquet."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: not a kind of file that holds sessions: expected .jsonl or .parquet")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a file")
    return path.suffix == ".jsonl"


def _read_jsonl(path: Path) -> Iterator[tuple[int, bytes]]:
    """Every line that is not blank, with its number."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, line


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row, with its number."""
    parquet = imported("pyarrow.parquet")
    with open(path, "rb") as file:
        try:
            table = parquet.ParquetFile(file, page_checksum_verification=True)
            for column in COLUMNS:
                if column not in table.schema_arrow.names:
                    raise BadRow("missing column", f"has no column {column!r}, only {table.schema_arrow.names}")
            columns = [*COLUMNS, *(name for name in table.schema_arrow.names if name == ITEMS)]
            batches = table.iter_batches(CHUNK, columns=columns)
            yield from enumerate(row for batch in batches for row in batch.to_pylist())
        except BadRow as error:
            raise ValueError(f"{path}: {error}") from None
        except MemoryError:
            raise
        except Exception as error:  # pyarrow raises a dozen types for a damaged file or a strange column
            raise ValueError(f"{path}: damaged, or no parquet file: {' '.join(str(error).split())}") from None


def _sort_out(
    chunk: list[tuple[int, Any]], vocab: SIDVocab | None, index: TrieIndex | None
) -> tuple[dict[int, dict[str, Any]], dict[int, BadRow]]:
    """The sessions among some numbered rows, and for every other row the reason, by their numbers."""
    check = None if vocab is None else SIDCheck(vocab)
    sessions: dict[int, dict[str, Any]] = {}
    bad: dict[int, BadRow] = {}
    for place, row in chunk:
        try:
            sessions[place] = session_of(row, check)
        except BadRow as error:
            bad[place] = error
    if index is not None:
        # Look up all candidates of the chunk at once, and then all items.
        named = [(place, *found) for place, session in sessions.items() for found in _candidates(session)]
        for (place, name, sid), known in zip(named, contained(index, [sid for *_, sid in named]), strict=True):
            if not known:
                bad.setdefault(place, BadRow("not in the index", f"{name} = {sid} is not in the index"))
        owned = [(place, item) for place, session in sessions.items() for item in session.get(ITEMS, ())]
        items = torch.tensor([item for _, item in owned], dtype=torch.int64)
        places = places_of(items, index.items).tolist() if owned else []  # passes once over the whole index
        for (place, item), found in zip(owned, places, strict=True):
            if found < 0:
                bad.setdefault(place, BadRow("not in the index", f"items holds {item}, which is not in the index"))
    return {place: session for place, session in sessions.items() if place not in bad}, bad


def session_of(row: Any, check: SIDCheck | None) -> dict[str, Any]:
    """The columns of a row, which is a line of JSON or a mapping."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise BadRow("invalid JSON", f"not valid JSON: {error}") from None
    if not isinstance(row, Mapping):
        raise BadRow("invalid JSON", f"expected an object, got {type(row).__name__}")
    for column in COLUMNS:
        if row.get(column) is None:
            raise BadRow("missing column", f"has no {column}")
    # The columns hold ids, and the candidates are SIDs of the vocabulary.
    session = {column: row[column] for column in COLUMNS}
    _check_ids("prompt_ids", session["prompt_ids"], "empty prompt")
    for column in COLUMNS[1:]:
        if not isinstance(session[column], list):
            raise BadRow("not integers", f"{column} must be a list of lists of integers, got {session[column]!r:.60}")
    for name, sid in _candidates(session):
        _check_ids(name, sid, "empty candidate")
        why = None if check is None else check.why_not(sid)
        if why is not None:
            raise BadRow("not of the vocab", f"{name} = {sid} {why}")
    if row.get(ITEMS) is not None:
        session[ITEMS] = row[ITEMS]
        _check_ids(ITEMS, session[ITEMS], None, _ITEM_IDS, "an item id")
    # No SID may be both preferred and not.
    negatives = {tuple(sid): place for place, sid in enumerate(session["negatives"])}
    for place, sid in enumerate(session["positives"]):
        if tuple(sid) in negatives:
            detail = f"positives[{place}] and negatives[{negatives[tuple(sid)]}] are both {sid}"
            raise BadRow("both positive and negative", detail)
    return session


def _candidates(session: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The candidates of a session, each with its name in errors."""
    for column in COLUMNS[1:]:
        for place, sid in enumerate(session[column]):
            yield f"{column}[{place}]", sid


def _check_ids(name: str, ids: Any, empty: str | None, possible: range = _TOKENS, kind: str = "a token id") -> None:
    """Raise BadRow unless ``ids`` are possible ids. ``empty``: the reason to refuse an empty list, or None."""
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        raise BadRow("not integers", f"{name} must be a list of integers, got {ids!r:.60}")
    if not ids and empty is not None:
        raise BadRow(empty, f"{name} is empty")
    for number in (min(ids, default=0), max(ids, default=0)):
        if number not in possible:
            raise BadRow(f"not {kind}", f"{name} holds {number}, which is not {kind}")
