"""A catalogue from a table with named columns: CSV or Parquet."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raddpo_ext.index.sid_text import LARGEST_CODE, MOST_LEVELS, codes_of, shown

_ITEM = ("item_id", "item", "id", "asin", "parent_asin", "sku")
_SID = ("sid", "semantic_id")
_TITLE = ("title",)
_NUMBERED = re.compile(r"(sid|code|c|level|l)_?([0-9]{1,2})")


class Columns(NamedTuple):
    """The columns of a table of ``N`` items.

    Attributes:
        rows: row numbers in the file, for error messages.
        items: item ids as text.
        codes: the codes of each SID, at least one.
        titles: the titles, or None if the table has no such column.
    """

    rows: list[int]
    items: list[str]
    codes: list[list[int]]
    titles: list[str] | None


def read_columns(path: Path, item: str | None, sid: Sequence[str] | None, title: str | None) -> Columns:
    """Read a table by the names of its columns, see :func:`raddpo_ext.read_sids`.

    Raises:
        ValueError: the table is malformed; names the row, if one is.
        OSError: the file cannot be opened.
    """
    names, rows = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"has two columns {name!r}")
    # Find the columns of the id, the SID and the title.
    lower = [name.strip().lower() for name in names]
    item_at = _column(names, lower, item, _ITEM, "the item's id", "item")
    sid_at, of_codes = _sid_columns(names, lower, sid)
    title_at = _column(names, lower, title, _TITLE, "the title", "title") if title or "title" in lower else None
    # Read the rows. An error names the row.
    numbers: list[int] = []
    items: list[str] = []
    codes: list[list[int]] = []
    titles: list[str] = []
    for number, row in rows:
        numbers.append(number)
        try:
            items.append(_text(row[item_at], "the item's id"))
            codes.append(_codes(row[at] for at in sid_at) if of_codes else codes_of(_plain(row[sid_at[0]])))
            if title_at is not None:
                titles.append("" if row[title_at] is None else _text(row[title_at], "the title"))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
    if not items:
        raise ValueError("holds no items")
    return Columns(numbers, items, codes, None if title_at is None else titles)


def _column(names: list[str], lower: list[str], given: str | None, usual: Sequence[str], what: str, option: str) -> int:
    """The place of a column: that of the given name, or the only one with a usual name."""
    if given is not None:
        if given not in names:
            raise ValueError(f"has no column {given!r} for {what}, only {_listed(names)}")
        return names.index(given)
    found = [at for at, name in enumerate(lower) if name in usual]
    if len(found) != 1:
        several = f"columns {_listed([names[at] for at in found])}" if found else f"only {_listed(names)}"
        raise ValueError(f"cannot tell which column is {what}, it has {several}: give {option}")
    return found[0]


def _sid_columns(names: list[str], lower: list[str], given: Sequence[str] | None) -> tuple[list[int], bool]:
    """The columns of the SID, and whether each of them holds one code."""
    if given is not None:
        return [_column(names, lower, name, (), "the SID", "sid") for name in given], len(given) > 1
    numbered = [(match[1], int(match[2]), at) for at, name in enumerate(lower) if (match := _NUMBERED.fullmatch(name))]
    whole = [at for at, name in enumerate(lower) if name in _SID]
    if len(whole) + len({word for word, _, _ in numbered}) != 1:
        raise ValueError(
            f"cannot tell which column is the SID, or which are its codes, it has {_listed(names)}: give sid"
        )
    if whole:
        return whole, False
    numbered.sort()
    first = numbered[0][1]
    if first > 1 or [number for _, number, _ in numbered] != [*range(first, first + len(numbered))]:
        raise ValueError(f"the columns of the codes are not numbered consecutively from 0 or 1: {_listed(names)}")
    return [at for _, _, at in numbered], True


def _listed(names: Sequence[str]) -> str:
    """Column names for an error, at most 12."""
    return ", ".join(map(repr, names[:12])) + (", ..." if len(names) > 12 else "")


def _csv(path: Path) -> tuple[list[str], Iterator[tuple[int, Sequence[Any]]]]:
    """The column names of a CSV or TSV file, and its numbered rows."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: not UTF-8 text: {error.reason}") from None
    # Excel writes semicolons where the comma is the decimal point.
    first = re.split("[\r\n]", text, maxsplit=1)[0]
    between = "\t" if path.suffix == ".tsv" else ";" if ";" in first and "," not in first else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)
    try:
        lines = [(number, row) for number, row in enumerate(reader) if row]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: not a {path.suffix[1:].upper()} file: {error}") from None
    if not lines:
        raise ValueError("holds no items")
    names = lines[0][1]
    for number, row in lines:
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} fields, the first line {len(names)}")
    return names, iter(lines[1:])


def _parquet(path: Path) -> tuple[list[str], Iterator[tuple[int, Sequence[Any]]]]:
    """The column names of a Parquet file, and its numbered rows."""
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError("a .parquet file needs pyarrow: pip install pyarrow, or 'raddpo_ext[data]'") from None
    with open(path, "rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file).read()
            columns = [column.to_pylist() for column in table.columns]
        except Exception as error:  # pyarrow raises a dozen types for a damaged file, OSError among them
            raise ValueError(f"not a Parquet file, or damaged: {' '.join(str(error).split())}") from None
    return table.column_names, enumerate(zip(*columns, strict=True), 1)


def _text(value: Any, what: str) -> str:
    """An id or title as text. Refuses floats, whose digits may have been rounded."""
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    raise ValueError(f"{what} must be text or an integer, got {shown(value)}")


def _plain(sid: Any) -> Any:
    """The value of a SID column as :func:`codes_of` takes it."""
    return [sid] if type(sid) is int else sid


def _codes(cells: Iterator[Any]) -> list[int]:
    """The codes of a row's cells; empty cells may only follow the last code."""
    codes = [_code(cell) for cell in cells]
    end = next((level for level, code in enumerate(codes) if code < 0), len(codes))
    if end == 0 or any(code >= 0 for code in codes[end:]):
        raise ValueError(f"has no code at level {end}" + (", but one after it" if end else ""))
    if len(codes) > MOST_LEVELS:
        raise ValueError(f"a SID has at most {MOST_LEVELS} codes, got {len(codes)}")
    return codes[:end]


def _code(cell: Any) -> int:
    """The code of a cell, -1 for an empty cell."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return -1
    # Programs write an integer column that has empty cells as floats: 12.0.
    text = cell.strip() if isinstance(cell, str) else repr(cell)
    if text in ("", "-1", "-1.0"):
        return -1
    match = re.fullmatch(r"([0-9]{1,10})(\.0)?", text)
    if match is None or int(match[1]) > LARGEST_CODE:
        raise ValueError(f"a code must be an integer from 0 to {LARGEST_CODE}, got {shown(cell)}")
    return int(match[1])
