"""read_sids on any CSV, TSV or Parquet file; the first byte says which. What is read can be indexed and named."""

from __future__ import annotations

import random
import re

import raddpo_ext as rx
from fuzz.scratch import FOLDER, names
from raddpo_ext.index.readers import read_sids
from raddpo_ext.index.sid_text import LARGEST_CODE, MOST_LEVELS

SUFFIXES = (".csv", ".tsv", ".parquet")
#: What a table's readers may stumble over.
PIECES = (
    *(b",", b";", b"\t", b"\n", b"\r", b"\r\n", b'"', b'""', b"'", b"\0", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80"),
    *(b"-1", b"-1.0", b"0.0", b"007", b"2147483647", b"9223372036854775808", b"1e9", b"nan", b"9" * 5000, b"[" * 2000),
    *(b"<a_1>", b"<s_b_2>", b"<|sid_begin|>", b"id", b"sid", b"title", b"c0", b"code_1", b"\xc2\xa0", b"\xe2\x80\xae"),
)


def run(data: bytes) -> ValueError | None:
    """The error, where it is refused."""
    path = FOLDER / f"x{SUFFIXES[data[0] % 3 if data else 0]}"
    path.write_bytes(data[1:])
    try:
        table = read_sids(path)
    except ValueError as error:
        names(error, path)
        return error
    count, levels = table.sids.shape
    lengths = [levels] * count if table.lengths is None else table.lengths.tolist()
    assert min(lengths) >= 1
    assert max(lengths) == levels <= MOST_LEVELS
    for row, length in zip(table.sids.tolist(), lengths, strict=True):
        assert 0 <= min(row[:length]) <= max(row[:length]) <= LARGEST_CODE
    assert (table.ids is None) != (table.item_ids is None)
    ids = table.item_ids.tolist() if table.ids is None else table.ids
    assert len(set(ids)) == count
    assert table.titles is None or len(table.titles) == count
    found = rx.IdMap.of(table)
    if found is not None:
        assert found.ids_of(found.items_of(ids)) == ids
    return None


def changed(data: bytes, rng: random.Random) -> bytes:
    """A few of its bytes flipped, cut out or repeated, or pieces put in."""
    for _ in range(rng.randint(1, 2)):
        at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        part = rng.choice([b"", data[at:to] * 2, rng.choice(PIECES), bytes([rng.randrange(256)])])
        end = at + 1 if rng.random() < 0.7 else to
        data = data[:at] + part + data[end:]
    return data


def names_a_row(message: str) -> bool:
    """Whether an error says where, unless it is of the whole file."""
    whole = ("has two columns", "which column is", "has no column", "holds no items", "are not numbered", "damaged")
    return bool(re.search(r": (row|line) [0-9]+\b", message)) or any(part in message for part in whole)
