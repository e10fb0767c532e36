"""The readers of the public catalogues: their splits, and that every damaged folder is refused by name."""

import hashlib
import json
import shutil

import pytest
from support.catalogue_files import row, write_letter, write_minionerec

from raddpo_ext.data.catalogue import KNOWN_HASHES, Case, known_version, load_catalogue


@pytest.fixture
def letter(tmp_path):
    return write_letter(tmp_path / "letter")


@pytest.fixture
def minionerec(tmp_path):
    return write_minionerec(tmp_path / "minionerec")


def test_letter_layout(letter):
    catalogue = load_catalogue(letter)
    users = json.loads((letter / "Tiny.inter.json").read_text())
    users = [[row(item) for item in items] for items in users.values() if len(items) > 2]
    assert len(users) == 300  # one of two items is left out
    assert catalogue.train == [items[:-2] for items in users]
    assert catalogue.valid == [(items[:-2], items[-2]) for items in users]
    assert catalogue.test == [(items[:-1], items[-1]) for items in users]
    assert catalogue.sids[row(10)].tolist() == [1, 2]
    assert catalogue.titles[row(10)] == "item 10, SID 1 2"
    assert catalogue.lengths is None
    assert (catalogue.name, catalogue.sizes) == ("tiny", (256, 256))


def test_short_users(letter):
    (letter / "Tiny.inter.json").write_text('{"0": [], "1": [4], "2": [4, 5], "3": [4, 5, 6]}')
    catalogue = load_catalogue(str(letter))
    assert catalogue.train == [[row(4)]]
    assert catalogue.valid == [Case([row(4)], row(5))]
    assert catalogue.test == [Case([row(4), row(5)], row(6))]


def test_minionerec_layout(minionerec):
    catalogue = load_catalogue(minionerec)
    assert catalogue.valid == [([row(3), row(4)], row(5)), ([row(9)], row(8)), ([row(3), row(4), row(5)], row(6))]
    assert catalogue.test == [([row(7), row(3)], row(1)), ([row(9), row(8)], row(2))]
    assert catalogue.train == [[row(3), row(4)], [row(9)], [row(7), row(3)]]  # of A, B and C
    assert catalogue.titles[row(3)] == "Nuts & bolts"
    assert catalogue.titles[row(4)] == "item 4, SID 0 4"


def test_minionerec_with_its_training_rows(minionerec):
    lines = ['A,"[3, 4]",5', "D,[1],2", 'A,"[4, 5]",6', "D,[2],7"]  # histories slide along, too
    (minionerec / "train.csv").write_text("\n".join(["user_id,history_item_id,item_id", *lines]))
    catalogue = load_catalogue(minionerec)
    assert catalogue.train == [[row(item) for item in items] for items in ([3, 4, 5, 6], [1, 2, 7])]
    assert len(catalogue.valid) == 3


def test_lengths(letter):
    index = json.loads((letter / "Tiny.index.json").read_text())
    index["7"] = ["<a_9>"]
    (letter / "Tiny.index.json").write_text(json.dumps(index))
    catalogue = load_catalogue(letter)
    assert catalogue.sids[row(7)].tolist() == [9, -1]
    assert catalogue.lengths[row(7)] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Tiny.inter.json", '{"0": [1, 2, 60]}', "Tiny.inter.json: user '0': item 60 is not in the catalogue"),
        ("Tiny.inter.json", '{"u": [1, 2, 3.0]}', "Tiny.inter.json: user 'u': item 3.0 is not in the catalogue"),
        ("Tiny.inter.json", '{"u": [true, 2, 3]}', "user 'u': item True is not in the catalogue"),
        ("Tiny.inter.json", '{"u": [[1], 2, 3]}', r"user 'u': item \[1\] is not in the catalogue"),
        ("Tiny.inter.json", '{"0": 1}', "Tiny.inter.json: user '0': expected a list of items, got int"),
        ("Tiny.inter.json", "[]", "Tiny.inter.json: expected an object, got list"),
        ("Tiny.inter.json", "{", "Tiny.inter.json: not valid JSON"),
        ("Tiny.inter.json", "[" * 100_000, "Tiny.inter.json: not valid JSON"),
        ("Tiny.inter.json", '{"0": [1, 2]}', "letter: has no training sequence or no test case"),
        ("Tiny.index.json", "{}", "Tiny.index.json: holds no items"),
        ("Tiny.item.json", "1", "Tiny.item.json: expected an object, got int"),
        ("Other.index.json", "{}", "letter: expected one file \\*.index.json, found 2"),
    ],
)
def test_bad_letter_folder(letter, name, content, message):
    (letter / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_catalogue(letter)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("valid.csv", b"user_id,item_id\nA,1\n", "valid.csv: row 1: KeyError: 'history_item_id'"),
        ("train.csv", b"user_id,item_id\n\xff,1\n", "train.csv: not a CSV file"),
        ("test.csv", b"A,[1],2\nA,[1],x\n", "test.csv: row 2: ValueError"),
        ("test.csv", b"A,[1],2\nA,[1\n", "test.csv: row 2: JSONDecodeError"),
        ("test.csv", b"A\n", "test.csv: row 1: TypeError"),
        ("test.csv", b"A," + b"[" * 100_000 + b",2\n", "test.csv: row 1: RecursionError"),
        ("test.csv", b"A,[1],60\n", "test.csv: row 1: item 60 is not in the catalogue"),
        ("test.csv", b'A,"[1, ""2""]",6\n', "test.csv: row 1: item '2' is not in the catalogue"),
        ("test.csv", b"A,1,6\n", "test.csv: row 1: expected a list of items, got int"),
        ("test.csv", b"A,[],6\n", "test.csv: row 1: the history is empty"),
        ("test.csv", b"", "minionerec: has no training sequence or no test case"),
    ],
)
def test_bad_minionerec_folder(minionerec, name, content, message):
    head = b"" if content.startswith(b"user_id") else b"user_id,history_item_id,item_id\n"
    (minionerec / name).write_bytes(head + content)
    with pytest.raises(ValueError, match=message):
        load_catalogue(minionerec)


def test_missing_files(letter, minionerec, tmp_path):
    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            load_catalogue(folder)

    refused(tmp_path / "nowhere", "nowhere: no such folder")
    refused(letter / "Tiny.inter.json", "letter/Tiny.inter.json: is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"empty: expected one file \*.index.json, found 0")
    (minionerec / "test.csv").unlink()
    refused(minionerec, r"minionerec: expected one file \*.inter.json, or valid.csv and test.csv, found 0")


def test_known_version(letter, minionerec, tmp_path, monkeypatch):
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in letter.iterdir()}
    monkeypatch.setitem(KNOWN_HASHES, "mine", hashes)
    (letter / "notes.txt").write_text("not read")
    assert known_version(letter) == "mine"
    (letter / "Tiny.item.json").write_text("{}")  # one file more that is read
    assert known_version(letter) is None
    assert known_version(letter) is None
    assert known_version(minionerec) is None
    assert known_version(tmp_path / "nowhere") is None


def test_real_folders(data_dir, tmp_path):
    instruments = load_catalogue(data_dir / "instruments")
    assert (len(instruments.sids), len(instruments.train), len(instruments.test)) == (9922, 24772, 24772)
    assert sum(map(len, instruments.train)) == 206_153 - 2 * 24_772
    assert all(
        valid.history == train and test.history == [*train, valid.item]
        for train, valid, test in zip(instruments.train, instruments.valid, instruments.test, strict=True)
    )
    industrial = load_catalogue(data_dir / "industrial")
    assert (len(industrial.sids), len(industrial.valid), len(industrial.test)) == (3686, 4532, 4533)
    assert len(industrial.train) == 3285  # 2,011 users of valid.csv and 1,274 more of test.csv
    assert industrial.titles[0].startswith("SUPCO SPP6 Relay/Capacitor")
    assert [known_version(data_dir / name) for name in KNOWN_HASHES] == ["instruments", "industrial"]
    for path in (data_dir / "instruments").iterdir():
        shutil.copy(path, tmp_path)
    assert known_version(tmp_path) == "instruments"
    with open(tmp_path / "Instruments.inter.json", "ab") as file:
        file.write(b"\n")
    assert known_version(tmp_path) is None
    assert load_catalogue(tmp_path).test == instruments.test  # unknown, and read all the same
