"""Session logs: jsonl and parquet files of prompts with their positives and negatives, as token ids."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from raddpo_ext import _check
from raddpo_ext._files import replacing
from raddpo_ext.data.session_rows import (
    CHUNK,
    COLUMNS,
    ITEMS,
    BadRow,
    described,
    imported,
    is_jsonl,
    no_session,
    place_kind,
    session_chunks,
    session_of,
)
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab

_log = logging.getLogger(__name__)


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
    datasets, arrow = imported("datasets"), imported("pyarrow")
    _check.choice(on_error, "on_error", ("raise", "skip"))
    if vocab is not None:
        _check.instance(vocab, "vocab", SIDVocab)
    if index is not None:
        _check.instance(index, "index", TrieIndex)
    path = Path(path)
    kind = place_kind(path)
    counts, skipped, tables = Counter[str](), defaultdict[str, list[int]](list), []
    for chunk, bad in session_chunks(path, vocab, index):
        for place, error in sorted(bad.items()):
            if on_error == "raise":
                raise ValueError(f"{path}: {kind} {place}: {error}")
            skipped[error.reason].append(place)
        sessions = list(chunk.values())
        counts["rows"] += len(sessions) + len(bad)
        counts[ITEMS] += sum(ITEMS in session for session in sessions)
        for column in COLUMNS[1:]:
            counts[column] += sum(not session[column] for session in sessions)
        sessions = [{ITEMS: [], **session} for session in sessions]
        tables.append(arrow.Table.from_pylist(sessions, schema=_schema(arrow)))
    # Report what was skipped, in one record.
    num_skipped = sum(map(len, skipped.values()))
    if num_skipped == counts["rows"]:
        raise no_session(path, skipped)
    reasons = described(skipped, kind)
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
    write = _write_jsonl if is_jsonl(path) else _write_parquet
    with replacing(path) as file:
        write(file, _checked_rows(rows))


def _schema(arrow: Any) -> Any:
    """The column types of a table of sessions, ``items`` included."""
    ids = arrow.list_(arrow.int64())
    columns = zip((*COLUMNS, ITEMS), (ids, arrow.list_(ids), arrow.list_(ids), ids), strict=True)
    return arrow.schema(list(columns))


def _write_jsonl(file: BinaryIO, rows: Iterator[dict[str, Any]]) -> None:
    for row in rows:
        file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")


def _write_parquet(file: BinaryIO, rows: Iterator[dict[str, Any]]) -> None:
    arrow, parquet = imported("pyarrow"), imported("pyarrow.parquet")
    with parquet.ParquetWriter(file, _schema(arrow), write_page_checksum=True) as writer:
        while chunk := list(islice(rows, CHUNK)):
            writer.write_table(arrow.Table.from_pylist(chunk, schema=_schema(arrow)))


def _checked_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of ``write_sessions``, checked one by one."""
    number = -1
    for number, row in enumerate(rows):
        try:
            yield session_of(row, None)
        except BadRow as error:
            raise ValueError(f"rows[{number}]: {error}") from None
    if number < 0:
        raise ValueError("rows must hold at least one session, got none")
