"""The inputs that once broke a promise, and some beside them, through every target of fuzz/."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest

from fuzz.__main__ import TARGETS

CORPUS = Path(__file__).parents[2] / "fuzz/corpus"
NEEDS = {"session_logs": "datasets", "request_body": "pydantic", "tables": "pyarrow"}
CASES = [
    pytest.param(target, path, id=f"{target}-{path.name}")
    for target, corpus in TARGETS.items()
    if target != "index_check"  # C++; the same files go through index_file
    for path in sorted((CORPUS / corpus).iterdir())
]


@pytest.mark.parametrize(("target", "path"), CASES)
def test_promise_holds(target: str, path: Path) -> None:
    if target in NEEDS:
        pytest.importorskip(NEEDS[target])
    importlib.import_module(f"fuzz.{target}").run(path.read_bytes())


def test_changed_index_files() -> None:
    index_file = importlib.import_module("fuzz.index_file")
    rng, data = random.Random(0), b""
    for _ in range(100):
        data = index_file.mutate(data, 16384, rng.randrange(2**32))
        index_file.run(data)


@pytest.mark.parametrize("target", ["tables", "id_map"])
def test_changed_catalogues(target: str) -> None:
    """Whatever a table or an id map holds, it is read as it is or refused by its name, of a table also by its row."""
    pytest.importorskip("pyarrow", reason="needs pyarrow, which comes with datasets")
    tables, module = importlib.import_module("fuzz.tables"), importlib.import_module(f"fuzz.{target}")
    whole = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]
    rng, refusals = random.Random(0), 0
    for _ in range(400):
        data = rng.choice(whole)
        data = data[:1] + tables.changed(data[1:], rng)
        refused = module.run(data)
        refusals += refused is not None
        if target == "tables" and refused is not None:
            assert tables.names_a_row(str(refused)), refused
    assert 100 < refusals < 400


def test_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 200_000
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS.values())
