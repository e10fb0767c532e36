"""The policy experiment, on a tiny shop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
from support.catalogue_files import write_walks

from benchmarks.alignment import grid as alignment_grid
from benchmarks.alignment.policy import methods, purchases
from benchmarks.alignment.policy.cells import REFERENCE, PolicyLab
from benchmarks.alignment.policy.grid import stages, tuned, tuning
from benchmarks.alignment.policy.report import table
from benchmarks.alignment.records import compute
from benchmarks.alignment.search.cells import Scale
from demo.search.data import Tokens
from demo.search.shop import SearchShop

TINY = Scale(
    name="policy-tiny",
    shops=(10,),
    inits=(0,),
    epochs=1,
    supervised=300,
    aligned=64,
    validation=20,
    queries=20,
    beams=50,
    settings=2,
    resamples=100,
    methods=("grpo, sample, trie", "eg_grpo, beams, vocab"),
)


def test_rewards_are_those_of_the_log() -> None:
    shop = SearchShop.make(10)
    log = shop.log(200, np.random.default_rng(0))
    rows = methods.rows_of_pages(log, Tokens.of(shop))
    for row, shown, clicked, ordered in zip(rows, log.shown, log.clicked, log.ordered, strict=True):
        expected = {
            item: 1.0 if order else 0.5
            for item, click, order in zip(shown.tolist(), clicked, ordered, strict=True)
            if click
        }
        assert row["rewards"] == expected
        assert len(row["positives"]) == len(expected)
        values = list(row["rewards"].values())
        assert values == sorted(values, reverse=True)  # the winner first


def test_the_grid_runs_and_is_reported(tmp_path: Path) -> None:
    lab = PolicyLab(TINY, tmp_path)
    for stage in stages(lab):
        compute(lab, stage, 1)
    lines = table(lab).splitlines()
    assert [line.split("|")[1].strip(" `") for line in lines[2:]] == [*REFERENCE, *TINY.methods]
    for method in TINY.methods:
        cells = tuning(lab, method)
        scores = [lab.run(cell)["result"]["page_ndcg"] for cell in cells]
        assert tuned(lab, method) == cells[int(np.argmax(scores))].args["setting"]
    one, other = (lab.config(tuning(lab, method)[0])["definition"] for method in TINY.methods)
    assert one != other


def test_from_sft_to_retrieval_on_purchases(tmp_path: Path) -> None:
    scale = purchases.PURCHASES
    small = {"seeds": (0,), "epochs": 1, "sessions": 32, "probes": 8, "beams": 10, "tune_beams": 10, "next_beams": 10}
    users = {"users": 20, "tune_users": 20, "free_users": 5, "next_users": 5}
    scale = dataclasses.replace(scale, name="tiny", resamples=100, settings=1, **small, **users)
    lab = purchases.PurchasesLab(write_walks(tmp_path), scale, tmp_path / "cache")
    for stage in purchases.stages(lab):
        compute(lab, stage, 1)
    lines = purchases.table(lab).splitlines()
    assert [line.split("|")[1].strip(" `") for line in lines[2:]] == ["sft", *scale.methods]
    sessions, _ = lab.sessions(0)
    rows = methods.rows_of_purchases(lab.data, sessions)
    for row, user, cut in zip(rows, sessions.users.tolist(), sessions.cuts.tolist(), strict=True):
        first, *later = lab.data.train[user][cut : cut + 3]
        assert row["rewards"] == {**dict.fromkeys(later, 0.5), first: 1.0}
        assert row["prompt_ids"] == lab.data.prompts([lab.data.train[user][:cut]])[0]
    start, trained = lab.start(0), lab.aligned(scale.methods[0], alignment_grid.tuned(lab, scale.methods[0]), 0)[0]
    moved = [bool((a != b).any()) for a, b in zip(start.parameters(), trained.parameters(), strict=True)]
    assert all(moved)
