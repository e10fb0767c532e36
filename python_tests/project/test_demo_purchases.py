"""The demo on a real catalogue: mining and report, and whole runs on very small data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.catalogue_files import ITEMS, write_letter, write_minionerec

import raddpo_ext as rx

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
from support.purchases_shop import make_shop

from demo.__main__ import main
from demo.purchases import report
from demo.purchases.alignment import BATCH, GROUPS, Curves, align, session_logps
from demo.purchases.figure import draw
from demo.purchases.mining import BEAM, POPULAR, SIBLINGS, Session, cut, cut_sessions, mine
from demo.purchases.model import Tokens, train
from demo.sft import HISTORY, START
from raddpo_ext.data.catalogue import Case, load_catalogue

FIGURES = ("recall@5", "recall@10", "recall@50", "ndcg@10", "mrr")


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


@pytest.fixture(scope="module")
def trained():
    """A small shop with a model that has learnt little."""
    torch.set_num_threads(1)
    shop = make_shop(shoppers=60, seed=0)
    tokens = Tokens.of(shop)
    model, _ = train(shop, tokens, epochs=1, seed=0)
    index = rx.TrieIndex.build(shop.sids, lengths=shop.lengths, vocab=tokens.vocab)
    return shop, tokens, model, index


def figures(out, label):
    """The numbers of the line with a label: before, after, change and interval, and before them the popular items'."""
    line = next(line for line in out.splitlines() if line.startswith(f"  {label} "))
    return [float(value.strip("[,]")) for value in line[len(label) + 2 :].split()]


def test_run_on_a_letter_folder(letter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--data", str(letter), "--epochs", "12", "--cases", "60", "--sessions", "400"]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # no bar where stderr is no terminal, and no warning
    assert "tiny: 60 items, 59 SIDs of 2 codes; 300 shoppers" in out
    assert "mining       .demo/tiny-sessions.jsonl: 400 sessions, 2." in out
    assert "60 purchases left out of the training, 50 beams" in out
    popular, before, after, *_ = figures(out, "recall@10")
    assert min(before, after) > 0.9 > popular  # the next number is easy to learn
    assert figures(out, "invalid@50, by the index") == [0, 0, 0, 0, 0]
    assert len(figures(out, "invalid@10")) == 5
    for label in ("winners", "further positives", "negatives"):
        old, new, change, low, high = figures(out, label)
        assert new - old == pytest.approx(change, abs=2e-4)
        assert low <= change <= high
    assert "times as long" in out
    assert sum(line.startswith("  bought next ") for line in out.splitlines()) == 3
    names = {"tiny.index", "tiny-sessions.jsonl", "tiny-aside.jsonl", "tiny.png"}
    assert {path.name for path in (tmp_path / ".demo").iterdir()} == names
    assert rx.TrieIndex.load(tmp_path / ".demo/tiny.index").num_items == ITEMS
    assert (tmp_path / ".demo/tiny.png").read_bytes().startswith(b"\x89PNG")


def test_run_on_a_minionerec_folder(tmp_path, monkeypatch, capsys):
    folder = write_minionerec(tmp_path / "minionerec")
    monkeypatch.chdir(tmp_path)
    assert main(["--data", str(folder)]) == 2  # its histories are too short
    out, err = capsys.readouterr()
    assert (out, err) == ("", "demo: tiny: too few shoppers with three purchases to mine sessions from\n")
    for name, last in (("valid", 6), ("test", 7)):
        rows = [
            f'{user},"{[(user + step) % ITEMS for step in range(last)]}",{(user + last) % ITEMS}' for user in range(60)
        ]
        (folder / f"{name}.csv").write_text("user_id,history_item_id,item_id\n" + "\n".join(rows) + "\n")
    assert main(["--data", str(folder), "--epochs", "1", "--cases", "20", "--valid"]) in (0, 1)
    out = capsys.readouterr().out
    assert "20 purchases left out of the training, 50 beams" in out
    assert ".demo/tiny-sessions.jsonl: 216 sessions, 2.8 positives" in out  # 4 of each shopper, 1 of them with 2
    assert "log-probs in 24 sessions" in out


def test_missing_path(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
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
    assert [case.item for case in report.spread([Case([0], item) for item in range(300)], 7)] == [
        0,
        43,
        86,
        129,
        172,
        215,
        258,
    ]
    assert len(report.spread([Case([0], 1)] * 3, 7)) == 3


def test_prompts():
    shop = make_shop(shoppers=20, seed=0)
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


def test_cut():
    rng = np.random.default_rng(0)
    sessions = cut([[1, 2, 3, 4], [5, 6], [7, 7, 7], [8, 9, 9, 7]], 100, rng)
    assert sorted(sessions) == [
        Session([1], [2, 3, 4]),
        Session([1, 2], [3, 4]),
        Session([8], [9, 7]),  # what is bought twice is one positive
        Session([8, 9], [9, 7]),
    ]
    assert len(cut([[1, 2, 3, 4]] * 10, 7, rng)) == 7
    long = cut([list(range(20))], 100, rng)
    assert max(long) == Session(list(range(7, 17)), [17, 18, 19]) or len(max(long).history) == HISTORY
    assert {session.positives[0] for session in long} == set(range(1, 19))


def test_cut_sessions():
    """Every tenth shopper's purchases are in no session to align on, and in all those kept from it."""
    shop = make_shop(shoppers=40, seed=1)
    sessions, aside = cut_sessions(shop, 10_000, 10_000, seed=0)

    def origins(found):
        whole = [tuple(session.history + session.positives) for session in found if len(session.history) < HISTORY]
        return {row for row, items in enumerate(shop.train) for part in whole if part == tuple(items[: len(part)])}

    assert origins(aside) == set(range(0, 40, 10))
    assert origins(sessions) == set(range(40)) - set(range(0, 40, 10))
    again, other = cut_sessions(shop, 20, 5, seed=0), cut_sessions(shop, 20, 5, seed=1)
    assert again == cut_sessions(shop, 20, 5, seed=0) != other
    assert [len(part) for part in again] == [20, 5]


def test_mine(trained, tmp_path):
    shop, tokens, model, index = trained
    sessions, _ = cut_sessions(shop, 30, 5, seed=0)
    path = tmp_path / "sessions.jsonl"
    rows = mine(sessions, path, shop, tokens, model, index, seed=0)
    assert len(rows) == len(path.read_text().splitlines()) == 30
    assert json.loads(path.read_text().splitlines()[0]) == rows[0]
    items = {tuple(row.tolist()) for row in tokens.of_item}
    siblings = 0
    for session, row in zip(sessions, rows, strict=True):
        assert row["prompt_ids"] == tokens.prompt(session.history).tolist()
        assert row["positives"] == [tokens.of_item[item].tolist() for item in session.positives]
        negatives = {tuple(sid) for sid in row["negatives"]}
        assert len(negatives) == len(row["negatives"]) == BEAM + SIBLINGS + POPULAR
        assert negatives <= items - {tuple(sid) for sid in row["positives"]}
        siblings += sum(sid[0] == row["positives"][0][0] for sid in row["negatives"])
    assert siblings >= SIBLINGS * 30
    mine(sessions, tmp_path / "again.jsonl", shop, tokens, model, index, seed=0)
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_align(trained, tmp_path):
    """The curves begin at 0, end where the model does, and have the loss's parts; nothing else is written."""
    shop, tokens, _, index = trained
    model, _ = train(shop, tokens, epochs=1, seed=1)
    to_align, aside = cut_sessions(shop, 3 * BATCH, 8, seed=0)
    sessions = mine(to_align, tmp_path / "a.jsonl", shop, tokens, model, index, seed=0)
    followed = mine(aside, tmp_path / "b.jsonl", shop, tokens, model, index, seed=0)
    before = session_logps(model, tokens, followed)
    curves = align(model, tokens, sessions, followed, tmp_path, seed=0)
    after = session_logps(model, tokens, followed)
    assert not model.training
    assert [entry["step"] for entry in curves.drift] == [0, *(entry["step"] for entry in curves.log)]
    for group in GROUPS:
        assert curves.drift[0][group] == 0
        assert curves.drift[-1][group] == pytest.approx(float((after[group] - before[group]).mean()))
        assert curves.drift[-1][group] > 0  # SFT lifts whatever is an item
    assert curves.log[-1]["loss"] == pytest.approx(curves.log[-1]["preference"] + curves.log[-1]["sft"], rel=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}
    draw(curves, "curves", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3


def test_failed_picture_leaves_the_old_one(tmp_path):
    (tmp_path / "curves.png").write_bytes(b"old")
    with pytest.raises(KeyError):
        draw(Curves([{"step": 1}], []), "curves", tmp_path / "curves.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_session_logps(trained):
    """Those of each candidate behind its own copy of the prompt."""
    _, tokens, model, _ = trained
    sids = [tokens.of_item[item].tolist() for item in range(6)]
    rows = [
        {"prompt_ids": [START, *sids[0]], "positives": sids[1:4], "negatives": sids[4:6]},
        {"prompt_ids": [START, *sids[5], *sids[2]], "positives": sids[0:2], "negatives": sids[3:4]},
    ]

    def logp(prompt, sid):
        logits = model(torch.tensor([prompt + sid])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(sid)[:, None]).sum().detach())

    found = session_logps(model, tokens, rows)
    for place, row in enumerate(rows):
        parts = {"winner": row["positives"][:1], "positives": row["positives"][1:], "negatives": row["negatives"]}
        for group, candidates in parts.items():
            expected = np.mean([logp(row["prompt_ids"], sid) for sid in candidates])
            assert float(found[group][place]) == pytest.approx(expected, abs=1e-4)


def test_interval():
    assert report.interval(torch.full((50,), 0.25, dtype=torch.float64)) == (0.25, 0.25)
    coins = torch.arange(400).remainder(2).double()
    low, high = report.interval(coins)
    assert (low, high) == (pytest.approx(0.5 - 1.96 * 0.025, abs=0.004), pytest.approx(0.5 + 1.96 * 0.025, abs=0.004))
    # Paired: what is the same for both models takes no part, however much users differ.
    users = 1000 * torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert report.interval((users + coins) - users) == (pytest.approx(low), pytest.approx(high))


def test_table():
    before, after = (torch.tensor(values, dtype=torch.float64) for values in ([0.0, 1.0], [0.5, 1.5]))
    lines = report.table({"mrr": before, "new": before}, {"mrr": after, "new": before}, {"mrr": before / 2})
    assert lines[0].split() == ["mrr", "0.2500", "0.5000", "1.0000", "+0.5000", "[+0.5000,", "+0.5000]"]
    assert lines[1].split() == ["new", "0.5000", "0.5000", "+0.0000", "[+0.0000,", "+0.0000]"]
    assert len({len(line) for line in lines}) == 1
    assert report.beats({"mrr": after}, {"mrr": before})
    assert not report.beats({"mrr": after, "recall@5": before}, {"mrr": before, "recall@5": before})


def test_popularity(letter):
    """With 60 items, those among the 50 sold most are found, at their places."""
    catalogue = load_catalogue(letter)
    sold = np.bincount(np.concatenate([np.array(items) for items in catalogue.train]), minlength=ITEMS)
    metrics = report.measure_popularity(catalogue, catalogue.test)
    assert tuple(metrics) == FIGURES
    places = np.array([(sold > sold[case.item]).sum() for case in catalogue.test])
    ties = np.array([(sold == sold[case.item]).sum() for case in catalogue.test])
    for cut_off in (5, 10, 50):
        recall = float(metrics[f"recall@{cut_off}"].mean())
        assert (places + ties <= cut_off).mean() <= recall <= (places < cut_off).mean()


def test_measure_keeps_the_order(trained):
    """Cases are searched by length and reported in their order."""
    _, tokens, model, index = trained
    retriever = rx.SIDRetriever(model, index, beam_width=report.BEAMS)
    cases = [Case([1, 2, 3], 4), Case([5], 6), Case([7, 8], 9)]
    together = report.measure(retriever, tokens, cases)
    best = retriever.retrieve(*tokens.pad([[5]]), top_k=1).items[0, 0]
    hit = report.measure(retriever, tokens, [cases[0], Case([5], int(best)), cases[2]])
    assert hit["mrr"].tolist() == pytest.approx([float(together["mrr"][0]), 1, float(together["mrr"][2])])


def test_free_search(letter, monkeypatch):
    """What is no item: an unknown SID, a SID that goes on, an end alone, and a token of another level."""

    def share(tokens, index, rows):
        monkeypatch.setattr(report, "generate", lambda *args, **options: torch.tensor(rows))
        return report.measure_freely(None, tokens, index, [Case([0], 1)]).tolist()

    shop = make_shop(shoppers=30, seed=0)
    tokens = Tokens.of(shop)
    index = rx.TrieIndex.build(shop.sids, lengths=shop.lengths, vocab=tokens.vocab)
    end = tokens.vocab.eos
    short, full = (next(row.tolist() for row in tokens.of_item if len(row) == length) for length in (3, 5))
    good = [full] * 5 + [[*short, START, START]]
    bad = [[*short[:2], short[1], end, START], [*full[:4], full[3]], [end, *[START] * 4], [full[1], *full[1:]]]
    assert share(tokens, index, good + bad) == [0.4]

    tiny = load_catalogue(letter)
    tokens = Tokens.of(tiny)
    index = rx.TrieIndex.build(tiny.sids, vocab=tokens.vocab)
    sid = tokens.of_item[0].tolist()
    assert share(tokens, index, [sid] * 7 + [sid[::-1], [START, START], [sid[0], tokens.size - 2]]) == [0.3]
