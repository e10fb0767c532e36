"""Readers of SID files: what they return, and that every damaged or foreign file is refused by name."""

import io
import json
import random
import zipfile

import numpy as np
import pytest

import raddpo_ext as rx
from raddpo_ext.readers import read_sids


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
        ('{"0": ["<a_1>", "<b_2>"], "5": ["<b_2>", "<a_1>"]}', "item '5': token '<b_2>' stands at level 0, .* <a_"),
        ('{"B00005ML71": ["<a_1>"]}', "item 'B00005ML71' is no integer"),
        ('{"-1": ["<a_1>"]}', "item '-1' is no integer"),
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
    assert table[1:] == (None, None, (4, 201))
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
        ({"sids": [[1, 2]], "lengths": [1, 2]}, r"lengths must have one entry a row of sids \(1\), got 2"),
        ({"sids": [[1, 2]], "item_ids": [1, 2]}, r"item_ids must have one entry a row of sids \(1\), got 2"),
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
    with pytest.raises(ValueError, match="'sids' is no array"):
        read_sids(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"items.csv: not a kind of file that holds SIDs: expected .json, .npy or"):
        read_sids(write(tmp_path / "items.csv", "1,2"))
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
