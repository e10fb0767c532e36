"""read_sessions on any bytes; the first byte says of which kind of file, and against what rows are held."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import raddpo_ext as rx
from fuzz.scratch import FOLDER, names
from raddpo_ext.data.session_log import read_sessions, write_sessions

VOCAB = rx.SIDVocab([4, 4], offset=10, eos=9)
INDEX = rx.TrieIndex.build([[0, 1], [1, 2], [3, 3]], vocab=VOCAB)
_TYPES = (
    pa.list_(pa.int64()),
    pa.list_(pa.list_(pa.int64())),
    pa.list_(pa.list_(pa.int32())),
    pa.list_(pa.uint64()),
    pa.large_list(pa.int8()),
    pa.list_(pa.float64()),
    pa.list_(pa.timestamp("s")),
    pa.list_(pa.date64()),
    pa.map_(pa.int32(), pa.int32()),
    pa.struct([("a", pa.int64())]),
    pa.dictionary(pa.int8(), pa.string()),
    pa.binary(),
    pa.duration("s"),
    pa.decimal128(5, 2),
)


def run(data: bytes) -> None:
    choice, content = (data[0] if data else 0), data[1:]
    path = FOLDER / ("x.jsonl", "x.parquet", "x.parquet")[choice % 3]
    path.unlink(missing_ok=True)
    if choice % 3 == 2:
        content = _parquet(content)
    path.write_bytes(content)
    options = {"vocab": VOCAB if choice & 64 else None, "index": INDEX if choice & 128 else None}
    try:
        kept = read_sessions(path, on_error="skip", **options)
    except ValueError as error:
        return names(error, path)
    try:
        assert len(read_sessions(path, **options)) == len(kept)
    except ValueError as error:
        names(error, path)
    rows = kept.to_list()
    for row in rows:
        assert row["prompt_ids"]
        assert not set(map(tuple, row["positives"])) & set(map(tuple, row["negatives"]))
    again = FOLDER / ("again.parquet" if choice % 3 else "again.jsonl")
    write_sessions(again, kept)
    assert read_sessions(again).to_list() == rows


def _parquet(recipe: bytes) -> bytes:
    """A sound file whose columns have the names, types and values that the recipe says."""
    numbers = [*recipe.ljust(8, b"\0")]
    rng, rows = np.random.default_rng(numbers), numbers[6] % 4
    called = [("prompt_ids", "positives", "negatives", "items", "other")[n % 5] for n in numbers[:4]]
    out = pa.BufferOutputStream()
    try:
        columns = [_array(rng, _TYPES[n % len(_TYPES)], rows) for n in numbers[3:7]]
        pq.write_table(pa.table(columns, names=called), out)
    except (pa.ArrowException, OverflowError):  # not all types have all values, nor does parquet have all types
        return recipe
    return out.getvalue().to_pybytes()


def _array(rng: np.random.Generator, kind: pa.DataType, rows: int) -> pa.Array:
    """Some nulls, few entries, numbers of every size."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        counts = rng.integers(0, 3, rows)
        offsets = pa.array(
            np.concatenate([[0], np.cumsum(counts)]), pa.int64() if pa.types.is_large_list(kind) else pa.int32()
        )
        make = pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray
        return make.from_arrays(offsets, _array(rng, kind.value_type, int(counts.sum())))
    values = rng.integers(0, 20, rows) if rng.random() < 0.7 else rng.integers(-(2**62), 2**62, rows)
    return pa.array(values, mask=rng.random(rows) < 0.05).cast(kind, safe=False)
