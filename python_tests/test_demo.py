"""The demo: its shop, and whole runs on very small data."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogue_files import ITEMS, write_letter

import raddpo_ext as rx

pytest.importorskip("transformers")
from demo.__main__ import main
from demo.model import HISTORY, Tokens
from demo.report import Quality, _quality, _ranks, measure_popularity, spread
from demo.shop import make_shop
from raddpo_ext.catalogue import Case, load_catalogue


@pytest.fixture(autouse=True)
def one_thread():
    """As the program itself runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def letter(tmp_path):
    return write_letter(tmp_path / "letter")


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


def test_bad_folder(letter, capsys):
    (letter / "Tiny.inter.json").write_text('{"0": 1}')
    assert main(["--data", str(letter)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "letter/Tiny.inter.json: user '0': expected a list of items" in err


def test_spread():
    assert [case.item for case in spread([Case([0], item) for item in range(300)], 7)] == [
        0,
        43,
        86,
        129,
        172,
        215,
        258,
    ]
    assert len(spread([Case([0], 1)] * 3, 7)) == 3


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
    catalogue = load_catalogue(letter)
    sold = np.bincount(np.concatenate([np.array(items) for items in catalogue.train]), minlength=ITEMS)
    quality = measure_popularity(catalogue)
    places = np.array([(sold > sold[case.item]).sum() for case in catalogue.test])
    ties = np.array([(sold == sold[case.item]).sum() for case in catalogue.test])
    for cut, recall in zip((5, 10, 50), quality.recall, strict=True):
        assert (places + ties <= cut).mean() <= recall <= (places < cut).mean()
