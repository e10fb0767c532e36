"""The demo: its shop, its readers of real folders, and whole runs on very small data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import raddpo_ext as rx

pytest.importorskip("transformers")
from demo.__main__ import main
from demo.catalogue import Case, load_catalogue
from demo.model import HISTORY, Tokens
from demo.report import Quality, _quality, _ranks, measure_popularity
from demo.shop import make_shop

ITEMS = 60


@pytest.fixture(autouse=True)
def one_thread():
    """As the program itself runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_index(folder):
    """``ITEMS`` items, numbered backwards in the file, of which the last shares the first one's SID."""
    codes = [divmod(item % (ITEMS - 1), 8) for item in range(ITEMS)]
    index = {str(item): [f"<a_{codes[item][0]}>", f"<b_{codes[item][1]}>"] for item in reversed(range(ITEMS))}
    (folder / "Tiny.index.json").write_text(json.dumps(index))


@pytest.fixture
def letter(tmp_path):
    """Users who buy items in the order of their numbers, which nobody's popularity tells."""
    folder = tmp_path / "letter"
    folder.mkdir()
    write_index(folder)
    rng = np.random.default_rng(0)
    users = {
        str(user): [int(item) for item in (rng.integers(ITEMS) + np.arange(rng.integers(6, 15))) % ITEMS]
        for user in range(300)
    }
    (folder / "Tiny.inter.json").write_text(json.dumps(users | {"short": [1, 2]}))
    return folder


@pytest.fixture
def minionerec(tmp_path):
    folder = tmp_path / "minionerec"
    folder.mkdir()
    write_index(folder)
    (folder / "Tiny.item.json").write_text('{"3": {"title": "Nuts &amp; bolts"}, "4": [], "x": {}}')
    head = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid\n"
    lines = ('A,"[\'a, b\']",c,"[3, 4]",5,s,s', "B,t,t,[9],8,s,s", 'A,t,t,"[3, 4, 5]",6,s,s')
    (folder / "valid.csv").write_text(head + "\n".join(lines) + "\n")
    (folder / "test.csv").write_text(head + 'C,t,t,"[7, 3]",1,s,s\n')
    return folder


def row(item):
    """The row of an item of ``write_index``."""
    return ITEMS - 1 - item


def figures(out, label):
    """The numbers of the first line with a label."""
    line = next(line for line in out.splitlines() if line.startswith(label))
    return [float(value) for value in line[len(label) :].split()]


def test_run_on_a_folder(letter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", str(letter), "--epochs", "12", "--cases", "100"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no bar where stderr is no terminal, and no warning
    assert "tiny: 60 items, 59 SIDs of 2 codes; 300 shoppers" in out
    assert "100 held-out purchases, 50 beams" in out
    quality, popular = figures(out, "  SIDRetriever "), figures(out, "  most popular items ")
    assert quality[1] > 0.9 > popular[1]  # recall@10: the next number is easy to learn
    assert "with the index               0.0%" in out
    assert "without (generate)" in out
    assert "times as long" in out
    assert sum(line.startswith("  bought next ") for line in out.splitlines()) == 3
    assert [path.name for path in (tmp_path / ".demo").iterdir()] == ["tiny.index"]
    assert rx.TrieIndex.load(tmp_path / ".demo/tiny.index").num_items == ITEMS


def test_run_on_the_shop_without_training(tmp_path, monkeypatch, capsys):
    """SIDs of different lengths all the way, and exit code 1 for a model that has learnt nothing."""
    monkeypatch.chdir(tmp_path)
    assert main(["--shoppers", "64", "--epochs", "1", "--cases", "20"]) == 1
    out, err = capsys.readouterr()
    assert "SIDs of 2 to 4 codes; 64 shoppers" in out
    assert "with the index               0.0%" in out
    assert err == "demo: the model does not beat the most popular items\n"


def test_missing_path(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "demo", "--data", "nowhere"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "demo: nowhere: no such folder\n"


def test_letter_layout(letter):
    catalogue = load_catalogue(letter, max_cases=7)
    users = json.loads((letter / "Tiny.inter.json").read_text())
    assert catalogue.train[0] == [row(item) for item in users["0"][:-2]]
    assert catalogue.test[0] == Case([row(item) for item in users["0"][:-1]], row(users["0"][-1]))
    assert (len(catalogue.train), len(catalogue.test)) == (300, 7)
    assert catalogue.test[1].item == row(users["43"][-1])  # every 43rd of 300, so that all parts of the file count
    assert catalogue.sids[row(10)].tolist() == [1, 2]
    assert catalogue.titles[row(10)] == "item 10, SID 1 2"
    assert catalogue.lengths is None


def test_minionerec_layout(minionerec):
    catalogue = load_catalogue(minionerec, max_cases=5000)
    assert catalogue.train == [[row(item) for item in items] for items in ([3, 4, 5, 6], [9, 8])]
    assert catalogue.test == [Case([row(7), row(3)], row(1))]
    assert catalogue.titles[row(3)] == "Nuts & bolts"


def test_bad_folders(letter, minionerec, tmp_path, capsys):
    def refusal(folder):
        assert main(["--data", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    assert "letter/Tiny.inter.json: is no folder" in refusal(letter / "Tiny.inter.json")
    (tmp_path / "empty").mkdir()
    assert "empty: expected one file *.index.json, found 0" in refusal(tmp_path / "empty")
    (letter / "Tiny.inter.json").write_text('{"0": [1, 2, 60]}')
    assert "Tiny.inter.json: item 60 is not in the catalogue" in refusal(letter)
    (letter / "Tiny.inter.json").write_text('{"0": 1}')
    assert "Tiny.inter.json: expected lists of items" in refusal(letter)
    (letter / "Tiny.inter.json").write_text("[]")
    assert "Tiny.inter.json: expected an object, got list" in refusal(letter)
    (letter / "Tiny.inter.json").write_text("{")
    assert "Tiny.inter.json: not valid JSON" in refusal(letter)
    (letter / "Tiny.inter.json").write_text('{"0": [1, 2]}')
    assert "letter: nothing to train on or nothing to report on" in refusal(letter)
    (letter / "Tiny.inter.json").unlink()
    assert "letter: expected one file *.inter.json, or valid.csv and test.csv, found 0" in refusal(letter)
    (letter / "Tiny.index.json").write_text("{}")
    assert "Tiny.index.json: holds no items" in refusal(letter)
    (minionerec / "valid.csv").write_text("user_id,item_id\nA,1\n")
    assert "valid.csv: row 1: KeyError: 'history_item_id'" in refusal(minionerec)
    (minionerec / "valid.csv").write_bytes(b"user_id,item_id\n\xff,1\n")
    assert "valid.csv: not a CSV file" in refusal(minionerec)
    (minionerec / "valid.csv").write_text("user_id,history_item_id,item_id\nA,[1],x\n")
    assert "valid.csv: row 1: ValueError" in refusal(minionerec)


def test_real_folders(data_dir):
    instruments = load_catalogue(data_dir / "instruments", max_cases=5000)
    assert (len(instruments.sids), len(instruments.train), len(instruments.test)) == (9922, 24772, 4955)
    assert sum(map(len, instruments.train)) == 206_153 - 2 * 24_772
    industrial = load_catalogue(data_dir / "industrial", max_cases=5000)
    assert (len(industrial.sids), len(industrial.train), len(industrial.test)) == (3686, 2011, 4533)
    assert industrial.titles[0].startswith("SUPCO SPP6 Relay/Capacitor")


def test_shop():
    shop = make_shop(shoppers=50, max_cases=40, seed=3)
    sids = [tuple(sid[:length]) for sid, length in zip(shop.sids.tolist(), shop.lengths, strict=True)]
    assert set(shop.lengths.tolist()) == {2, 3, 4}
    assert len(set(sids)) < len(sids)  # collisions
    assert any(sid[:-1] in set(sids) for sid in sids if len(sid) == 4)  # SIDs that are prefixes of others
    assert len(set(shop.titles)) == len(shop.titles) == len(sids)
    by_title = dict(zip(shop.titles, sids, strict=True))
    for title, sid in by_title.items():
        if title.endswith((" S", " M", " L", " XL")):  # a size is one code more than the title without it
            plain = by_title.get(title.rsplit(" ", 1)[0])
            assert plain is None or sid[:-1] == plain
    assert all(len(items) == len(set(items)) and 7 <= len(items) <= 13 for items in shop.train)
    assert [case.history for case in shop.test] == shop.train[:40]
    again, other = make_shop(50, 40, seed=3), make_shop(50, 40, seed=4)
    assert again.train == shop.train != other.train


def test_prompts():
    shop = make_shop(shoppers=20, max_cases=20, seed=0)
    tokens = Tokens.of(shop)
    assert tokens.vocab.eos == 1 + 4 * 256 == tokens.size - 1
    item = int(np.flatnonzero(shop.lengths == 3)[0])
    expected = [1 + 256 * level + code for level, code in enumerate(shop.sids[item, :3].tolist())] + [tokens.vocab.eos]
    assert tokens.of_item[item].tolist() == expected
    ids, mask = tokens.pad([[item], [*range(5), *[item] * HISTORY]])
    assert ids.shape == mask.shape == (2, 1 + 4 * HISTORY)
    assert ids[1].tolist() == [0, *expected * HISTORY]  # the last purchases only
    assert ids[0, -5:].tolist() == [0, *expected]
    assert mask.sum(1).tolist() == [5, 1 + 4 * HISTORY]
    assert mask[0, -5:].all()


def test_quality():
    ranks = _ranks(torch.tensor([[4, 7, 9, 7], [1, 2, 3, -1]]), torch.tensor([7, 5]))
    assert ranks.tolist() == [1, float("inf")]
    quality = _quality(torch.tensor([0.0, 9.0, 49.0, torch.inf], dtype=torch.float64))
    assert quality.recall == (0.25, 0.5, 0.75)
    assert quality.mrr == pytest.approx((1 + 1 / 10 + 1 / 50) / 4)
    assert Quality((0.2, 0.3, 0.4), 0.1).beats(Quality((0.1, 0.2, 0.3), 0.05))
    assert not Quality((0.2, 0.3, 0.4), 0.1).beats(Quality((0.1, 0.3, 0.3), 0.05))


def test_popularity(letter):
    """With 60 items, those among the 50 sold most are found, at their places."""
    catalogue = load_catalogue(letter, 5000)
    sold = np.bincount(np.concatenate([np.array(items) for items in catalogue.train]), minlength=ITEMS)
    quality = measure_popularity(catalogue)
    places = np.array([(sold > sold[case.item]).sum() for case in catalogue.test])
    ties = np.array([(sold == sold[case.item]).sum() for case in catalogue.test])
    for cut, recall in zip((5, 10, 50), quality.recall, strict=True):
        assert (places + ties <= cut).mean() <= recall <= (places < cut).mean()
