"""Session logs: jsonl and parquet files of prompts with their positives and negatives, as token ids."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch

from raddpo_ext import _check
from raddpo_ext._files import replacing
from raddpo_ext.data.session_sids import SIDCheck, contained
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.trie_items import places_of
from raddpo_ext.index.vocab import SIDVocab

COLUMNS = ("prompt_ids", "positives", "negatives")
ITEMS = "items"  # the optional column
_CHUNK = 8192  # sessions that are Python objects at the same time
_TOKENS = range(2**31 - 1)
_ITEM_IDS = range(2**63)
_SHOWN = 5  # bad rows per reason that the log names

_log = logging.getLogger(__name__)


class _BadRow(Exception):
    """Why a row is not a session: a reason to count by, and a message about this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_sessions(
    path: str | os.PathLike[str],
    *,
    vocab: SIDVocab | None = None,
    index: TrieIndex | None = None,
    on_error: str = "raise",
) -> Any:
    """Read a session log into memory.

    A row holds ``prompt_ids``, a list of token ids, and ``positives`` (the winner first) and ``negatives``, lists of
    SIDs: lists of token ids, with the end token if the vocab has one. It may also hold ``items``, the positives' item
    ids, for the ``item_*`` metrics of :class:`RADDPOTrainer <raddpo_ext.integrations.transformers.RADDPOTrainer>`.
    ``.jsonl`` has one object per line, and blank lines are skipped; ``.parquet`` has these columns. Other
    columns are dropped.

    A session without positives or without negatives is kept, but adds nothing to the preference loss. One record of
    ``logging`` (with this module's name) says how many there are, together with what was skipped.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        vocab: also check that every candidate is a SID of this vocabulary: each token belongs to its level, and with
            ``eos`` the candidate ends in it.
        index: also check that every candidate is the SID of an item of this index, and that it has the items.
        on_error: what to do with a row that is not a session: ``"raise"`` ValueError for the first one, or ``"skip"``
            them and log their number and rows for each reason. Reasons: invalid JSON, a missing column, not integers,
            a number that is not a token id or item id, an empty prompt, an empty candidate, a SID both positive and
            negative, not of the vocab, not in the index.

    Returns:
        ``datasets.Dataset`` of int64 lists in the columns :data:`COLUMNS`, in the file's order. If any row has
        ``items``, all have it, empty where the file has none.

    Raises:
        ValueError: a row is not a session: names the file, and the line of jsonl (counted from 1) or the row of parquet
            (from 0). Also if the path is a folder, or the file is damaged, lacks a column or has no session.
        ImportError: ``datasets`` is not installed.
        OSError: the file cannot be opened.

    Example:
        >>> row = {"prompt_ids": [1, 2], "positives": [[3, 7]], "negatives": [[3, 8], [4, 7]]}
        >>> rx.write_sessions("log.jsonl", [row])
        >>> sessions = rx.read_sessions("log.jsonl", vocab=rx.SIDVocab([2, 2], offsets=[3, 7]))
        >>> sessions[0]["negatives"]
        [[3, 8], [4, 7]]
    """
    datasets, arrow = _import("datasets"), _import("pyarrow")
    _check.choice(on_error, "on_error", ("raise", "skip"))
    if vocab is not None:
        _check.instance(vocab, "vocab", SIDVocab)
    if index is not None:
        _check.instance(index, "index", TrieIndex)
    path = Path(path)
    read, kind = (_read_jsonl, "line") if _is_jsonl(path) else (_read_parquet, "row")
    counts, skipped, tables = Counter[str](), defaultdict[str, list[int]](list), []
    # Sort out the rows in chunks, which bounds the Python objects in memory.
    rows = read(path)
    while chunk := list(islice(rows, _CHUNK)):
        sessions, bad = _sort_out(chunk, vocab, index)
        for place, error in sorted(bad.items()):
            if on_error == "raise":
                raise ValueError(f"{path}: {kind} {place}: {error}")
            skipped[error.reason].append(place)
        counts["rows"] += len(chunk)
        counts[ITEMS] += sum(ITEMS in session for session in sessions)
        for column in COLUMNS[1:]:
            counts[column] += sum(not session[column] for session in sessions)
        sessions = [{ITEMS: [], **session} for session in sessions]
        tables.append(arrow.Table.from_pylist(sessions, schema=_schema(arrow)))
    # Report what was skipped, in one record.
    reasons = "; ".join(
        f"{len(places)} {reason} ({kind} {', '.join(map(str, places[:_SHOWN]))}{', ...' * (len(places) > _SHOWN)})"
        for reason, places in skipped.items()
    )
    num_skipped = sum(map(len, skipped.values()))
    if num_skipped == counts["rows"]:
        raise ValueError(f"{path}: holds no session" + (f"; skipped {reasons}" if reasons else ""))
    if num_skipped or counts["positives"] or counts["negatives"]:
        _log.warning(
            "%s: skipped %d of %d rows%s; of the others %d have no positives, %d no negatives",
            *(path, num_skipped, counts["rows"], f": {reasons}" if reasons else ""),
            *(counts["positives"], counts["negatives"]),
        )
    # A log without items has no such column.
    table = arrow.concat_tables(tables)
    return datasets.Dataset(table if counts[ITEMS] else table.drop_columns([ITEMS]))


def write_sessions(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write sessions to a file that :func:`read_sessions` reads, atomically: readers see the old file or the new one.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        rows: mappings with the columns :data:`COLUMNS` as lists of ints and optionally ``items``, or a
            ``datasets.Dataset`` of them. Other columns are dropped.

    Raises:
        ValueError: :func:`read_sessions` would refuse a row (named by its number from 0), or there are no rows.
        ImportError: ``pyarrow`` is not installed, for parquet.

    Example:
        >>> rx.write_sessions("log.jsonl", [{"prompt_ids": [1, 2], "positives": [[3, 7]], "negatives": [[3, 8]]}])
        >>> with open("log.jsonl") as file:
        ...     file.read()
        '{"prompt_ids":[1,2],"positives":[[3,7]],"negatives":[[3,8]]}\\n'
    """
    path = Path(path)
    write = _write_jsonl if _is_jsonl(path) else _write_parquet
    with replacing(path) as file:
        write(file, _checked_rows(rows))


def _import(name: str) -> Any:
    """Import an optional package, or raise an ImportError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"session logs need {name}, which `pip install datasets` brings: {error}") from error


def _is_jsonl(path: Path) -> bool:
    """Whether a path names a jsonl file; raises ValueError for other files than jsonl and parquet."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: not a kind of file that holds sessions: expected .jsonl or .parquet")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a file")
    return path.suffix == ".jsonl"


def _schema(arrow: Any) -> Any:
    """The column types of a table of sessions, ``items`` included."""
    ids = arrow.list_(arrow.int64())
    columns = zip((*COLUMNS, ITEMS), (ids, arrow.list_(ids), arrow.list_(ids), ids), strict=True)
    return arrow.schema(list(columns))


def _read_jsonl(path: Path) -> Iterator[tuple[int, bytes]]:
    """Every line that is not blank, with its number."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, line


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row, with its number."""
    parquet = _import("pyarrow.parquet")
    with open(path, "rb") as file:
        try:
            table = parquet.ParquetFile(file, page_checksum_verification=True)
            for column in COLUMNS:
                if column not in table.schema_arrow.names:
                    raise _BadRow("missing column", f"has no column {column!r}, only {table.schema_arrow.names}")
            columns = [*COLUMNS, *(name for name in table.schema_arrow.names if name == ITEMS)]
            batches = table.iter_batches(_CHUNK, columns=columns)
            yield from enumerate(row for batch in batches for row in batch.to_pylist())
        except _BadRow as error:
            raise ValueError(f"{path}: {error}") from None
        except MemoryError:
            raise
        except Exception as error:  # pyarrow raises a dozen types for a damaged file or a strange column
            raise ValueError(f"{path}: damaged, or no parquet file: {' '.join(str(error).split())}") from None


def _write_jsonl(file: BinaryIO, rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")


def _write_parquet(file: BinaryIO, rows: Iterator[dict[str, Any]]) -> None:
    arrow, parquet = _import("pyarrow"), _import("pyarrow.parquet")
    with parquet.ParquetWriter(file, _schema(arrow), write_page_checksum=True) as writer:
        while chunk := list(islice(rows, _CHUNK)):
            writer.write_table(arrow.Table.from_pylist(chunk, schema=_schema(arrow)))


def _checked_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of ``write_sessions``, checked one by one."""
    number = -1
    for number, row in enumerate(rows):
        try:
            yield _session(row, None)
        except _BadRow as error:
            raise ValueError(f"rows[{number}]: {error}") from None
    if number < 0:
        raise ValueError("rows must hold at least one session, got none")


def _sort_out(
    chunk: list[tuple[int, Any]], vocab: SIDVocab | None, index: TrieIndex | None
) -> tuple[list[dict[str, Any]], dict[int, _BadRow]]:
    """The sessions among some numbered rows, and for every other row the reason, by its number."""
    check = None if vocab is None else SIDCheck(vocab)
    sessions: dict[int, dict[str, Any]] = {}
    bad: dict[int, _BadRow] = {}
    for place, row in chunk:
        try:
            sessions[place] = _session(row, check)
        except _BadRow as error:
            bad[place] = error
    if index is not None:
        # Look up all candidates of the chunk at once, and then all items.
        named = [(place, *found) for place, session in sessions.items() for found in _candidates(session)]
        for (place, name, sid), known in zip(named, contained(index, [sid for *_, sid in named]), strict=True):
            if not known:
                bad.setdefault(place, _BadRow("not in the index", f"{name} = {sid} is not in the index"))
        owned = [(place, item) for place, session in sessions.items() for item in session.get(ITEMS, ())]
        items = torch.tensor([item for _, item in owned], dtype=torch.int64)
        places = places_of(items, index.items).tolist() if owned else []  # passes once over the whole index
        for (place, item), found in zip(owned, places, strict=True):
            if found < 0:
                bad.setdefault(place, _BadRow("not in the index", f"items holds {item}, which is not in the index"))
    return [session for place, session in sessions.items() if place not in bad], bad


def _session(row: Any, check: SIDCheck | None) -> dict[str, Any]:
    """The columns of a row, which is a line of JSON or a mapping."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise _BadRow("invalid JSON", f"not valid JSON: {error}") from None
    if not isinstance(row, Mapping):
        raise _BadRow("invalid JSON", f"expected an object, got {type(row).__name__}")
    for column in COLUMNS:
        if row.get(column) is None:
            raise _BadRow("missing column", f"has no {column}")
    # The columns hold ids, and the candidates are SIDs of the vocabulary.
    session = {column: row[column] for column in COLUMNS}
    _check_ids("prompt_ids", session["prompt_ids"], "empty prompt")
    for column in COLUMNS[1:]:
        if not isinstance(session[column], list):
            raise _BadRow("not integers", f"{column} must be a list of lists of integers, got {session[column]!r:.60}")
    for name, sid in _candidates(session):
        _check_ids(name, sid, "empty candidate")
        why = None if check is None else check.why_not(sid)
        if why is not None:
            raise _BadRow("not of the vocab", f"{name} = {sid} {why}")
    if row.get(ITEMS) is not None:
        session[ITEMS] = row[ITEMS]
        _check_ids(ITEMS, session[ITEMS], None, _ITEM_IDS, "an item id")
    # No SID may be both preferred and not.
    negatives = {tuple(sid): place for place, sid in enumerate(session["negatives"])}
    for place, sid in enumerate(session["positives"]):
        if tuple(sid) in negatives:
            detail = f"positives[{place}] and negatives[{negatives[tuple(sid)]}] are both {sid}"
            raise _BadRow("both positive and negative", detail)
    return session


def _candidates(session: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The candidates of a session, each with its name in errors."""
    for column in COLUMNS[1:]:
        for place, sid in enumerate(session[column]):
            yield f"{column}[{place}]", sid


def _check_ids(name: str, ids: Any, empty: str | None, possible: range = _TOKENS, kind: str = "a token id") -> None:
    """Raise _BadRow unless ``ids`` are possible ids. ``empty``: the reason to refuse an empty list, or None."""
    if not isinstance(ids, list) or not set(map(type, ids)) <= {int}:
        raise _BadRow("not integers", f"{name} must be a list of integers, got {ids!r:.60}")
    if not ids and empty is not None:
        raise _BadRow(empty, f"{name} is empty")
    for number in (min(ids, default=0), max(ids, default=0)):
        if number not in possible:
            raise _BadRow(f"not {kind}", f"{name} holds {number}, which is not {kind}")
