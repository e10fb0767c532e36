"""A shop with string ids and titles, from its table to the page: the command line, real sockets and a browser."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("fastapi", reason="needs the service: pip install raddpo_ext[serve]")
pytest.importorskip("uvicorn")
from support.serve_process import serving
from support.tiny_models import qwen3, seeded

import raddpo_ext as rx
from raddpo_ext.__main__ import main

pytestmark = pytest.mark.slow

#: Ids and titles as shops have them; none of them may be read as a number, as HTML or as two.
SHOP = {
    "007": "Golden gun",
    "B00005ML71": '<b>Hat</b> & "cap"',
    "shoe, red 42": "Schuh\u00a0größe 42",
    'q"uote': "",
    "7e1f0c1e-5a9d-4a52-8f0a-0d5e3c6b9a11": "帽子",
    **{f"SKU-{number}": f"Thing {number}" for number in range(20)},
}
WIDTH = 6


def table(path: Path, shop: dict[str, str], shift: int) -> Path:
    def field(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    rows = [
        f"{field(name)},{field(title)},<a_{(row + shift) % 8}><b_{row // 8}><c_{(5 * row + shift) % 8}>\n"
        for row, (name, title) in enumerate(shop.items())
    ]
    path.write_text("sku,title,sid\n" + "".join(rows), encoding="utf-8")
    return path


def build(folder: Path, name: str, shop: dict[str, str], shift: int) -> Path:
    """By the command line."""
    source, index = table(folder / f"{name}.csv", shop, shift), folder / f"{name}.trie"
    assert main(["index", "build", str(source), "-o", str(index), "--offset", "3", "--sizes", "8,8,8"]) == 0
    return index


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A running service of the table's index, and what to compare it with."""
    folder = tmp_path_factory.mktemp("names")
    model = seeded(qwen3)
    model.save_pretrained(folder / "model")
    index = build(folder, "shop", SHOP, 0)
    with serving(folder / "model", folder / "store", "--index", index, "--beam-width", str(WIDTH)) as url:
        yield SimpleNamespace(url=url, folder=folder, index=index, model=model)


def ask(url: str, path: str = "/retrieve", **body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(url + path, json.dumps(body).encode() if body else None)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expected(shop: SimpleNamespace, file: Path, history: list[str], top_k: int) -> dict[str, Any]:
    """By the retriever, with the map at its two ends."""
    index, names = rx.TrieIndex.load(file), rx.IdMap.load(file)
    assert names is not None
    prompts = torch.tensor(rx.history_prompts(index, [names.items_of(history)], bos_token_id=1))
    found = rx.SIDRetriever(shop.model, index, beam_width=WIDTH).retrieve(prompts, top_k=top_k)
    items = found.items[0]
    return {"items": names.ids_of(items), "titles": names.titles_of(items), "sids": found.sids[0].tolist()}


HISTORIES = [["007"], ["B00005ML71", 'q"uote'], ["shoe, red 42", "SKU-3", "7e1f0c1e-5a9d-4a52-8f0a-0d5e3c6b9a11"]]


@pytest.mark.parametrize("history", HISTORIES)
def test_strings_in_strings_and_titles_out(shop: SimpleNamespace, history: list[str]) -> None:
    status, answer = ask(shop.url, history=history, top_k=5)
    assert (status, answer["catalogue_version"]) == (200, 1)
    wanted = expected(shop, shop.index, history, 5)
    assert {name: answer[name] for name in wanted} == wanted
    assert answer["titles"] == [SHOP[item] for item in answer["items"]]
    assert [len(answer["scores"]), len(set(answer["items"]))] == [5, 5]


def test_a_filter_of_strings(shop: SimpleNamespace) -> None:
    allowed = ["SKU-3", "007", "shoe, red 42", "no such item"]
    status, answer = ask(shop.url, history=["SKU-1"], allowed_items=allowed, top_k=5)
    assert status == 200
    assert set(answer["items"]) == set(allowed[:3])
    assert answer["titles"] == [SHOP[item] for item in answer["items"]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"history": ["7"]}, "history[0] must be an item of the catalogue, got '7'"),
        ({"history": ["007", 7]}, "history[1] must be an item of the catalogue, got 7"),
        ({"history": [0]}, "history[0] must be an item of the catalogue, got 0"),
        (
            {"history": ["SKU-1"], "allowed_items": [0]},
            "allowed_items must hold strings, which this catalogue's item ids are",
        ),
        (
            {"history": [None]},
            "history[0] is wrong: Input should be a string or an integer from 0 to 9223372036854775807",
        ),
    ],
)
def test_what_is_no_id_is_refused(shop: SimpleNamespace, body: dict[str, Any], message: str) -> None:
    status, answer = ask(shop.url, top_k=3, **body)
    assert (status, answer["error"]["code"]) == (422, "bad_field")
    assert answer["error"]["message"].startswith(message)


def test_the_example_is_of_strings(shop: SimpleNamespace) -> None:
    status, example = ask(shop.url, "/example")
    assert (status, example["ids"]) == (200, "strings")
    assert example["titles"] == [SHOP[item] for item in example["history"]]
    assert ask(shop.url, history=example["history"], top_k=1)[1]["items"]


def test_find_tells_the_sid_of_an_answer(shop: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """``index find`` and ``index lookup`` on the file speak of items as the service does."""
    answer = ask(shop.url, history=["SKU-2"], top_k=WIDTH)[1]
    for item, sid in zip(answer["items"], answer["sids"], strict=True):
        assert main(["index", "find", str(shop.index), item]) == 0
        written = capsys.readouterr().out.strip()
        assert written == ",".join(map(str, sid))
        assert main(["index", "lookup", str(shop.index), written]) == 0
        assert capsys.readouterr().out.splitlines() == [item]
    for item in ("7", "0", "sku-2", ""):
        assert main(["index", "find", str(shop.index), item]) == 1
        assert (
            capsys.readouterr().err == " ".join(f"raddpo_ext: {shop.index}: no item has the id {item}".split()) + "\n"
        )


@pytest.fixture
def page(browser: Any, shop: SimpleNamespace) -> Iterator[Any]:
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(shop.url)
    yield page
    page.close()
    assert problems == []


def test_the_page_shows_titles_as_text(page: Any, shop: SimpleNamespace) -> None:
    """Also where a title or an id has what HTML or the page's own list would read otherwise."""
    page.wait_for_selector("#example:visible")
    example = ask(shop.url, "/example")[1]
    assert page.inner_text("#example").endswith(", ".join(filter(None, example["titles"])) + ".")
    for history in HISTORIES:
        page.fill("#history", ", ".join(map(json.dumps, history)))
        page.fill("#top_k", str(WIDTH))
        page.click("#send")
        page.wait_for_selector("#send:enabled")
        assert page.is_hidden("#error"), page.inner_text("#error")
        answer = ask(shop.url, history=history, top_k=WIDTH)[1]
        said = page.evaluate("() => [...document.querySelectorAll('#items .item')].map((cell) => cell.textContent)")
        assert said == [
            f"{item} {title}".rstrip() for item, title in zip(answer["items"], answer["titles"], strict=True)
        ]
    assert page.locator("#items b").count() == 0


def test_a_new_table_goes_live_with_its_ids(shop: SimpleNamespace) -> None:
    """The last one: other ids and titles at the same integers."""
    renamed = {f"new {name}": f"new {title}" for name, title in SHOP.items()}
    index = build(shop.folder, "renamed", renamed, 1)
    assert main(["index", "publish", str(index), "--store", str(shop.folder / "store")]) == 0
    end = time.monotonic() + 60
    while ask(shop.url, input_ids=[4], top_k=1)[1]["catalogue_version"] == 1:
        assert time.monotonic() < end
        time.sleep(0.05)
    status, answer = ask(shop.url, history=["new 007"], top_k=5)
    assert (status, answer["catalogue_version"]) == (200, 2)
    wanted = expected(shop, index, ["new 007"], 5)
    assert {name: answer[name] for name in wanted} == wanted
    assert ask(shop.url, history=["007"], top_k=1)[0] == 422
