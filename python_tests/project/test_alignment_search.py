"""The alignment experiment on the search shop, on tiny data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from benchmarks.alignment import records
from benchmarks.alignment.search import grid, report
from benchmarks.alignment.search.cells import Knobs, Scale, SearchLab
from benchmarks.alignment.search.methods import METHODS
from demo.search.shop import SearchShop

TINY = Scale(
    name="tiny",
    shops=(0, 1),
    inits=(0, 1),
    tuned_on=1,
    asked_on=1,
    epochs=1,
    supervised=300,
    aligned=64,
    probes=16,
    validation=40,
    queries=30,
    beams=20,
    resamples=200,
    settings=2,
    methods=("sft_continued", "s_dpo", "rad_dpo", "rad_dpo_no_rdrw"),
    questions=("negatives", "SIDs of 3 and 4 codes"),
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> SearchLab:
    """The whole grid, run once."""
    lab = SearchLab(TINY, tmp_path_factory.mktemp("cache"))
    for stage in grid.stages(lab):
        records.compute(lab, stage, 1)
    return lab


@pytest.fixture(scope="module")
def shop() -> SearchShop:
    return SearchShop.make(0)


def test_every_preference_method_has_as_many_settings() -> None:
    assert {len(row.settings) for name, row in METHODS.items() if not name.startswith("sft")} == {12}
    assert {len(row.settings) for name, row in METHODS.items() if name.startswith("sft")} == {6}


def test_cells_that_are_there_are_skipped(lab: SearchLab, monkeypatch: pytest.MonkeyPatch) -> None:
    again = SearchLab(lab.scale, lab.cache.parent)
    monkeypatch.setattr(SearchLab, "write", None)  # a cell that is computed would be written
    for stage in grid.stages(again):
        records.compute(again, stage, 1)


def test_a_lost_cell_comes_back_the_same(lab: SearchLab) -> None:
    """Its checkpoint too."""
    cell = grid.test(lab, "rad_dpo", 1, 1)
    before = lab.run(cell)["result"]
    for path in lab.cache.glob("sft-*.pt"):
        path.unlink()
    assert lab.test(**cell.args) == before


def test_another_constant_is_another_cell(lab: SearchLab) -> None:
    cell = grid.test(lab, "rad_dpo", 0, 0)
    other = cell._replace(args={**cell.args, "world": {"page": 6}})
    assert lab.config(cell)["constants"] != lab.config(other)["constants"]
    assert lab.config(cell)["constants"] == lab.config(grid.sft(0, 0))["constants"]


def test_the_tuned_setting_is_the_best_on_validation(lab: SearchLab) -> None:
    for by in grid.BY.values():
        scores = {cell.name: lab.run(cell)["result"][by] for cell in grid.tuning(lab, "rad_dpo")}
        best = max(scores, key=lambda name: scores[name])
        setting = next(cell.args["setting"] for cell in grid.tuning(lab, "rad_dpo") if cell.name == best)
        assert grid.tuned(lab, "rad_dpo", by) == setting
    assert grid.tuned(lab, "sft") == {}
    assert grid.tuned(lab, "rad_dpo", sft_weight=1.0)["sft_weight"] == 1.0


def test_the_page_metric_by_hand(lab: SearchLab) -> None:
    """One row per item, without packing."""
    there, model = lab.world(0, {}), lab.start(0, 0, {})
    gains = []
    for row, prompt in enumerate(there.tokens.prompts(there.validation.queries)):
        scores = {}
        for item in there.validation.shown[row].tolist():
            ids = torch.tensor([[*prompt, *there.tokens.of_item[item].tolist()]])
            with torch.no_grad():
                logps = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores[item] = float(logps.gather(1, there.tokens.of_item[item][:, None]).sum())
        gains.append(1 / np.log2(2 + sum(score > scores[there.wanted[row]] for score in scores.values())))
    known = lab.run(grid.sft(0, 0))["result"]["page_ndcg"]
    assert known == pytest.approx(np.mean(gains), abs=0.02)  # a tie to rounding may fall either way


def test_the_report_is_of_the_cells(lab: SearchLab, capsys: pytest.CaptureFixture[str]) -> None:
    report.write(lab)
    out = capsys.readouterr().out
    rows = report.main_rows(lab)
    tests = [lab.run(grid.test(lab, "s_dpo", shop, init))["result"] for shop in (0, 1) for init in (0, 1)]
    assert rows["s_dpo"]["ndcg@10"] == pytest.approx(np.mean([result["ndcg@10"] for result in tests]))
    start = [lab.run(grid.test(lab, "sft", shop, init))["result"] for shop in (0, 1) for init in (0, 1)]
    gain = np.mean([a["ndcg@10"] - b["ndcg@10"] for a, b in zip(tests, start, strict=True)])
    assert rows["s_dpo"]["ndcg"].mean == pytest.approx(gain, abs=2e-3)  # kept in 255ths
    assert "| 8 random | `rad_dpo` |" in out
    assert "| `rad_dpo_no_rdrw, sft_weight=0.1` |" in out
    assert (lab.cache / "figures" / "alignment-search.png").read_bytes().startswith(b"\x89PNG")


def test_holm() -> None:
    adjusted = report.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert report.holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_the_interval_covers_shops_and_queries() -> None:
    """Shops that differ more than their queries do make it as wide as they are apart; where they do not differ, queries
    count at both levels, which errs on the wide side by the root of 2."""
    rng = np.random.default_rng(0)
    queries = [rng.normal(0.1, 0.05, 400) for _ in range(5)]
    narrow = report.change(queries, 2000)
    assert narrow.mean == pytest.approx(np.mean(queries))
    assert narrow.error == pytest.approx(np.sqrt(2) * 0.05 / np.sqrt(2000), rel=0.2)
    wide = report.change([values + shift for values, shift in zip(queries, (-0.1, 0, 0, 0, 0.1), strict=True)], 2000)
    assert wide.error == pytest.approx(np.std([-0.1, 0, 0, 0, 0.1]) / np.sqrt(5), rel=0.15)
    assert wide.low < 0.1 < wide.high
    assert narrow.p < 1e-6 < wide.p


@pytest.mark.parametrize("knob", ["random", "false", "twins"])
def test_knobs_replace_negatives(shop: SearchShop, knob: str) -> None:
    value = True if knob == "random" else 0.5
    plain = Knobs().make(shop, 500, np.random.default_rng(0))
    changed = Knobs(**{knob: value}).make(shop, 500, np.random.default_rng(0))
    assert np.array_equal(plain.positives, changed.positives)
    real = plain.negatives.numpy() >= 0
    assert np.array_equal(real, changed.negatives.numpy() >= 0)
    other = (plain.negatives.numpy() != changed.negatives.numpy()) & real
    assert other[real].mean() == pytest.approx(1 if knob == "random" else 0.5, abs=0.07)
    rows, places = np.nonzero(other)
    drawn = changed.negatives.numpy()[rows, places]
    if knob == "false":
        best = np.argsort(-shop.order_probability(plain.queries), 1)[:, :20]
        assert all(item in best[row] for row, item in zip(rows, drawn, strict=True))
    if knob == "twins":
        winners = plain.positives[:, 0].numpy()[rows]
        assert np.array_equal(shop.attributes[drawn, :2], shop.attributes[winners, :2])


def test_knobs_of_positives_and_orders(shop: SearchShop) -> None:
    assert Knobs(positives=1, negatives=2).make(shop, 50, np.random.default_rng(0)).negatives.shape == (50, 2)
    assert len(Knobs(sessions=30).make(shop, 50, np.random.default_rng(0)).positives) == 30
    found = Knobs().make(shop, 2000, np.random.default_rng(0))
    clicks = Knobs(clicks_only=True).make(shop, 2000, np.random.default_rng(0))
    wrong = Knobs(wrong_orders=1.0).make(shop, 2000, np.random.default_rng(0))
    worth = [shop.worth[sessions.positives[:, 0].numpy()].mean() for sessions in (found, clicks, wrong)]
    assert worth[0] > max(worth[1:]) + 0.05
