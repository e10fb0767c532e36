"""The alignment experiment, on tiny made-up data."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from support.catalogue_files import write_walks

from benchmarks.alignment import evaluate, records
from benchmarks.alignment import experiment as alignment
from benchmarks.alignment import grid as alignment_grid
from benchmarks.alignment import sessions as alignment_sessions
from benchmarks.alignment import sft as alignment_sft
from benchmarks.alignment.cells import Lab, Scale
from benchmarks.alignment.data import Data, load, windows
from benchmarks.alignment.sessions import Sessions
from benchmarks.alignment.statistics import choose, ndcg, pack, paired_bootstrap, unpack
from benchmarks.harness import results
from demo.measure import invalid_shares, retrieve_freely

TINY = Scale(
    name="tiny",
    seeds=(0, 1),
    epochs=2,
    sessions=40,
    probes=8,
    beams=10,
    users=30,
    tune_users=30,
    tune_beams=10,
    free_users=10,
    next_users=10,
    next_beams=10,
    false_shares=(0.1,),
    resamples=100,
    methods=("sft_continued", "dpo", "rad_dpo", "rad_dpo_no_tlgd", "rad_dpo_no_rdrw"),
    settings=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_walks(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def data(folder: Path) -> Data:
    return load(folder)


@pytest.fixture(scope="module")
def lab(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The whole grid, run once."""
    lab = Lab(folder, TINY, tmp_path_factory.mktemp("cache"))
    alignment.run(lab)
    return lab


def test_windows_cover_every_purchase_once_but_for_the_seams(data: Data) -> None:
    pieces = windows(data)
    assert max(map(len, pieces)) <= 11
    assert sum(len(piece) for piece in pieces) == sum(map(len, data.train)) + len(pieces) - len(data.train)
    assert windows(dataclasses.replace(data, train=[list(range(12))])) == [list(range(11)), [10, 11]]
    assert windows(dataclasses.replace(data, train=[[3]])) == [[3]]


def test_nothing_held_out_is_trained_on(data: Data, lab: Lab) -> None:
    for train, valid, test in zip(data.train, data.validation, data.test, strict=True):
        assert valid.history == train
        assert test.history == [*train, valid.item]
    for part in lab.sessions(0):
        for row, (user, cut) in enumerate(zip(part.users.tolist(), part.cuts.tolist(), strict=True)):
            positives = [item for item in part.positives[row].tolist() if item >= 0]
            assert data.train[user][cut : cut + len(positives)] == positives
            assert len(positives) >= 2


def test_the_unconstrained_search_finds_the_best_rows(data: Data, lab: Lab) -> None:
    """A beam as wide as the vocabulary squared keeps every prefix of two tokens."""
    model = lab.start(0)
    history = data.test[0].history
    rows = retrieve_freely(model, data.prompts([history]), 2, 50)[0]
    prompt = torch.tensor(data.prompts([history])[0])
    tokens = torch.arange(data.vocab_size)
    with torch.no_grad():
        first = model(prompt[None]).logits[0, -1].log_softmax(0)
        ids = torch.cat([prompt.expand(len(tokens), -1), tokens[:, None]], 1)
        second = model(ids).logits[:, -1].log_softmax(1)
    scores = (first[:, None] + second).flatten()
    narrow = torch.zeros_like(scores, dtype=torch.bool)  # the search keeps 50 first tokens only
    narrow.view(len(tokens), -1)[first.topk(50).indices] = True
    best = scores.masked_fill(~narrow, -torch.inf).topk(50).values
    torch.testing.assert_close(scores[rows[:, 0] * len(tokens) + rows[:, 1]], best)


def test_invalid_rows_are_counted(data: Data) -> None:
    good = data.tokens[:10]
    bad = good.clone()
    bad[:5, 1] = 0  # the start token is no code
    assert invalid_shares(data.index, good[None]).tolist() == [0.0]
    assert invalid_shares(data.index, bad[None]).tolist() == [0.5]
    bad[:5] = good[:5]
    bad[0, 0], bad[0, 1] = good[0, 1], good[0, 0]  # codes in the wrong places
    assert invalid_shares(data.index, torch.stack([good, bad])).tolist() == pytest.approx([0.0, 0.1])


def test_ranks() -> None:
    found = torch.tensor([[5, 3, 9], [1, 2, -1], [4, 6, 8]])
    assert evaluate.ranks(found, [3, 7, 4]).tolist() == [2, 0, 1]
    for kind in (np.int64, np.uint8):  # as they are, and as files hold them
        gains = ndcg(np.array([2, 0, 1, 11, 10], kind))
        np.testing.assert_allclose(gains, [1 / np.log2(3), 0, 1, 0, 1 / np.log2(11)], rtol=1e-12)
    values = np.array([0, 1, 50, 255])
    assert unpack(pack(values)).tolist() == values.tolist()


def test_false_negatives_are_later_purchases(data: Data, lab: Lab) -> None:
    train, _ = lab.sessions(0)
    noisy = alignment_sessions.with_false_negatives(data, train, 0.2, seed=0)
    changed = noisy.negatives != train.negatives
    assert int(changed.sum()) == round(0.2 * int((train.negatives >= 0).sum()))
    for row in range(len(train.users)):
        later = data.train[int(train.users[row])][int(train.cuts[row]) + 3 :]
        assert set(noisy.negatives[row][changed[row]].tolist()) <= set(later)
        sids = [tuple(data.sids[item].tolist()) for item in noisy.negatives[row].tolist() if item >= 0]
        assert len(set(sids)) == len(sids)
    with pytest.raises(ValueError, match="false negatives asked for"):
        alignment_sessions.with_false_negatives(data, train, 1.0, seed=0)


def test_false_negatives_are_spread_evenly(data: Data) -> None:
    train = [list(range(9)), list(range(20, 29)), [40, 41, 42]]
    sessions = Sessions(
        users=torch.tensor([0, 1, 2]),
        cuts=torch.tensor([1, 1, 1]),
        positives=torch.tensor([[1, 2, 3], [21, 22, 23], [41, 42, -1]]),
        negatives=torch.tensor([[50, 51, 52, 53]] * 3),
    )
    noisy = alignment_sessions.with_false_negatives(dataclasses.replace(data, train=train), sessions, 0.34, seed=0)
    assert (noisy.negatives != sessions.negatives).sum(1).tolist() == [2, 2, 0]


def test_bootstrap_of_known_differences() -> None:
    constant, split = paired_bootstrap(np.array([[1.0, 1.0], [1.0, -1.0]] * 200), 2000)
    assert constant[:3] == (1.0, 1.0, 1.0)
    assert split.mean == 0
    assert split.z == 0
    np.testing.assert_allclose([split.low, split.high], [-1.96 / 20, 1.96 / 20], atol=0.01)


def test_the_rule_for_the_defaults() -> None:
    article = np.tile([0.0, 1.0], 500)
    better, noise = article + 0.1, article.copy()
    noise[:3] += 0.5  # above on three users of a thousand: the interval holds 0
    noise[3] -= 0.4
    assert choose({"a": article, "b": better}, "a", 500).chosen == "b"
    assert choose({"a": article, "b": article - 0.1}, "a", 500)[:2] == ("a", "a")
    kept = choose({"a": article, "b": noise}, "a", 500)
    assert (kept.chosen, kept.best) == ("a", "b")
    assert kept.difference.low <= 0 < kept.difference.mean


def test_supervised_training_resumes(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = alignment_sft.train(data, 0, tmp_path / "whole.pt", epochs=4)
    save, saved = alignment_sft.save, []

    def killed(path: Path, state: object) -> None:
        save(path, state)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(alignment_sft, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        alignment_sft.train(data, 0, tmp_path / "cut.pt", epochs=4)
    resumed = alignment_sft.train(data, 0, tmp_path / "cut.pt", epochs=4)
    assert resumed["losses"] == whole["losses"]
    assert all(torch.equal(resumed["model"][name], value) for name, value in whole["model"].items())


def test_the_grid_writes_every_cell_and_a_report(lab: Lab) -> None:
    names = {cell.name for stage in alignment_grid.stages(lab) for cell in stage}
    lines = {record["cell"]: record for record in results.read(lab.results)["alignment"]["results"]}
    assert lines.keys() >= names
    assert {"test-sft-s0", "test-rad_dpo-s1", "test-rad_dpo_no_rdrw-s0-false0.1", "validate-rad_dpo"} <= names
    for name in names:
        assert lines[name]["seconds"] > 0
        assert lines[name]["peak_mib"] > 0


def test_cells_that_are_there_are_skipped(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    again = Lab(lab.folder, lab.scale, lab.cache.parent)
    before = lab.results.stat().st_mtime_ns
    monkeypatch.setattr(Lab, "write", None)  # a cell that is computed would be written
    for stage in alignment_grid.stages(again):
        records.compute(again, stage, 1)
    assert lab.results.stat().st_mtime_ns == before


def forget(lab: Lab, names: list[str]) -> list[dict]:
    """Takes these cells' lines out of the file; their results."""
    kept = results.read(lab.results)
    lost = {record["cell"]: record["result"] for record in kept["alignment"]["results"] if record["cell"] in names}
    kept["alignment"]["results"] = [record for record in kept["alignment"]["results"] if record["cell"] not in names]
    results.write(lab.results, kept)
    return [lost[name] for name in names]


def test_a_lost_cell_comes_back_the_same(lab: Lab) -> None:
    """As after a kill between two cells, the cache of checkpoints gone too."""
    names = ["test-rad_dpo-s1", "tune-rad_dpo-lr2e-05-beta0.5"]
    before = forget(lab, names)
    for path in lab.cache.glob("aligned-*.pt"):
        path.unlink()
    for stage in alignment_grid.stages(lab):
        records.compute(lab, [cell for cell in stage if cell.name in names], 1)
    after = forget(lab, names)
    for old, new in zip(before, after, strict=True):
        assert {k: v for k, v in old.items() if "seconds" not in k} == {
            k: v for k, v in new.items() if "seconds" not in k
        }


def test_a_worker_process_gives_the_same(lab: Lab) -> None:
    cells = next(iter(alignment_grid.stages(lab)))[:1]
    before = [lab.run(cell)["result"]["losses"] for cell in cells]
    forget(lab, [cell.name for cell in cells])
    for path in lab.cache.glob("sft-*.pt"):
        path.unlink()
    records.compute(lab, cells, 2)
    assert [lab.run(cell)["result"]["losses"] for cell in cells] == before


def test_another_configuration_is_another_cell(lab: Lab) -> None:
    cell = next(iter(alignment_grid.stages(lab)))[0]
    wider = Lab(lab.folder, dataclasses.replace(lab.scale, epochs=1), lab.cache.parent)
    wider.results = Path(shutil.copy(lab.results, lab.cache / "others.jsonl"))
    assert len(wider.run(cell)["result"]["losses"]) == 1


@pytest.mark.parametrize("make", [lambda path: path / "absent", lambda path: path])
def test_bad_data_is_told_of(make: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert alignment.main(["--data", str(make(tmp_path))]) == 2  # type: ignore[operator]
    assert capsys.readouterr().err.startswith(f"alignment: {tmp_path}")
