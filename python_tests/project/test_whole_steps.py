"""The benchmark of whole training steps compares what is the same, and its parts are those of the step."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from support.matmul import products_by_onednn

from benchmarks.pages import figures, suite_page
from benchmarks.peers import compare_policy_steps, compare_whole_steps, trainer_steps
from benchmarks.peers.compare_whole_steps import CASES, Case
from benchmarks.peers.onednn import by_onednn
from benchmarks.peers.whole_steps import STAGES, WAYS, Steps
from raddpo_ext import _matmul
from raddpo_ext.integrations.onednn import OneDNNLinear

SMALL = Case(2048, 4, 4)


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps(SMALL)


def test_all_ways_agree(steps: Steps) -> None:
    compare_whole_steps._check(steps, WAYS)
    wrong = replace(WAYS["packed"], logps=lambda *args: 1.01 * WAYS["packed"].logps(*args))
    with pytest.raises(AssertionError, match="wrong differs by"):
        compare_whole_steps._check(steps, {"ours": WAYS["ours"], "wrong": wrong})


@pytest.mark.parametrize("name", compare_whole_steps.PARTS)
def test_the_stages_are_the_step(steps: Steps, name: str) -> None:
    steps.clear()
    steps.step(WAYS[name])
    whole = steps.gradient()
    steps.clear()
    stages = steps.stages(WAYS[name])
    assert list(stages) == list(STAGES)
    assert stages["backbone"] > 0
    torch.testing.assert_close(steps.gradient(), whole, rtol=1e-4, atol=1e-6)


def test_cases_vary_one_thing_at_a_time() -> None:
    base, names = CASES[0], [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        changed = {key for key, value in vars(case).items() if value != vars(base)[key]}
        assert len(changed - {"vocab_size", "keeps"}) <= 1
    assert all(case.sessions == 2 for case in CASES)


def test_the_trainer_takes_turns_with_the_ten_lines() -> None:
    found = trainer_steps.seconds(replace(SMALL, trainer=True), 2)
    assert set(found) == {x for name in trainer_steps.OTHERS for x in (name, trainer_steps.beside(name))}
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())


def test_tables_and_bars() -> None:
    """A way that is left out has a dash, and a part below nothing no bar."""
    parts = {"ours": {"backbone": 20.0, "head": 10.0, "rest": -1.0}}
    costs = {name: {"ms": 30.0} for name in ("ours", "ours, level")}
    gflop = {name: {"backbone": 1.0, "head": 1.0} for name in ("ours", "ours, level")}
    ratios = {"packed / ours": {"median": 1.2, "least": 1.1, "most": 1.3}}
    cell = {"case": "a", "costs": costs, "ratios": ratios, "parts": parts, "gflop": gflop, "gflop_per_s": 100.0}
    beside = {"trainer / ten lines": {"median": 1.25, "least": 1.0, "most": 1.5}}
    found = {"whole-steps": {"results": [cell, {"case": "trainer b", "ratios": beside}]}}
    text = compare_whole_steps.markdown(found["whole-steps"]["results"])
    assert "1.20x (1.10-1.30) | -" in text
    assert "1.50x" in text  # 30 ms over 2 GFLOP at 100 GFLOP/s
    assert "1.25x (1.00-1.50)" in text
    summary = suite_page.summary(found)
    assert "plain torch, the same packed rows | 1.2x" in summary
    assert "ten lines of a loop | **0.8x**" in summary
    assert figures.has_figure(found, "whole-steps")
    drawn = figures.figure(found, "whole-steps").axes[0].patches
    assert [bar.get_width() for bar in drawn] == [20, 10, 0]
    assert not figures.has_figure({"whole-steps": {"results": []}}, "whole-steps")
    assert not figures.has_figure(found, "sids")


@pytest.mark.parametrize("onednn", [False, True])
def test_a_floor_counts_the_products_of_both_libraries(onednn: bool) -> None:
    left, right = torch.randn(3, 8), torch.randn(5, 8)
    with products_by_onednn(onednn):
        assert compare_policy_steps.operations(lambda: _matmul.linear(left, right)) == 2 * 3 * 8 * 5


def test_a_method_by_onednn_leaves_the_model_as_it_was() -> None:
    model = torch.nn.Linear(8, 5)
    with products_by_onednn():
        assert by_onednn(model, lambda: type(model))() is OneDNNLinear
    assert type(model) is torch.nn.Linear
