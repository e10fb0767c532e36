"""The deliberate faults still fit the sources, and the committed result is that of the list."""

from __future__ import annotations

import json

import pytest

from benchmarks.harness.catalogues import ROOT
from mutants.__main__ import LEAST_CAUGHT, RESULT
from mutants.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_the_fault_fits(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text()
    assert mutant.applied_to(text) != text
    assert all((ROOT / test).is_file() for test in mutant.tests)


def test_a_stale_fault_is_told() -> None:
    mutant = MUTANTS[0]
    for text in ("", 2 * mutant.old):
        with pytest.raises(ValueError, match=r"is stale: its text is in csrc/.* times, not 1"):
            mutant.applied_to(text)


def test_the_committed_result_is_of_this_list() -> None:
    result = json.loads(RESULT.read_text())
    assert [record["digest"] for record in result["mutants"]] == [mutant.digest for mutant in MUTANTS]
    caught = sum(record["caught"] for record in result["mutants"])
    assert len(MUTANTS) >= 30
    assert caught >= LEAST_CAUGHT * len(MUTANTS)
    tests = {test for mutant in MUTANTS for test in mutant.tests}
    assert {test for names in result["unmutated"] for test in names.split()} == tests
