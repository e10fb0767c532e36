"""The demo's search shop: a whole run on little data, its report, and the service on what it saves."""

from __future__ import annotations

import json
import re
import urllib.request
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch

import raddpo_ext as rx

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
from support.serve_process import serving

from demo.__main__ import main
from demo.search import report, run
from demo.search.align import write_log
from demo.search.data import Tokens, sessions_of
from demo.search.report import Ranking, ranking
from demo.search.shop import SearchShop

SMALL = ["--clicks", "600", "--sessions", "200", "--cases", "60", "--epochs", "1"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shop() -> SearchShop:
    return SearchShop.make(0)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, str, Path]:
    """A run on too little data to learn from: exit code, output, errors, and the folder it was run in."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(run, "REAL_VOCABULARY", 2000)
        patch.setattr(run, "TIMED", 2)
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            code = main(SMALL)
    return code, out.getvalue(), err.getvalue(), folder


def test_a_run(ended: tuple[int, str, str, Path]) -> None:
    code, out, err, folder = ended
    assert (code, err) == (1, "demo: the interval of RAD-DPO's gain holds 0\n")  # and no bar, and no warning
    assert "its old ranker showed 800 pages of 12" in out
    assert "60 new queries" in out
    for name in ("old ranker", "SFT", "S-DPO", "RAD-DPO"):
        (line,) = (line for line in out.splitlines() if re.match(rf"{name} +0\.", line))
        assert line.endswith("%") == (name != "old ranker")
        assert line.count("[") == (2 if name.endswith("DPO") else 0)
    assert out.count(", typed by a shopper who likes ") == 3
    assert "times as long" in out
    names = {"model", "result.png", "sessions.jsonl", "shop.index", "shop.index.idmap"}
    assert {path.name for path in (folder / ".demo" / "search").iterdir()} == names
    assert (folder / ".demo/search/result.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_service_answers_on_it(ended: tuple[int, str, str, Path]) -> None:
    """With the command and the question that the demo prints."""
    pytest.importorskip("fastapi")
    *_, out, _, folder = ended
    assert "serve --model .demo/search/model --index .demo/search/shop.index" in out
    question = json.loads(re.search(r"/retrieve -d '(.*)'", out)[1])
    there = folder / ".demo" / "search"
    with serving(there / "model", there / "catalogue", "--index", there / "shop.index") as address:
        request = urllib.request.Request(f"{address}/retrieve", json.dumps(question).encode())
        answer = json.load(urllib.request.urlopen(request, timeout=60))
    titles = SearchShop.make(0).titles()
    assert len(answer["items"]) == 10
    assert answer["titles"] == [titles[item] for item in answer["items"]]


def test_full_is_three_times_as_much(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    class Stopped(Exception):
        pass

    def drawn(self: SearchShop, count: int, rng: object) -> None:
        raise Stopped(count)

    monkeypatch.setattr(SearchShop, "log", drawn)
    for arguments, count in (([], 20_000), (["--full"], 60_000), (["--full", "--clicks", "7"], 7)):
        with pytest.raises(Stopped, match=f"^{count}$"):
            main(arguments)


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_bad_numbers(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--clicks", value])
    assert f"expected a positive integer, got '{value}'" in capsys.readouterr().err


def test_the_session_log_is_the_sessions(shop: SearchShop, tmp_path: Path) -> None:
    tokens = Tokens.of(shop)
    sessions = sessions_of(shop.log(30, np.random.default_rng(0)), np.random.default_rng(1), 3, 8)
    rows = write_log(sessions, tokens, tmp_path / "log.jsonl")
    assert rows["prompt_ids"][:] == tokens.prompts(sessions.queries)
    for name in ("positives", "negatives"):
        for items, sids in zip(getattr(sessions, name).tolist(), rows[name], strict=True):
            assert sids == [tokens.of_item[item].tolist() for item in items if item >= 0]


def test_a_ranking_is_measured_by_the_truth(shop: SearchShop) -> None:
    queries = shop.queries(50, np.random.default_rng(0))
    truth = shop.order_probability(queries)
    best = np.argsort(-truth, 1, kind="stable")[:, :12]
    found = ranking(best, truth)
    np.testing.assert_allclose(found.ndcg, 1)
    np.testing.assert_allclose(found.truth, -np.sort(-truth, 1)[:, :10])
    best[:, 0] = -1
    assert (ranking(best, truth).truth[:, 0] == 0).all()


def test_the_table_shows_the_changes() -> None:
    def made(ndcg: float, orders: float, invalid: float | None) -> Ranking:
        return Ranking(np.zeros((40, 10)), np.full((40, 10), orders / 10), np.full(40, ndcg), invalid)

    found = {"old ranker": made(0.4, 1.0, None), "SFT": made(0.5, 1.2, 0.01), "RAD-DPO": made(0.625, 1.5, 0.02)}
    head, old, base, aligned = report.table(found, "SFT")
    assert old.split() == ["old", "ranker", "0.4000", "1.0000"]
    assert base.split() == ["SFT", "0.5000", "1.2000", "1.00%"]
    assert aligned.split()[1:5] == ["0.6250", "+0.1250", "[+0.1250,", "+0.1250]"]
    assert aligned.split()[5:] == ["1.5000", "+0.3000", "[+0.3000,", "+0.3000]", "2.00%"]
    assert head.index("NDCG@10") + len("NDCG@10") == aligned.index("0.6250") + len("0.6250")


def test_an_example_reads_as_the_query(shop: SearchShop) -> None:
    queries = shop.queries(60, np.random.default_rng(0))
    rows = report.kinds(queries)
    words = [(queries.style[row] >= 0) + 0 + (queries.colour[row] >= 0) for row in rows]
    assert words == [2, 1, 0]
    truth = shop.order_probability(queries)[rows[0]]
    first, second, *lines = report.example(
        shop, queries.rows(slice(rows[0], rows[0] + 1)), truth, {"before": [3, -1, 5], "after": [7, 8, 9]}
    )
    assert first.startswith(f'  "{shop.words(queries.rows(slice(rows[0], rows[0] + 1)))}", typed by')
    assert second.split() == ["before", "after"]
    assert len(lines) == 3
    assert shop.titles()[3] in lines[0]
    assert f"{truth[7]:.0%}" in lines[0]


def test_the_index_is_that_of_the_titles(ended: tuple[int, str, str, Path], shop: SearchShop) -> None:
    index = rx.TrieIndex.load(ended[3] / ".demo/search/shop.index")
    assert index.num_items == len(shop.worth)
    names = rx.IdMap.load(ended[3] / ".demo/search/shop.index")
    assert names.titles_of([*range(5)]) == shop.titles()[:5]
