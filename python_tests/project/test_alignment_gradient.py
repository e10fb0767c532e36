"""The table of what policy gradients expect: measured on few groups, and docs/policy.md is that of the result."""

from __future__ import annotations

import math

import pytest

from benchmarks.alignment import gradient
from benchmarks.harness import results


def kept() -> dict:
    return results.read(gradient.RESULT)[gradient.RUN]


def test_page_is_that_of_the_result() -> None:
    page = gradient.PAGE.read_text()
    assert gradient.render(page, kept()) == page


def test_result_is_of_these_estimators() -> None:
    """Few groups have the variance and, within its error, the mean of the many."""
    few = gradient.measure(1_000)
    many = kept()["results"]
    names = ("rollouts", "samples", "estimator")
    assert [[cell[name] for name in names] for cell in few] == [[cell[name] for name in names] for cell in many]
    for cell, other in zip(few, many, strict=True):
        assert cell["sd"] == pytest.approx(other["sd"], rel=0.15, abs=1e-6)
        assert math.isclose(cell["bias"], other["bias"], abs_tol=5 * cell["error"] * cell["factor"] + 1e-5)
        assert cell["distinct"] == pytest.approx(other["distinct"], rel=0.05)


def test_the_docs_advice_is_what_was_measured() -> None:
    """Unbiased to the error are those that docs/policy.md calls so, and no step size helps beams."""
    cells = {(cell["rollouts"], cell["estimator"], cell["samples"]): cell for cell in kept()["results"]}
    for samples in gradient.SAMPLES:
        for rollouts, name in (
            ("independent", '`scale="none", baseline="loo"` (RLOO)'),
            ("independent", "`rewards - b`"),
            ("sample", "`rewards - b`"),
        ):
            cell = cells[rollouts, name, samples]
            assert cell["bias"] < 2 * cell["error"]
        assert all(cells["beams", name, samples]["turned"] > 0.3 for name in gradient.ESTIMATORS["beams"])
