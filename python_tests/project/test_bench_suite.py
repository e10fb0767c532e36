"""The suite runs its members, keeps what it has, and writes the page that stands in docs/."""

import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_bench import Clock

from benchmarks import bench_trie
from benchmarks.harness import catalogues, report, results, sources, suite, timing
from benchmarks.harness.suite import MEMBERS, Member
from benchmarks.pages import figures, readme_page, reliability_page, suite_page
from benchmarks.peers import token_logps_timing
from raddpo_ext.bench.compare import Missing, burst_of
from raddpo_ext.bench.trie import words_of

NAMES = [member.name for member in MEMBERS]
WORKING = """
import json, sys, time
sum(range(3_000_000))
held = bytearray(64 << 20)
out = sys.argv[sys.argv.index("--out") + 1]
open({ran!r}, "a").write("{name} ")
machine = dict(cpu="abacus", cores=2)
json.dump(dict(run="x", machine=machine, commit="c", command="of its own"), open(out, "w"))
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of its own, and modules first, second and third, which note that they ran."""
    for folder in ("op", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "code.h").write_text(folder)
    for name in ("first", "second", "third"):
        text = WORKING.format(name=name, ran=str(tmp_path / "ran"))
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    return tmp_path


STUBS = [Member(name, (name,), 1, ("op",)) for name in ("first", "second", "third")]


def ran(lab: Path) -> list[str]:
    """What ran since this was asked."""
    found = (lab / "ran").read_text().split() if (lab / "ran").exists() else []
    (lab / "ran").write_text("")
    return found


def test_collects_and_measures(lab: Path) -> None:
    path = lab / "results.jsonl"
    assert suite.run_all(STUBS, [], path) == []
    found = results.read(path)
    assert list(found) == ["first", "second", "third"]
    assert found["second"]["command"] == "python -m second"
    took = found["second"]["measured"]
    assert took["wall_s"] > 0
    assert 0 < took["cpu_s"] < 60
    assert 64 << 20 < took["peak_bytes"] < 64 << 30


def test_goes_on_where_it_was(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run = lab / "results.jsonl", suite.run

    def stopped(member: Member, quick: bool = False) -> dict:
        if member.name == "second":
            raise KeyboardInterrupt
        return run(member, quick)

    monkeypatch.setattr(suite, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        suite.run_all(STUBS, [], path)
    monkeypatch.setattr(suite, "run", run)
    assert ran(lab) == ["first"]
    assert suite.run_all(STUBS, [], path) == []
    assert ran(lab) == ["second", "third"]
    suite.run_all(STUBS, [], path)
    assert ran(lab) == []


def test_code_is_what_runs(tmp_path: Path) -> None:
    """Comments, docstrings and layout are not in it; strings, and what looks like a comment inside them, are."""

    def code(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return sources.code_of(tmp_path / name)

    plain = code("a.h", 'int f() {\n  return g("//x", "/* y */");\n}\n')
    assert plain == code("a.h", '// f\nint f() {  // why\n\n    return g("//x", "/* y */"); /* a\n b */\n}\n')
    assert "//x" in plain
    assert plain != code("a.h", 'int f() {\n  return g("//z", "/* y */");\n}\n')
    python = code("a.py", 'def f():\n    return "# x"\n')
    assert python == code("a.py", '"""A."""\n\n# why\ndef f():\n    """F,\n    said."""\n    return "# x"  # so\n')
    assert python != code("a.py", 'def f():\n    return "# y"\n')
    assert python != code("a.py", 'def f():\n  if 1:\n    return "# x"\n')


def test_only_an_edit_of_its_sources_makes_a_result_stale(lab: Path) -> None:
    path, members = lab / "results.jsonl", [*STUBS[:2], Member("third", ("third",), 1, ("op", "other"))]

    def again() -> list[str]:
        suite.run_all(members, [], path)
        return ran(lab)

    assert again() == ["first", "second", "third"]
    (lab / "op" / "notes").write_text("no source")
    (lab / "op" / "code.h").rename(lab / "op" / "moved.h")
    assert again() == []
    (lab / "op" / "moved.h").write_text("// said otherwise\n" + (lab / "op" / "moved.h").read_text())
    assert again() == []
    (lab / "other" / "code.h").write_text("edited")
    assert again() == ["third"]
    (lab / "op" / "more.py").write_text("added")
    assert again() == ["first", "second", "third"]
    found = results.read(path)
    found["second"]["sources"] = "unknown"
    results.write(path, found)
    assert again() == ["second"]
    (lab / "other" / "deeper").mkdir()
    (lab / "other" / "deeper" / "code.h").write_text("deeper")
    assert again() == ["third"]
    (lab / "other" / "deeper" / "code.h").unlink()
    (lab / "other" / "code.h").unlink()
    with pytest.raises(FileNotFoundError, match="no sources at other"):
        again()


def test_every_member_is_built_of_sources_that_are_there() -> None:
    assert all(len(sources.digest(member.sources)) == 16 for member in MEMBERS)


@pytest.mark.parametrize(
    ("places", "importing"),
    [
        (sources.DECODING, sources.DECODING),
        (sources.LOSSES, sources.LOSSES),
        (sources.SERVICE, ("raddpo_ext/serve",)),  # the integrations import the losses too, which no search uses
    ],
    ids=["decoding", "losses", "service"],
)
def test_what_a_source_imports_is_a_source(places: tuple[str, ...], importing: tuple[str, ...]) -> None:
    """But for what reads files, and the trie of log-probs, whose cases have none."""
    known = {"raddpo_ext/_files.py", "raddpo_ext/index/tokenizer_sids.py", "raddpo_ext/index/trie.py"}
    root, found = sources.ROOT, set()

    def modules_in(places: tuple[str, ...]) -> list[Path]:
        return [
            file for place in places for file in (root / place, *(root / place).rglob("*.py")) if file.suffix == ".py"
        ]

    known |= {str(file.relative_to(root)) for file in modules_in(places)}
    for file in modules_in(importing):
        for package, names in re.findall(r"^from (raddpo_ext[\w.]*) import (.*)$", file.read_text(), re.MULTILINE):
            modules = [package, *(f"{package}.{name}" for name in names.split(", "))]
            found |= {module.replace(".", "/") + ".py" for module in modules}
    found = {path for path in found if (root / path).is_file()}
    assert found - known == set()


def test_no_cell_passes_for_a_run(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError, match="a cell of first must not have the key 'run', got 3"):
        results.write(path, {"first": {"commit": "c", "results": [{"case": "a", "run": 3}]}})
    assert not path.exists()
    path.write_text('{"case": "a"}\n')
    with pytest.raises(ValueError, match="the first line must have the key 'run'"):
        results.read(path)


def test_only_what_is_named(lab: Path) -> None:
    path = lab / "results.jsonl"
    suite.run_all(STUBS, [], path)
    before = results.read(path)
    before["second/part"] = before["third/part"] = {"commit": "x", "results": []}
    results.write(path, before)
    ran(lab)
    suite.run_all(STUBS, ["second"], path)
    after = results.read(path)
    assert ran(lab) == ["second"]
    assert list(after) == ["first", "second", "third", "third/part"]
    assert after["first"] == before["first"]
    assert after["second"]["measured"] != before["second"]["measured"]


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "pass"])
def test_failure_keeps_the_others(lab: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    path = lab / "machine.jsonl"
    suite.run_all(STUBS, [], path)
    before = results.read(path)
    (lab / "second.py").write_text(body)
    written = []
    monkeypatch.setattr(suite, "MEMBERS", STUBS)
    monkeypatch.setattr(report, "RESULTS", lab)
    monkeypatch.setattr(suite_page, "write", lambda results, *_: written.append(results))
    monkeypatch.setattr(reliability_page, "write", lambda: None)
    monkeypatch.setattr(sys, "argv", ["suite", "--machine", "machine", "--only", "second", "third"])
    ran(lab)
    assert suite.main() == 1
    assert ran(lab) == ["third"]
    after = results.read(path)
    assert written == [after]
    assert after["second"] == before["second"]
    assert after["third"]["measured"] != before["third"]["measured"]
    monkeypatch.setattr(sys, "argv", ["suite", "--machine", "machine", "--report"])
    assert suite.main() == 0
    assert ran(lab) == []
    assert len(written) == 2
    monkeypatch.setattr(sys, "argv", ["suite", "--machine", "another", "--report"])
    with pytest.raises(SystemExit):
        suite.main()
    assert len(written) == 2


def test_skips_without_data(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lab / "results.jsonl"
    monkeypatch.setattr(catalogues, "DATA", lab / "nowhere")
    members = [Member("first", ("first",), 1, ("op",), data=("industrial",)), STUBS[1]]
    assert suite.run_all(members, [], path) == []
    found = results.read(path)
    assert "industrial" in found["first"]["skipped"]
    assert "skipped" not in found["second"]
    results.write(path, {"first": {"results": [], "commit": "old"}})
    suite.run_all(members, ["first"], path)
    assert results.read(path) == {"first": {"results": [], "commit": "old"}}


def committed() -> tuple[str, Path, dict]:
    page = suite_page.PAGE.read_text()
    path = report.ROOT / re.search(r"`(benchmarks/results/[\w-]+\.jsonl)`", page)[1]
    return page, path, results.read(path)


def test_page_is_that_of_the_results() -> None:
    page, path, found = committed()
    assert suite_page.render(page, found, path, NAMES) == page, "write it: python -m benchmarks --report"


def test_reliability_page_is_that_of_the_records() -> None:
    page = reliability_page.PAGE.read_text()
    assert reliability_page.render(page) == page, "write it: python -m benchmarks --report"


def test_readme_table_is_that_of_the_results() -> None:
    page, gpu = readme_page.PAGE.read_text(), results.read(readme_page.GPU)
    found = committed()[2]
    assert readme_page.render(page, found, gpu) == page, "write it: python -m benchmarks --report"
    for row in found["whole-steps"]["results"]:
        for ratio in row["ratios"].values():
            ratio["median"] *= 1.5
    assert readme_page.render(page, found, gpu) != page


def test_page_changes_with_the_results_only_between_markers() -> None:
    page, path, found = committed()
    found["packing"]["commit"] = "of another day"
    changed = suite_page.render(page, found, path, NAMES)
    begin, end = page.index("<!-- begin packing -->"), page.index("<!-- end packing -->")
    assert changed[:begin] == page[:begin]
    assert changed.endswith(page[end:])
    assert "of another day" in changed
    assert suite_page.render(changed, found, path, NAMES) == changed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<!-- begin summary -->", ""),
        ("<!-- end summary -->", ""),
        ("<!-- begin summary -->", "<!-- begin sumary -->"),
        ("<!-- end summary -->", "<!-- end summary -->\n<!-- end summary -->"),
        ("<!-- end summary -->", "<!-- end summary -->\n<!-- begin more -->\n<!-- end more -->"),
        ("<!-- end summary -->", "<!-- end summary -->\n<!-- begin summary -->\n<!-- end summary -->"),
    ],
)
def test_markers_are_checked(old: str, new: str) -> None:
    page, path, found = committed()
    with pytest.raises(ValueError, match="marker"):
        suite_page.render(page.replace(old, new), found, path, NAMES)


def test_losses_are_as_plain_as_wins() -> None:
    def row(case: str, ratio: float) -> dict:
        return {"case": case, "ratios": {"static": {"median": ratio}}, "logit_bytes": 1, "costs": {"read": {"ms": 1}}}

    won = {"beam-search": {"results": [row("a", 3.0), row("b", 2.0)]}}
    assert "| decoding step | STATIC | 2.5x | 2x to 3x | 2 | no |" in suite_page.summary(won)
    lost = {"beam-search": {"results": [row("a", 3.0), row("b", 0.5), row("c", 0.25)]}}
    assert "| **0.5x** | 0.25x to 3x | 3 | **in 2 of 3**, at worst 0.25x: c |" in suite_page.summary(lost)


def test_a_page_of_less_is_written_too() -> None:
    page, path, found = committed()
    for name in found:
        text = suite_page.render(page, {name: found[name]}, path, NAMES)
        assert f"commit {found[name]['commit']}" in text
        assert "Not measured yet" in text
        assert not re.search(r"\b(nan|inf)x", text)
    assert "Not measured yet" in suite_page.render(page, {}, path, NAMES)


def test_parts_stand_for_their_member() -> None:
    found = {"losses": {"results": [{"case": "a", "ms": 1}, {"case": "b", "ms": 2}]}}
    found["losses/again"] = {"results": [{"case": "b", "ms": 3}]}
    assert {case: row["ms"] for case, row in figures.cases(found, "losses").items()} == {"a": 1, "b": 3}


def test_every_chart_has_its_floor() -> None:
    _, _, found = committed()
    drawn = 0
    for chart in figures.CHARTS.values():
        for *_, rows in chart(found).values():
            drawn += len(rows)
            for _, values, floor in rows:
                assert math.isfinite(floor)
                assert floor > 0
                assert values["ours"] > 0
    assert drawn > 30


def test_index_peers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sids = rng.integers(50, size=(2000, 3), dtype=np.int32)
    words = words_of(sids)
    np.testing.assert_array_equal(np.lexsort(words[::-1]), np.lexsort(sids.T[::-1]))
    long = rng.integers(2048, size=(2000, 8), dtype=np.int32)
    np.testing.assert_array_equal(np.lexsort(words_of(long)[::-1]), np.lexsort(long.T[::-1]))
    for method in bench_trie.METHODS.values():
        try:
            found = method(sids)
        except Missing:
            continue
        assert found["build_s"] > 0
        assert found["extra_bytes_per_item"] >= 0


def test_slow_losses_are_timed_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """By three calls, each after one that does not count; those that are slower yet by the check's alone."""
    clock = Clock(monkeypatch)

    def method(*seconds: float) -> Any:
        spend = clock.spend(*seconds)
        return lambda problem: lambda: (spend(), torch.ones(1))[1]

    case = SimpleNamespace(name="x", dtype=torch.float32)
    problem: Any = SimpleNamespace(case=case, leaves={}, clear=lambda: None, reset=lambda: None)
    methods = {"ours": method(3, 2, 1, 2, 1.5, 2, 1.25), "slow": method(5)}
    found = token_logps_timing.run_case(problem, methods, rounds=4)
    assert found["seconds"] == {"ours": 1.25, "slow": 5}


def test_a_call_is_measured() -> None:
    first = timing.measured(lambda: np.ones(8 << 20))
    assert len(first.value) == 8 << 20
    assert 64 << 20 <= first.peak_bytes < 80 << 20
    waiting = timing.timed(lambda: time.sleep(0.05))
    assert 0 <= waiting.cpu < 0.05 <= waiting.wall
    calls: list[str] = []
    costs = burst_of(lambda: (calls.append("call"), time.sleep(0.01)), 0.035, before=lambda: calls.append("before"))
    assert calls == ["before", "call"] * (len(costs) + 1)
    assert len(burst_of(lambda: time.sleep(0.01), 0.005)) == 1
    assert len(burst_of(lambda: time.sleep(0.01), 0.005, calls=3)) == 2
    turns = timing.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls[-4:] == ["a", "b", "a", "b"]
    assert [len(found) for found in turns.values()] == [2, 2]
