"""The experiment on kinds of SIDs, on tiny made-up data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
from support.catalogue_files import write_walks

from benchmarks.alignment.data import make_data
from benchmarks.alignment.records import compute
from benchmarks.alignment.sids.__main__ import cell, table
from benchmarks.alignment.sids.catalogues import catalogue, embeddings
from benchmarks.alignment.sids.cells import ARMS, Scale, SIDLab, _batches

TINY = Scale(name="tiny", seeds=(0,), epochs=1, users=10, beams=5, free_users=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_walks(tmp_path_factory.mktemp("toys"))


def test_the_arms_run_and_are_reported(folder: Path, tmp_path: Path) -> None:
    lab = SIDLab(folder, TINY, tmp_path)
    compute(lab, [cell(name, 0) for name in ARMS], 1)
    lines = table(lab).splitlines()
    assert [line.split("|")[1].strip(" `") for line in lines[2:]] == [*ARMS]
    results = {name: lab.run(cell(name, 0))["result"] for name in ARMS}
    assert results["merged"]["prompt_tokens"] < results["given"]["prompt_tokens"] / 2
    assert results["pages"]["row_tokens"] == results["given"]["row_tokens"]
    assert len({tuple(result["losses"]) for result in results.values()}) == len(ARMS)


def test_the_catalogues_differ_in_their_sids_alone(folder: Path) -> None:
    given, own, balanced = (catalogue(folder, kind) for kind in ("given", "own", "balanced"))
    assert own.train == given.train
    assert len(np.unique(own.sids, axis=0)) == len(np.unique(balanced.sids, axis=0)) == len(given.sids)
    assert np.bincount(balanced.sids[:, 0]).max() <= np.bincount(own.sids[:, 0]).max()


def test_what_is_bought_together_is_near() -> None:
    sequences = [[0, 1, 2], [2, 1, 0], [3, 4, 5], [5, 4, 3]] * 3
    x = torch.nn.functional.normalize(embeddings(sequences, 6), dim=1)
    likeness = x @ x.T
    assert float(likeness[:3, :3].min()) > 0.5 > float(likeness[:3, 3:].abs().max())


def test_rows_are_cut_out_of_the_sequences(folder: Path) -> None:
    data = make_data(catalogue(folder, "given"))
    rows = [row for batch in _batches(data, data.train, np.random.default_rng(0)) for row in batch]
    assert len(rows) == len(data.train)
    known = {
        (tuple(data.prompts([items[:cut]])[0]), tuple(map(tuple, data.tokens[items[cut : cut + 3]].tolist())))
        for items in data.train
        for cut in range(1, len(items))
    }
    assert all((tuple(row["prompt_ids"]), tuple(map(tuple, row["positives"]))) in known for row in rows)
