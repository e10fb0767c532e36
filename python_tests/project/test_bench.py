"""``python -m raddpo_ext bench``: the table, the file, exit codes, and that a wrong result is never timed."""

from __future__ import annotations

import json
import math
import subprocess
from itertools import count

import numpy as np
import pytest
import torch

from raddpo_ext.__main__ import main
from raddpo_ext.bench import beam_search_peers, command, compare, report, retriever
from raddpo_ext.bench.compare import Comparison, Mismatch, Missing, measure
from raddpo_ext.bench.suite import CORE, TINY

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """torch.compile would take most of the time."""

    def refuse(*args, **kwargs):
        def run(*args):
            raise RuntimeError("no compiler\nand more")

        return run

    monkeypatch.setattr(torch, "compile", refuse)


def run(capsys, *arguments):
    """Exit code, stdout, stderr."""
    try:
        code = main(["bench", *arguments])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_table_and_file(tmp_path, capsys):
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    code, out, err = run(capsys, "--quick", "--tiny", "--threads", "2", "--json", str(tmp_path / "result.json"))
    assert code == 0
    assert torch.get_num_threads() == threads
    assert [line.split(" s  ")[1] for line in err.splitlines() if " s  " in line] == list(TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    result = json.loads((tmp_path / "result.json").read_text())
    tables = "".join("\n".join([*report.table([one]), "", ""]) for one in result["results"])
    assert out == tables + report.headline(result) + "\n"
    assert "not here: torch.compile of these: torch.compile does not work here: no compiler" in result["markdown"]
    assert f"torch {torch.__version__}" in out
    assert "cpu, 2 threads" in out
    assert (result["threads"], result["device"], result["processes"]) == (2, "cpu", 1)
    peers = {
        "beam step": 4,
        "token_logps": 2,
        "session loss": 2,
        "policy_loss": 2,
        "legal_mass": 2,
        "index": 3,
        "retrieval": 2,
    }
    for name, case in zip(TINY, result["results"], strict=True):
        assert next(iter(case["methods"])) == "ours"
        assert len(case["methods"]) == peers.get(name, 3) + len(case["floors"])  # linear_cross_entropy: newer torch
        assert case["floors"]
        for time in case["methods"].values():
            assert 0 < time["least"] <= time["median"] <= time["most"] < math.inf
            assert time["calls"] == 1
            assert time["cpu"] >= 0
    assert "bytes per item" in result["results"][-2]["note"]


def test_tables_come_one_by_one(capsys):
    """The first is there before the second is made."""
    printed = []

    def second(device):
        printed.append(capsys.readouterr().out)
        raise Missing("it is not here")

    name = next(iter(TINY))
    command.compare({name: TINY[name], "second": second}, torch.device("cpu"), 1, 0)
    assert printed[0].startswith("|")
    assert "ours" in printed[0]
    assert "not here: second: it is not here" in capsys.readouterr().out


def test_every_case_is_tried(monkeypatch):
    """The real sizes are those of cases that the tiny ones try, too."""
    assert {prepare.func for prepare in CORE.values()} == {prepare.func for prepare in TINY.values()}


def test_without_transformers(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    monkeypatch.setattr(command, "TINY", {"retrieval": TINY["retrieval"]})
    code, out, _ = run(capsys, "--quick", "--tiny")
    assert code == 0
    assert "not here: retrieval: transformers cannot be imported" in out


def perturbed(result):
    """The same with one thing wrong."""
    if isinstance(result, np.ndarray):
        return np.append(result, result[-1] + 1)
    if isinstance(result, dict):
        result.popitem()
        return result
    first, *rest = result
    if not isinstance(first, torch.Tensor):
        return [perturbed(first), *rest]
    return [first * 1.01, *rest]


@pytest.mark.parametrize("name", TINY)
def test_a_wrong_result_is_an_error(name):
    if name == "retrieval":
        pytest.importorskip("transformers")
    comparison = TINY[name](CPU)
    measure(comparison, 1, 0)
    for method, right in list(comparison.methods.items())[1:]:
        comparison.methods[method] = lambda right=right: perturbed(right())
        with pytest.raises(Mismatch, match=method.split("(")[0]):
            measure(comparison, 1, 0)
        comparison.methods[method] = right


def test_wrong_gradients_are_an_error():
    for name in ("token_logps", "linear_token_logps", "session loss", "policy_loss", "legal_mass"):
        comparison = TINY[name](CPU)
        method, right = list(comparison.methods.items())[1]
        for place in range(1, len(right())):
            wrong = [value * (1.01 if i == place else 1) for i, value in enumerate(right())]
            comparison.methods[method] = lambda wrong=wrong: wrong
            with pytest.raises(Mismatch, match=f"result {place}"):
                measure(comparison, 1, 0)


def test_retrieved_sids_must_be_the_same():
    """But for those of equal scores, and the last, which may have an equal one beyond the beam."""
    scores, sids = torch.tensor([[-1.0, -2, -3, -3.00001, -5]]), torch.arange(15).view(1, 5, 3)

    def found(*order):
        return scores, sids[:, list(order)]

    for order in ((0, 1, 2, 3, 4), (0, 1, 3, 2, 4), (0, 1, 2, 3, 0)):
        retriever.agree(found(*order), found(0, 1, 2, 3, 4))
    for order in ((1, 0, 2, 3, 4), (0, 2, 1, 3, 4), (4, 1, 2, 3, 0)):
        with pytest.raises(AssertionError, match="other SIDs"):
            retriever.agree(found(*order), found(0, 1, 2, 3, 4))
    with pytest.raises(AssertionError, match="scores are off"):
        retriever.agree((scores + 0.01, sids), (scores, sids))


def test_empty_slots_must_be_the_same():
    expected = torch.tensor([[-1.0, -2.0, -math.inf]])
    beam_search_peers.agree([torch.tensor([-1.0, -2.0])], expected)
    for scores in ([-1.0], [-1.0, -2.0, -3.0], [-1.0, -2.1]):
        with pytest.raises(AssertionError, match="off by"):
            beam_search_peers.agree([torch.tensor(scores)], expected)


def test_nan_is_no_agreement():
    with pytest.raises(AssertionError):
        compare.agree([torch.tensor([math.nan])], [torch.tensor([1.0])])


def test_mismatch_is_an_exit_code(tmp_path, monkeypatch, capsys):
    def prepare(device):
        return Comparison("pi", {"ours": lambda: [torch.tensor(3.0)], "theirs": lambda: [torch.tensor(4.0)]}, {})

    monkeypatch.setattr(command, "TINY", {"pi": prepare})
    code, out, err = run(capsys, "--quick", "--tiny", "--json", str(tmp_path / "result.json"))
    assert (code, out) == (1, "")
    assert "pi: theirs differs from ours: its result 0 is off by 0.33" in err
    assert not any(tmp_path.iterdir())


def test_fresh_processes(monkeypatch, capsys):
    """The child is this command with --quick; medians are taken over the children."""
    took = count(1)

    def prepare(device):
        return Comparison("wait", {"ours": lambda: []}, {"floor": lambda: []}, unavailable={"theirs": "gone"})

    def child(arguments, **options):
        assert arguments[1:4] == ["-m", "raddpo_ext", "bench"]
        assert {"--quick", "--tiny"} <= set(arguments)
        assert options["check"]
        times = {"median": next(took), "least": 0, "most": 9, "cpu": 1, "calls": 2}
        monkeypatch.setattr(command, "measure", lambda *_: {"ours": times, "floor": times})
        assert main(arguments[3:]) == 0

    monkeypatch.setattr(command, "TINY", {"wait": prepare})
    monkeypatch.setattr(subprocess, "run", child)
    merged = []
    monkeypatch.setattr(report, "merged", lambda runs, merge=report.merged: merged.extend(merge(runs)) or merged)
    code, out, _ = run(capsys, "--tiny")
    assert code == 0
    assert merged[0]["methods"]["ours"] == {"median": 3, "least": 1, "most": 5, "cpu": 1, "calls": 10}
    assert "not here: theirs: gone" in out


def test_a_child_that_fails(monkeypatch, capsys):
    def child(*_, **__):
        raise subprocess.CalledProcessError(1, "bench")

    monkeypatch.setattr(subprocess, "run", child)
    assert run(capsys)[:2] == (1, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--fast", "unrecognized arguments: --fast"),
        ("--threads 0", "--threads must be at least 1, got 0"),
        ("--threads two", "argument --threads: invalid int value: 'two'"),
        ("--device tpu", "argument --device: invalid choice: 'tpu'"),
        ("--device cuda", "--device cuda: "),
        ("--json nowhere/result.json", "--json nowhere/result.json: no such directory"),
        ("--json .", "--json .: is a directory"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "cuda" in arguments:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message in err


def test_a_build_without_cuda(monkeypatch, capsys):
    def prepare(device):
        raise NotImplementedError("Could not run 'raddpo::beam_step'\nwith a long story")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "TINY", {"step": prepare})
    code, _, err = run(capsys, "--quick", "--tiny", "--device", "cuda")
    assert code == 2
    assert err.splitlines()[-1] == "raddpo_ext: --device cuda: Could not run 'raddpo::beam_step'"


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(compare.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(compare.time, "process_time", lambda: 2 * self.now)

    def spend(self, *seconds):
        """A call that takes these times in turn."""
        turns = iter(seconds)

        def call():
            self.now += next(turns)

        return call


def test_times(monkeypatch):
    """The check's call and each burst's first do not count, slow methods have one burst, and a call holds steps."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(compare, "ENOUGH", 7.0)
    ours = clock.spend(100, 40, 2, 4, 40, 6)
    slow = clock.spend(100, 50)
    found = measure(Comparison("x", {"ours": ours, "slow": slow}, {}, steps=2, agree=lambda *_: None), 2, 45)
    assert found["slow"] == {"median": 25, "least": 25, "most": 25, "cpu": 50, "calls": 1}
    assert found["ours"] == {"median": 2.25, "least": 1.5, "most": 3, "cpu": 4.5, "calls": 3}


def test_times_on_a_gpu(monkeypatch):
    """By events, in milliseconds."""
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            recorded.append(self)

        def synchronize(self):
            assert recorded[-1] is self

        def elapsed_time(self, end):
            assert recorded[-2:] == [self, end]
            return 8.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    found = measure(Comparison("x", {"ours": lambda: []}, {}), 2, 0.02, torch.device("cuda"))
    assert found["ours"]["median"] == 8e-3
    assert found["ours"]["calls"] == 4  # of three a burst


def test_missing_method():
    def prepare():
        raise Missing("gone")

    comparison = Comparison("x", {}, {})
    comparison.offer("theirs", prepare)
    assert (comparison.methods, comparison.unavailable) == ({}, {"theirs": "gone"})
