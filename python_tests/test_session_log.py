"""Session logs: what is written is read back, and every damaged row or file is named."""

import json
import logging
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import raddpo_ext as rx
from raddpo_ext.data.session_log import read_sessions, write_sessions
from raddpo_ext.integrations.session_collator import SessionCollator

pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SUFFIXES = ("jsonl", "parquet")
VOCAB = rx.SIDVocab([3, 4], offset=10)  # levels are tokens 10 to 12 and 13 to 16
EOS_VOCAB = rx.SIDVocab([3, 4], offset=10, eos=5)
INDEX = rx.TrieIndex.build([[0, 1], [2, 3]], vocab=VOCAB)
EOS_INDEX = rx.TrieIndex.build([[0, 1], [2, 0]], lengths=[2, 1], vocab=EOS_VOCAB)
GOOD = {"prompt_ids": [1, 2], "positives": [[10, 14]], "negatives": [[12, 16]]}


def write(path, rows):
    """Without the checks of ``write_sessions``: any rows, whole lines where they are strings."""
    if path.suffix == ".jsonl":
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines))
    else:
        columns = dict.fromkeys(name for row in rows for name in row)
        pq.write_table(pa.Table.from_pylist([{**columns, **row} for row in rows]), path)
    return path


sids = st.lists(st.lists(st.integers(0, 2**31 - 2), min_size=1, max_size=4), max_size=3)
item_ids = st.lists(st.integers(0, 2**63 - 1), max_size=2)
sessions = st.builds(
    lambda prompt, positives, negatives: {
        "prompt_ids": prompt,
        "positives": positives,
        "negatives": [sid for sid in negatives if sid not in positives],
    },
    st.lists(st.integers(0, 2**31 - 2), min_size=1, max_size=5),
    sids,
    sids,
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(rows=st.lists(sessions, min_size=1, max_size=6))
def test_round_trip(tmp_path, suffix, rows):
    path = tmp_path / f"log.{suffix}"
    write_sessions(path, ({**row, "user": "u"} for row in rows))
    log = read_sessions(str(path))
    assert log.to_list() == rows
    write_sessions(path, log)  # over itself
    assert read_sessions(path).to_list() == rows
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(rows=st.lists(st.tuples(sessions, st.none() | item_ids), min_size=1, max_size=6))
def test_items(tmp_path, suffix, rows):
    """They stay where a row has some; the other rows' are empty then."""
    path = tmp_path / f"log.{suffix}"
    write_sessions(path, [row if items is None else {**row, "items": items} for row, items in rows])
    log = read_sessions(path)
    if all(items is None for _, items in rows):
        assert log.column_names == [*GOOD]
    else:
        assert log.to_list() == [{**row, "items": items or []} for row, items in rows]
        write_sessions(path, log)
        assert read_sessions(path).to_list() == log.to_list()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_items_that_begin_late(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("raddpo_ext.data.session_rows.CHUNK", 3)
    path = tmp_path / f"log.{suffix}"
    write_sessions(path, [*[GOOD] * 7, {**GOOD, "items": [1]}])
    assert read_sessions(path, index=INDEX)["items"][:] == [[]] * 7 + [[1]]
    collate = SessionCollator(embeddings=False)
    assert collate(list(read_sessions(path)))["items"].tolist() == [[-1]] * 7 + [[1]]
    write_sessions(path, [GOOD, {**GOOD, "items": [1, 2**40]}])
    with pytest.raises(ValueError, match=r"(line 2|row 1): items holds 1099511627776, which is not in the index$"):
        read_sessions(path, index=INDEX)
    assert read_sessions(path, index=INDEX, on_error="skip").to_list() == [GOOD]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_more_rows_than_a_chunk(tmp_path, monkeypatch, caplog, suffix):
    monkeypatch.setattr("raddpo_ext.data.session_rows.CHUNK", 3)
    rows = [{**GOOD, "prompt_ids": [number]} for number in range(10)]
    path = tmp_path / f"log.{suffix}"
    write_sessions(path, rows)
    assert read_sessions(path, vocab=VOCAB, index=INDEX).to_list() == rows
    assert not caplog.records
    rows[3]["negatives"] = [[10, 13]]
    rows[8]["positives"] = []
    write_sessions(path, rows)
    kept = read_sessions(path, index=INDEX, on_error="skip")
    assert [row["prompt_ids"][0] for row in kept] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    place = "line 4" if suffix == "jsonl" else "row 3"
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: skipped 1 of 10 rows: 1 not in the index ({place}); of the others 1 have no positives, 0 no negatives"
    ]
    with pytest.raises(ValueError, match=f"{path}: {place}: negatives\\[0\\] = \\[10, 13\\] is not in the index"):
        read_sessions(path, index=INDEX)


BAD = {
    "missing column": ({"prompt_ids": [1], "positives": []}, "has no negatives"),
    "not integers": ({**GOOD, "prompt_ids": [1.5]}, r"prompt_ids must be a list of integers, got \[1.5\]"),
    "not a token id": ({**GOOD, "positives": [[10, -14]]}, r"positives\[0\] holds -14, which is not a token id"),
    "empty prompt": ({**GOOD, "prompt_ids": []}, "prompt_ids is empty"),
    "empty candidate": ({**GOOD, "negatives": [[3], []]}, r"negatives\[1\] is empty"),
    "not an item id": ({**GOOD, "items": [3, -1]}, "items holds -1, which is not an item id"),
    "both positive and negative": (
        {**GOOD, "positives": [[3], [10, 14]], "negatives": [[4], [10, 14]]},
        r"positives\[1\] and negatives\[1\] are both \[10, 14\]",
    ),
}
MORE_BAD = {
    "not valid JSON": ['{"prompt_ids": [1], "positi', "[" * 100_000, '{"prompt_ids": [1' + "0" * 5000 + "]}"],
    "expected an object, got list": ["[1]"],
    "has no positives": [{**GOOD, "positives": None}],
    "prompt_ids must be a list of integers": [
        {**GOOD, "prompt_ids": value} for value in ([True], ["1"], [None], [2.0], 3, "12", {"a": 1})
    ],
    r"negatives must be a list of lists of integers, got 3": [{**GOOD, "negatives": 3}],
    r"negatives\[1\] must be a list of integers, got 12": [{**GOOD, "negatives": [[3], 12]}],
    "items must be a list of integers": [{**GOOD, "items": value} for value in (3, ["3"], [[3]], "12")],
    "items holds 9223372036854775808, which is not an item id": [{**GOOD, "items": [2**63]}],
    "prompt_ids holds 2147483647, which is not a token id": [{**GOOD, "prompt_ids": [1, 2**31 - 1]}],
}


@pytest.mark.parametrize(
    ("suffix", "reason"),  # a column of parquet has one type
    [(suffix, reason) for suffix in SUFFIXES for reason in BAD if (suffix, reason) != ("parquet", "not integers")],
)
def test_bad_row(tmp_path, caplog, suffix, reason):
    row, message = BAD[reason]
    path = write(tmp_path / f"log.{suffix}", [GOOD, GOOD, row, GOOD, row])
    place = "line 3" if suffix == "jsonl" else "row 2"
    with pytest.raises(ValueError, match=f"^{path}: {place}: {message}$"):
        read_sessions(path)
    assert not caplog.records
    assert read_sessions(path, on_error="skip").to_list() == [GOOD] * 3
    (record,) = caplog.records
    places = "line 3, 5" if suffix == "jsonl" else "row 2, 4"
    assert record.getMessage().startswith(f"{path}: skipped 2 of 5 rows: 2 {reason} ({places});")
    assert (record.name, record.levelno) == ("raddpo_ext.data.session_log", logging.WARNING)
    with pytest.raises(ValueError, match=rf"^rows\[1\]: {message}$"):
        write_sessions(path, [GOOD, row])
    assert read_sessions(path, on_error="skip").to_list() == [GOOD] * 3  # the old file
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("message", "row"), [(message, row) for message, rows in MORE_BAD.items() for row in rows])
def test_bad_line(tmp_path, message, row):
    path = write(tmp_path / "log.jsonl", ["", GOOD, "  ", row])
    with pytest.raises(ValueError, match=f"{path}: line 4: {message}"):
        read_sessions(path)
    assert read_sessions(path, on_error="skip").to_list() == [GOOD]


def test_a_line_that_is_no_text(tmp_path):
    path = write(tmp_path / "log.jsonl", [GOOD])
    with open(path, "ab") as file:
        file.write(b'{"prompt_ids": "\xff\xfe"}')
    with pytest.raises(ValueError, match="line 2: not valid JSON: 'utf-8' codec"):
        read_sessions(path)


def test_columns_of_another_type(tmp_path):
    path = write(tmp_path / "floats.parquet", [{**GOOD, "prompt_ids": [1.0]}])
    with pytest.raises(ValueError, match=r"floats.parquet: row 0: prompt_ids must be a list of integers, got \[1.0\]"):
        read_sessions(path)
    path = write(tmp_path / "text.parquet", [{**GOOD, "negatives": "3 4"}])
    with pytest.raises(ValueError, match="row 0: negatives must be a list of lists of integers, got '3 4'"):
        read_sessions(path)
    with pytest.raises(ValueError, match=r"holds no session; skipped 1 not integers \(row 0\)"):
        read_sessions(path, on_error="skip")
    small = pa.schema(
        [
            ("prompt_ids", pa.list_(pa.uint16())),
            *((c, pa.large_list(pa.list_(pa.int8()))) for c in ("positives", "negatives")),
        ]
    )
    pq.write_table(pa.Table.from_pylist([GOOD], schema=small), path)
    assert read_sessions(path).to_list() == [GOOD]


@pytest.mark.parametrize(
    ("vocab", "sid", "message"),
    [
        (VOCAB, [10, 14], None),
        (VOCAB, [10], None),  # whether that is a whole SID is for the index to say
        (VOCAB, [13, 14], "holds 13, which is not a token of level 0"),
        (VOCAB, [10, 17], "holds 17, which is not a token of level 1"),
        (VOCAB, [10, 14, 14], "has 3 codes, not 1 to 2"),
        (EOS_VOCAB, [10, 14, 5], None),
        (EOS_VOCAB, [10, 5], None),
        (EOS_VOCAB, [10, 14], "does not end in eos, 5"),
        (EOS_VOCAB, [5], "has 0 codes, not 1 to 2"),
        (EOS_VOCAB, [10, 5, 5], "holds 5, which is not a token of level 1"),
        (rx.SIDVocab([2], token_ids=[[7, -1]]), [7], None),
        (rx.SIDVocab([2], token_ids=[[7, -1]]), [8], "holds 8, which is not a token of level 0"),
    ],
)
def test_vocab(tmp_path, vocab, sid, message):
    path = write(tmp_path / "log.jsonl", [{"prompt_ids": [999], "positives": [], "negatives": [sid]}])
    if message is None:
        assert len(read_sessions(path, vocab=vocab)) == 1
    else:
        with pytest.raises(ValueError, match=rf"line 1: negatives\[0\] = \[.*\] {message}"):
            read_sessions(path, vocab=vocab)


@pytest.mark.parametrize(
    ("index", "sid", "known"),
    [
        (INDEX, [10, 14], True),
        (INDEX, [12, 16], True),
        (INDEX, [10, 16], False),
        (INDEX, [10], False),  # a prefix
        (INDEX, [10, 14, 14], False),
        (INDEX, [10, 14, 14, 3], False),
        (INDEX, [0, 1], False),  # codes
        (EOS_INDEX, [10, 14, 5], True),
        (EOS_INDEX, [12, 5], True),
        (EOS_INDEX, [10, 5], False),
        (EOS_INDEX, [10, 14], False),
        (EOS_INDEX, [12, 5, 5], False),
    ],
)
def test_index(tmp_path, index, sid, known):
    path = write(tmp_path / "log.jsonl", [{"prompt_ids": [1], "positives": [sid], "negatives": []}])
    if known:
        assert len(read_sessions(path, index=index)) == 1
    else:
        with pytest.raises(ValueError, match=r"line 1: positives\[0\] = \[.*\] is not in the index"):
            read_sessions(path, index=index)


def test_the_first_bad_row_is_named(tmp_path):
    """Also where its fault is found later than that of a row behind it."""
    rows = [GOOD, {**GOOD, "positives": [[10, 13]]}, {**GOOD, "prompt_ids": []}]
    with pytest.raises(ValueError, match=r"line 2: .* is not in the index"):
        read_sessions(write(tmp_path / "log.jsonl", rows), index=INDEX)


def test_many_bad_rows_are_counted_and_the_first_named(tmp_path, caplog):
    path = write(tmp_path / "log.jsonl", [{**GOOD, "negatives": []}, *["{"] * 7, {**GOOD, "positives": []}, GOOD])
    assert len(read_sessions(path, on_error="skip")) == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: skipped 7 of 10 rows: 7 invalid JSON (line 2, 3, 4, 5, 6, ...); "
        "of the others 1 have no positives, 1 no negatives"
    ]


def test_sessions_without_a_side_are_kept_and_counted(tmp_path, caplog):
    rows = [GOOD, {**GOOD, "positives": []}, {**GOOD, "negatives": []}, {**GOOD, "positives": [], "negatives": []}]
    path = write(tmp_path / "log.jsonl", rows)
    assert read_sessions(path, index=INDEX, vocab=VOCAB).to_list() == rows
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: skipped 0 of 4 rows; of the others 2 have no positives, 2 no negatives"


def test_files_that_are_no_logs(tmp_path):
    def refused(name, message, content=b""):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: {message}"):
            read_sessions(path, on_error="skip")

    refused("empty.jsonl", "holds no session$")
    refused("blank.jsonl", "holds no session$", b"\n \n")
    refused("bad.jsonl", r"holds no session; skipped 1 invalid JSON \(line 1\)", b"{")
    refused("empty.parquet", "damaged, or no parquet file: ")
    refused("text.parquet", "damaged, or no parquet file: ", b"user,item\n1,2\n" * 9)
    refused("log.csv", "not a kind of file that holds sessions: expected .jsonl or .parquet")
    for suffix in SUFFIXES:
        (tmp_path / f"folder.{suffix}").mkdir()
        for call in (read_sessions, lambda path: write_sessions(path, [GOOD])):
            with pytest.raises(ValueError, match=rf"folder.{suffix}: is a folder, not a file"):
                call(tmp_path / f"folder.{suffix}")
        with pytest.raises(FileNotFoundError, match=f"nowhere.{suffix}"):
            read_sessions(tmp_path / f"nowhere.{suffix}")
        with pytest.raises(ValueError, match="rows must hold at least one session, got none"):
            write_sessions(tmp_path / f"none.{suffix}", [])
        assert not (tmp_path / f"none.{suffix}").exists()
    path = write(tmp_path / "columns.parquet", [{"prompt_ids": [1], "chosen": [[2]]}])
    with pytest.raises(ValueError, match=r"has no column 'positives', only .*'chosen'"):
        read_sessions(path, on_error="skip")
    pq.write_table(pa.Table.from_pylist([GOOD]).slice(0, 0), path)
    with pytest.raises(ValueError, match=r"holds no session$"):
        read_sessions(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_never_passes_unseen(tmp_path, suffix):
    """Cut or altered, a file is read or refused by its name, with no other exception; what is read of a cut file is
    whole rows, and altered pages of parquet fail their checksums."""
    rng = random.Random(0)
    path = tmp_path / f"log.{suffix}"
    rows = [{"prompt_ids": [number, 2], "positives": [[3]], "negatives": [[4], [5, 6]]} for number in range(3)]
    write_sessions(path, rows)
    whole = path.read_bytes()
    refusals = []

    def read(content, **arguments):
        path.write_bytes(content)
        try:
            return read_sessions(path, **arguments).to_list()
        except ValueError as error:
            refusals.append(str(error))
            return None

    for end in rng.sample(range(len(whole) - 2), 60):
        assert read(whole[:end]) in (None, rows[: whole[:end].count(b"}")])
    begin, end = (0, len(whole)) if suffix == "jsonl" else _pages(whole)
    for _ in range(100):
        altered = bytearray(whole)
        altered[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
        found = read(altered, on_error=rng.choice(["skip", "raise"]))
        assert suffix == "jsonl" or found in (None, rows)
    assert len(refusals) > 60
    assert all(refusal.startswith(f"{path}: ") and "\n" not in refusal for refusal in refusals)


def _pages(whole):
    """Where the pages lie in a parquet file: between its magic number and the footer."""
    return 4, len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")


def test_rows_that_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match=r"rows\[0\]: prompt_ids must be a list of integers, got array"):
        write_sessions(tmp_path / "log.jsonl", [{**GOOD, "prompt_ids": np.array([1])}])
    with pytest.raises(ValueError, match=r"rows\[0\]: expected an object, got int"):
        write_sessions(tmp_path / "log.jsonl", [3])
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    path = write(tmp_path / "log.jsonl", [GOOD])
    with pytest.raises(ValueError, match="on_error must be one of 'raise', 'skip', got 'ignore'"):
        read_sessions(path, on_error="ignore")
    with pytest.raises(TypeError, match="vocab must be a SIDVocab, got TrieIndex"):
        read_sessions(path, vocab=INDEX)
    with pytest.raises(TypeError, match="index must be a TrieIndex, got SIDVocab"):
        read_sessions(path, index=VOCAB)


def test_without_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    path = write(tmp_path / "log.jsonl", [GOOD])
    with pytest.raises(ImportError, match="session logs need datasets, which `pip install datasets` brings"):
        read_sessions(path)
    write_sessions(path, [GOOD])  # needs nothing


def test_torch_dataloader(tmp_path):
    """Rows come as the collator takes them: dicts of lists."""
    torch = pytest.importorskip("torch")
    path = write(tmp_path / "log.jsonl", [GOOD, GOOD])
    loader = torch.utils.data.DataLoader(read_sessions(path), batch_size=2, collate_fn=list)
    assert next(iter(loader)) == [GOOD, GOOD]
