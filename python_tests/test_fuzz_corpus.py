"""The inputs that once broke a promise, and some beside them, through every target of fuzz/."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest

from fuzz.__main__ import TARGETS

CORPUS = Path(__file__).parents[1] / "fuzz/corpus"
NEEDS = {"session_logs": "datasets", "request_body": "pydantic"}
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


def test_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 200_000
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS.values())
