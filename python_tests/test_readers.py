"""Readers of SID files: what they return, and that every damaged or foreign file is refused by name."""

import io
import json
import random
import sys
import zipfile

import numpy as np
import pytest

import raddpo_ext as rx
from raddpo_ext.index.readers import read_sids


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_index_json(tmp_path):
    table = read_sids(write(tmp_path / "x.index.json", '{"7": ["<a_12>", "<b_3>"], "2": ["<a_0>", "<b_255>"]}'))
    np.testing.assert_array_equal(table.sids, [[12, 3], [0, 255]])
    np.testing.assert_array_equal(table.item_ids, [7, 2])
    assert table.lengths is None
    assert table.sizes == (13, 256)


def test_index_json_of_different_lengths(tmp_path):
    sids = {"0": ["<a_4>"], "1": ["<a_4>", "<b_1>", "<c_2>"], "2": ["<a_5>", "<b_0>"]}
    table = read_sids(write(tmp_path / "index.json", json.dumps(sids)))
    np.testing.assert_array_equal(table.sids, [[4, -1, -1], [4, 1, 2], [5, 0, -1]])
    np.testing.assert_array_equal(table.lengths, [1, 3, 2])
    assert table.sizes == (6, 2, 3)
    vocab = rx.SIDVocab(table.sizes, eos=100)
    index = rx.TrieIndex.build(table.sids, item_ids=table.item_ids, lengths=table.lengths, vocab=vocab)
    assert index.lookup([[4, -1, -1]], [1]).items.tolist() == [0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('{"0": ["<a_1>"]', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('[["<a_1>"]]', "expected an object .* got list"),
        ("{}", "holds no items"),
        ('{"0": {}}', "item '0' must have a list of tokens"),
        ('{"0": []}', "item '0' must have a list of tokens, got \\[\\]"),
        ('{"0": "<a_1>"}', "item '0' must have a list of tokens"),
        ('{"0": ["<a_>"]}', "item '0', level 0: expected a token such as '<a_12>', got '<a_>'"),
        ('{"0": ["<a_1>", 2]}', "item '0', level 1: .* got 2"),
        ('{"0": ["<a_1>", ["<b_1>"]]}', "item '0', level 1: .* got \\['<b_1>'\\]"),
        ('{"0": ["<a_-1>"]}', "got '<a_-1>'"),
        ('{"0": ["<a_1.5>"]}', "got '<a_1.5>'"),
        ('{"0": ["<a_99999999999>"]}', "got '<a_99999999999>'"),
        ('{"0": ["<a_1>", "<b_2>"], "5": ["<b_2>", "<a_1>"]}', "item '5', level 0: token '<b_2>' is of an.* <a_"),
        ('{"": ["<a_1>"]}', "item '' is empty"),
        ('{" 7": ["<a_1>"]}', "item ' 7' is empty, begins or ends with white space"),
        ('{"\\ud800": ["<a_1>"]}', "characters that cannot be printed"),
        ('{"0": ["<|sid_begin|>", "<|sid_end|>"]}', "item '0' must have a list of tokens"),
        ('{"0": ["<a_1>", "<|sid_end|>", "<b_1>"]}', "item '0', level 1: expected a token"),
        ('{"-1": ["<a_1>"]}', "item '-1' is not an integer"),
        ('{"3": ["<a_1>"], "3": ["<a_2>"]}', "item '3' appears twice"),
    ],
)
def test_bad_index_json(tmp_path, content, message):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match=message) as error:
        read_sids(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["u1", "i2", "<u4", ">i8"])
def test_npy(tmp_path, dtype):
    sids = np.array([[3, 1], [0, 200], [3, 1]], dtype)
    np.save(tmp_path / "sids.npy", sids)
    table = read_sids(tmp_path / "sids.npy")
    np.testing.assert_array_equal(table.sids, sids)
    assert table[1:] == (None, None, (4, 201), None, None)
    assert rx.TrieIndex.build(table.sids).num_sids == 2


def test_npy_padded_with_minus_one(tmp_path):
    np.save(tmp_path / "sids.npy", np.array([[3, 9, -1], [0, -1, -1], [1, 2, 0]]))
    table = read_sids(tmp_path / "sids.npy")
    np.testing.assert_array_equal(table.lengths, [2, 1, 3])
    assert table.sizes == (4, 10, 1)


def test_npz(tmp_path):
    # What lies beyond a length is not read: neither the -7 nor the 900.
    arrays = {"sids": np.array([[3, 9, -7], [5, 900, 900]]), "lengths": np.array([2, 1]), "item_ids": np.array([8, 2])}
    np.savez(tmp_path / "catalogue.npz", **arrays)
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    for name in ("catalogue.npz", "small.npz"):
        table = read_sids(tmp_path / name)
        for found, expected in zip(table[:3], arrays.values(), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert table.sizes == (6, 10, 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"codes": [[1]]}, "unknown array 'codes'"),
        ({"lengths": [1]}, "has no array 'sids', only 'lengths'"),
        ({}, "has no array 'sids', only none at all"),
        ({"sids": [1, 2]}, r"sids must have 2 dimensions, got shape \(2,\)"),
        ({"sids": 3}, r"sids must have 2 dimensions, got shape \(\)"),
        ({"sids": [[1.0, 2.0]]}, "sids must hold integers, got float64"),
        ({"sids": [[True]]}, "sids must hold integers, got bool"),
        ({"sids": np.array([[1, None]])}, "damaged: .*allow_pickle"),
        ({"sids": np.zeros((0, 3), int)}, r"sids holds no SIDs: its shape is \(0, 3\)"),
        ({"sids": np.zeros((3, 0), int)}, r"sids holds no SIDs: its shape is \(3, 0\)"),
        ({"sids": [[1, -2]]}, "negative code -2 at level 1"),
        ({"sids": [[-1, 2]]}, "negative code -1 at level 0"),
        ({"sids": [[1, 2], [-1, -1]]}, r"the SID of row 1 has length 0, outside \[1, 2\]"),
        ({"sids": [[1, 2]], "lengths": [3]}, r"the SID of row 0 has length 3, outside \[1, 2\]"),
        ({"sids": [[1, 2]], "lengths": [1.0]}, "lengths must hold integers, got float64"),
        ({"sids": [[1, 2]], "lengths": [[1]]}, "lengths must have 1 dimension, got shape"),
        ({"sids": [[1, 2]], "lengths": [1, 2]}, r"lengths must have one entry per row of sids \(1\), got 2"),
        ({"sids": [[1, 2]], "item_ids": [1, 2]}, r"item_ids must have one entry per row of sids \(1\), got 2"),
        ({"sids": [[1, 2]], "item_ids": ["B1"]}, "item_ids must hold integers, got <U2"),
    ],
)
def test_bad_arrays(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        read_sids(path)
    assert str(error.value).startswith(f"{path}: ")
    if list(arrays) == ["sids"]:  # the same array in a file of its own
        np.save(tmp_path / "bad.npy", arrays["sids"], allow_pickle=True)
        with pytest.raises(ValueError, match=r"bad\.npy: "):
            read_sids(tmp_path / "bad.npy")


def test_foreign_files(tmp_path):
    for name in ("empty.npy", "empty.npz", "empty.json"):
        with pytest.raises(ValueError, match=name):
            read_sids(write(tmp_path / name, b""))
    with pytest.raises(ValueError, match="damaged"):
        read_sids(write(tmp_path / "text.npy", "user,item\n1,2\n"))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("sids", "no array")
    with pytest.raises(ValueError, match="'sids' is not an array"):
        read_sids(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"items.txt: not a kind of file that holds SIDs: expected .json, .npy, .np"):
        read_sids(write(tmp_path / "items.txt", "1,2"))
    with pytest.raises(ValueError, match=r"x.npy: item, sid and title name columns of"):
        read_sids(tmp_path / "x.npy", item="id")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_sids(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npy"):
        read_sids(tmp_path / "nowhere.npy")


@pytest.mark.filterwarnings("ignore")  # numpy warns of some of the types that a flipped bit asks for
def test_damage_never_escapes(tmp_path):
    """Cut anywhere or with flipped bits, a file is read or refused with its name: no other exception gets out."""
    sids = np.arange(12).reshape(4, 3)
    rng = random.Random(0)
    archive, plain = io.BytesIO(), io.BytesIO()
    np.savez_compressed(archive, sids=sids, lengths=[3, 2, 1, 3], item_ids=[4, 3, 2, 1])
    np.save(plain, sids)
    for name, whole in (
        ("x.npz", archive.getvalue()),
        ("x.npy", plain.getvalue()),
        ("x.json", b'{"0": ["<a_1>", "<b_2>"], "1": ["<a_1>", "<b_3>"]}'),
        ("x.csv", b'"id","c0","c1"\n"7","1","2"\n"8","1","3"\n'),
    ):
        path = tmp_path / name
        damaged = [whole[:end] for end in range(0, len(whole), 3)]
        for _ in range(300):
            altered = bytearray(whole)
            altered[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            damaged.append(bytes(altered))
        refusals = []
        for content in damaged:
            try:
                read_sids(write(path, content))
            except ValueError as error:
                refusals.append(str(error))
        assert len(refusals) > 100
        assert all(refusal.startswith(f"{path}: ") and "\n" not in refusal for refusal in refusals)


def test_real_catalogues(data_dir):
    for name, items, sids, sizes in (("instruments", 9922, 9897, 4), ("industrial", 3686, 3670, 3)):
        table = read_sids(next((data_dir / name).glob("*.index.json")))
        assert table.sids.shape == (items, sizes)
        assert table.lengths is None
        assert max(table.sizes) <= 256
        assert rx.TrieIndex.build(table.sids, item_ids=table.item_ids).num_sids == sids


TEXT_SIDS = {
    "LC-Rec": ["<a_12><b_7>", "<a_0><b_255><c_1>"],
    "OneRec": ["<|sid_begin|><s_a_12><s_b_7><|sid_end|>", " <s_a_0> <s_b_255> <s_c_1><|sid_end|> "],
    "numbers": ["12,7", "0-255-1"],
    "more numbers": ["12 7", "[0, 255, 1]"],
}


@pytest.mark.parametrize("sids", TEXT_SIDS.values(), ids=TEXT_SIDS)
def test_a_column_of_sids(tmp_path, sids):
    rows = "".join(f'SKU-{row},"{sid}"\n' for row, sid in enumerate(sids))
    table = read_sids(write(tmp_path / "shop.csv", f"\ufeffsku,SID\n{rows}"))  # with the mark that Excel begins with
    np.testing.assert_array_equal(table.sids, [[12, 7, -1], [0, 255, 1]])
    assert (table.lengths.tolist(), table.item_ids, table.sizes) == ([2, 3], None, (13, 256, 2))
    assert (table.ids, table.titles) == (["SKU-0", "SKU-1"], None)


def test_columns_of_codes(tmp_path):
    """Numbered from 0 or 1, in any order; empty cells end a SID; a title may be missing, an integer id stays one."""
    text = "title;c2;price;item_id;c1\nHat;7;9.5;5;12\n;;1;9223372036854775807;0.0\n"
    table = read_sids(write(tmp_path / "shop.csv", text))
    np.testing.assert_array_equal(table.sids, [[12, 7], [0, -1]])
    assert table.item_ids.tolist() == [5, 2**63 - 1]
    assert (table.lengths.tolist(), table.ids, table.titles) == ([2, 1], None, ["Hat", ""])
    named = read_sids(write(tmp_path / "shop.tsv", "n\tx\ty\n7\t1\t2\n8\t3\t4\n"), item="n", sid=["y", "x"])
    np.testing.assert_array_equal(named.sids, [[2, 1], [4, 3]])
    assert (named.item_ids.tolist(), named.lengths) == ([7, 8], None)


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow, which comes with datasets")
    pq = pytest.importorskip("pyarrow.parquet")

    def read(**columns):
        pq.write_table(pa.table(columns), tmp_path / "shop.parquet")
        return read_sids(tmp_path / "shop.parquet")

    table = read(asin=["B1", "B2"], sid=[[1, 2], [3, 4]], title=["Hat", None])
    assert (table.sids.tolist(), table.ids, table.titles) == ([[1, 2], [3, 4]], ["B1", "B2"], ["Hat", ""])
    table = read(id=[7, 2**63 - 1], code_0=[1, 3], code_1=[2.0, None])
    assert (table.sids.tolist(), table.item_ids.tolist()) == ([[1, 2], [3, -1]], [7, 2**63 - 1])
    assert read(id=[7], sid=[["<a_1>", "<b_2>"]]).sids.tolist() == [[1, 2]]
    assert read(id=pa.array(["x"]).dictionary_encode(), sid=["<a_1>"]).ids == ["x"]
    for columns, message in (
        ({"id": [7.5], "sid": ["1"]}, "row 1: the item's id must be text or an integer, got 7.5"),
        ({"id": [7, None], "sid": ["1", "2"]}, "row 2: the item's id must be text or an integer, got None"),
        ({"id": [True], "sid": ["1"]}, "the item's id must be text or an integer, got True"),
        ({"id": [-7], "sid": ["1"]}, "item '-7' is not an integer"),
        ({"id": [7], "sid": [[1, None]]}, "row 1: level 0: expected a token"),
        ({"id": [7], "sid": [[]]}, "row 1: expected a SID"),
        ({"id": [7], "c0": [1.5]}, "row 1: a code must be an integer from 0 to 2147483646, got 1.5"),
        ({"id": [7], "c0": [2**40]}, "row 1: a code must be an integer"),
        ({"id": pa.array([], pa.int64()), "sid": pa.array([], pa.string())}, "holds no items"),
    ):
        with pytest.raises(ValueError, match=message):
            read(**columns)
    write(tmp_path / "shop.parquet", b"PAR1 and no more")
    with pytest.raises(ValueError, match="not a Parquet file, or damaged"):
        read_sids(tmp_path / "shop.parquet")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_sids(tmp_path / "nowhere.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"x.parquet: a .parquet file needs pyarrow: pip install"):
        read_sids(write(tmp_path / "x.parquet", b"PAR1"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no items"),
        ("id,sid\n", "holds no items"),
        (b"id,sid\n\xff,1", "line 2: not UTF-8 text: invalid start byte"),
        ('id,sid\n"1,2', "line 2: not a CSV file: unexpected end of data"),
        ('id,sid\n7,1\n8,"2"3\n', "line 3: not a CSV file: "),
        ("id,sid\n7,1\n8," + "9" * 200_000, "line 3: not a CSV file: field larger than field limit"),
        ("id,sid\n1\n", "row 1 has 1 fields, the first line 2"),
        ("id,id,sid\n1,2,3\n", "has two columns 'id'"),
        ("name,sid\na,1\n", "cannot tell which column is the item's id, it has only 'name', 'sid': give item"),
        ("id,asin,sid\n1,B1,3\n", "cannot tell which column is the item's id, it has columns 'id', 'asin': give item"),
        ("id,code\n1,2\n", "which column is the SID, or which are its codes"),
        ("id,sid,c0\n1,2,3\n", "which column is the SID"),
        ("id,c0,code_0\n1,2,3\n", "which column is the SID"),
        ("id,c0,c2\n1,2,3\n", "the columns of the codes are not numbered consecutively from 0 or 1"),
        ("id,c0,c00\n1,2,3\n", "the columns of the codes are not numbered consecutively from 0"),
        ("id,c2,c3\n1,2,3\n", "the columns of the codes are not numbered consecutively from 0 or 1"),
        ("id,c0,c1\n1,,3\n", "row 1: has no code at level 0"),
        ("id,c0,c1,c2\n1,4,,3\n", "row 1: has no code at level 1, but one after it"),
        ("id,c0\n1,1.5\n", "row 1: a code must be an integer from 0 to 2147483646, got '1.5'"),
        ("id,c0\n1,-2\n", "row 1: a code must be an integer"),
        ("id,c0\n1,2147483647\n", "row 1: a code must be an integer"),
        ("id,sid\n1,\n", "row 1: expected a SID such as"),
        ("id,sid\n1,<a_1>x<b_2>\n", "row 1: level 1: expected a token such as '<a_12>', got 'x'"),
        ("id,sid\n1,<a_1><a_2>\n", "row 1: level 1: token '<a_2>' is of another level"),
        ("id,sid\n1,<|sid_begin|><|sid_end|>\n", "row 1: expected at least one code"),
        ("id,sid\n1,1-2 3\n", "row 1: level 0: expected a token"),
        ("id,sid\n1,1--2\n", "row 1: level 0: expected a token"),
        ("id,sid\n1,99999999999\n", "row 1: codes must be from 0 to 2147483646"),
        ("id,sid\n1," + "1-" * 32 + "1\n", "row 1: a SID has at most 32 codes, got 33"),
        ("id,sid\n,1\n", "row 1: item '' is empty"),
        ("id,sid\nA,1\n\nA,2\n", "row 3: item 'A' appears twice"),
        ("id,sid\n-4,1\n", f"row 1: item '-4' is not an integer from 0 to {2**63 - 1}"),
    ],
)
def test_bad_tables(tmp_path, content, message):
    path = write(tmp_path / "bad.csv", content)
    with pytest.raises(ValueError, match=message) as error:
        read_sids(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "integers"),
    [
        (["0", str(2**63 - 1)], True),
        (["0", str(2**63)], False),  # one that is too large, and no id is changed
        (["7", "007"], False),
        (["7", "B00005ML71"], False),
        (["7.0"], False),
        (["9" * 5000], False),
    ],
)
def test_item_ids_are_integers_or_strings(tmp_path, names, integers):
    """All of them or none, the same in a table and in an index.json."""
    write(tmp_path / "x.json", json.dumps({name: [f"<a_{row}>"] for row, name in enumerate(names)}))
    write(tmp_path / "x.csv", "id,c0\n" + "".join(f"{name},{row}\n" for row, name in enumerate(names)))
    for table in (read_sids(tmp_path / "x.json"), read_sids(tmp_path / "x.csv")):
        assert table.sids.tolist() == [[row] for row in range(len(names))]
        if integers:
            assert (table.item_ids.tolist(), table.ids) == ([*map(int, names)], None)
        else:
            assert (table.item_ids, table.ids) == (None, names)
