"""The scaling benchmark on tiny sizes: its points, tables, figures and page."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
import raddpo_ext as rx
from benchmarks import scaling
from benchmarks.harness import report, results
from benchmarks.pages import scaling_page
from benchmarks.pages.page import fill
from raddpo_ext.bench.searches import Search

DOCS = Path(__file__).parents[2] / "docs"
COUNTS = {"items": [30, 300], "width": [1, 3], "vocabulary": [256, 300], "length": [2, 3], "sessions": [4, 8]}
THREADS = []  # that each point had


@pytest.fixture(scope="module")
def points():
    """Of every family."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MILLION": 100, "BLOCK": 20, "ROUNDS": 1, "BURST": 0, "LARGE": 800}.items():
            patch.setattr(scaling, name, value)
        for name, value in {"CANDIDATES": 16, "PACKED": 8, "PROMPT": 3, "ROWS": (8, 9), "CODES": 2}.items():
            patch.setattr(scaling, name, value)
        threads, measure_all = torch.get_num_threads(), scaling.measure
        patch.setattr(scaling, "measure", lambda *args: THREADS.append(torch.get_num_threads()) or measure_all(*args))
        made = []
        for family, (measure, _) in scaling.FAMILIES.items():
            made += measure(COUNTS.get(family, [1, 2]))
        torch.set_num_threads(threads)
    return json.loads(json.dumps(made))


def test_points(points):
    families = scaling_page.families(points)
    assert list(families) == list(scaling.FAMILIES)
    for family, panels in families.items():
        for panel, found in panels.items():
            assert [point["x"] for point in found] == COUNTS.get(family, [1, 2]), panel
            for point in found:
                floor = point["floors"][0]
                assert len(point["methods"]) >= 2
                assert floor in point["methods"]
                assert floor != next(iter(point["methods"]))
                assert panel == "memory" or all(times["median"] > 0 for times in point["methods"].values())
    assert set(families["threads"]) >= {"index build", "token_logps", "linear_token_logps"}
    panels = len(families["threads"])
    assert THREADS[-2 * panels :] == [1] * panels + [2] * panels
    assert all("cpu" in times for p in families["threads"]["index build"] for times in p["methods"].values())


def test_whole_search_is_its_steps(points):
    panels = scaling_page.families(points)["length"]
    for step, search in zip(panels["beam step"], panels["whole search"], strict=True):
        for name, times in search["methods"].items():
            assert times["median"] == pytest.approx(step["x"] * step["methods"][name]["median"])
            assert times["cpu"] == pytest.approx(step["x"] * step["methods"][name]["cpu"])
            assert times["calls"] == step["methods"][name]["calls"]


def test_memory(points, monkeypatch):
    monkeypatch.setattr(scaling, "BLOCK", 20)
    for point in scaling_page.families(points)["items"]["memory"]:
        index = rx.TrieIndex.build(scaling.uniform(point["x"], 8192, 4))
        sizes = {name: size["median"] for name, size in point["methods"].items()}
        assert sizes.pop("peak of the build") >= 0
        assert sizes == {"index": index.nbytes / point["x"], "information in the SIDs": 6.5}


def test_notes(points):
    families = scaling_page.families(points)
    pairs = [point["note"]["pairs"] for point in families["sessions"]["rad_dpo_loss, a quarter positives"]]
    assert pairs == [4 * 1 * 3, 2 * 2 * 6]
    packed = [point["note"]["positions, candidates"] for point in families["sessions"]["pack_sessions"]]
    assert packed == [2 * (3 + 4 * 4), 3 + 8 * 4]


def test_step_takes_the_mean(monkeypatch):
    """Over a full binary trie's two levels, which have 2 and 4 children."""
    seen = []
    monkeypatch.setattr(scaling, "measure", lambda comparison, *_: seen.append(comparison))
    point = scaling.step("width", 9, Search(rx.TrieIndex.build([[0, 0], [0, 1], [1, 0], [1, 1]]), 2, 1, 9))
    assert point["note"] == {"children a step": 3}
    assert seen[0].steps == 2
    ours, trie = (run() for run in seen[0].methods.values())
    assert [state.scores.shape for state in ours] == [(1, 9), (1, 9)]
    torch.testing.assert_close(ours[0].scores, trie[0].scores)  # all tokens are children here


def test_uniform_is_drawn_in_blocks(monkeypatch):
    monkeypatch.setattr(scaling, "BLOCK", 4)
    sids = scaling.uniform(10, 50, 3)
    assert (sids.shape, sids.dtype) == ((10, 3), "uint16")
    assert len({tuple(sid) for sid in sids.tolist()}) == 10
    assert (sids < 50).all()


def test_the_build_floor_copies_everything(monkeypatch):
    monkeypatch.setattr(scaling, "BLOCK", 4)
    copied = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: copied.append((len(self), other.tolist())))
    sids = torch.arange(20, dtype=torch.int32).view(10, 2)
    next(iter(scaling.copying(sids).values()))()
    assert [size for size, _ in copied] == [4, 4, 2]
    assert [row for _, rows in copied for row in rows] == sids.tolist()


def test_table():
    times = {"median": 2e-3, "least": 1e-3, "most": 1.5, "cpu": 4e-3}
    point = {
        "family": "width",
        "panel": "step",
        "x": 1024,
        "methods": {"ours": times, "floor": times | {"median": 5e-4}},
        "floors": ["floor"],
        "note": {"children": 12345},
    }
    assert scaling_page.table("width", [point]) == [
        "| beam width W | ours | CPU, ours | floor: floor | ours / floor | children |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 1,024 | 2 (1-1500) | 4 | 0.5 (1-1500) | 4x | 12,345 |",
    ]


@pytest.mark.parametrize(
    ("place", "text"), [(1, "1"), (1024, "1024"), (10**4, "10k"), (152_064, "152k"), (10**6, "1M")]
)
def test_places(place, text):
    assert scaling_page._short(place) == text


def test_command(points, tmp_path, monkeypatch, capsys):
    """Points from workers into a file."""
    asked = []

    def worker(module, flag, family, *counts):
        assert (module, flag) == ("benchmarks.scaling", "--worker")
        asked.append((family, counts))
        return [point for point in points if point["family"] == family and (len(counts) > 1 or point["x"] == 30)]

    monkeypatch.setattr(report, "run_fresh", worker)
    monkeypatch.setattr("sys.argv", ["scaling", "--quick", "--out", str(tmp_path / "result.jsonl")])
    scaling.main()
    assert asked[:2] == [("items", ("10000",)), ("items", ("1000000",))]  # a process each
    tables = scaling_page.markdown(results.read(tmp_path / "result.jsonl")["benchmarks.scaling"]["results"])
    assert list(tables) == list(scaling.FAMILIES)
    out = capsys.readouterr().out
    assert all(line in out for lines in tables.values() for line in lines)


def test_page(points, tmp_path):
    """The repository's page with its tables anew and its prose as it was, and the figures that it shows."""
    result = report.environment("benchmarks.scaling") | {"results": points}
    page = Path(shutil.copy(DOCS / "scaling.md", tmp_path))
    scaling_page.write(result, tmp_path)
    text = page.read_text()
    for family, lines in scaling_page.markdown(points).items():
        (block,) = re.findall(f"begin scaling-{family} -->(.*?)<!-- end scaling-{family} ", text, re.DOTALL)
        assert "\n".join(lines) in block
        (figure,) = re.findall(r"\]\((.*?)\)", block)
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    assert result["commit"] in text
    old, new = (
        re.sub(r"(begin (\S+) -->).*?(<!-- end \2)", r"\1\3", page, flags=re.DOTALL)
        for page in ((DOCS / "scaling.md").read_text(), text)
    )
    assert old == new


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<!-- begin a -->",
        "<!-- end a --> <!-- begin a -->",
        "<!-- begin a --> <!-- begin b --> <!-- end a --> <!-- end b -->",
        "<!-- begin a --><!-- end a --><!-- begin a --><!-- end a --><!-- begin b --><!-- end b -->",
        "<!-- begin a --><!-- end a --><!-- begin b --><!-- end b --><!-- begin c --><!-- end c -->",
    ],
)
def test_page_without_its_markers(page):
    with pytest.raises(ValueError, match="marker"):
        fill(page, {"a": "1", "b": "2"})
