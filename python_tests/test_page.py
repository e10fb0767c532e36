"""The service's page in headless Chromium: what it shows is what the service answers."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("fastapi", reason="needs the service: pip install raddpo_ext[serve]")
from support.serve_process import serving
from support.tiny_models import qwen3, seeded

import raddpo_ext as rx

pytestmark = pytest.mark.slow

LARGE = 2**53 + 1  # an item id that no JavaScript number holds


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running service: 60 items, one SID shared by two, searched with 6 beams."""
    folder = tmp_path_factory.mktemp("page")
    seeded(qwen3).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    sids = torch.randint(0, 8, (60, 3), generator=generator)
    sids[1] = sids[0]
    ids = [*range(100, 159), LARGE]
    index = rx.TrieIndex.build(sids, item_ids=ids, vocab=rx.SIDVocab([8, 8, 8], offset=3))
    rx.CatalogueStore(folder / "store").publish(index)
    with serving(folder / "model", folder / "store", "--beam-width", "6") as url:
        yield url


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(url) else problems.append(request.url))
    page.goto(url)
    yield page
    page.close()
    assert problems == []  # no error of the script, nothing from elsewhere


def retrieve(url: str, **body: Any) -> Any:
    request = urllib.request.Request(f"{url}/retrieve", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def find(page: Any, history: str, top_k: int = 5) -> None:
    page.fill("#history", history)
    page.fill("#top_k", str(top_k))
    page.click("#send")
    page.wait_for_selector("#send:enabled")


def beams(page: Any) -> list[list[Any]]:
    """Of each column, each beam's classes and its texts."""
    return page.evaluate(
        """() => [...document.querySelectorAll("#tree ol")].map((list) => [...list.children].map((beam) =>
             ({dead: beam.classList.contains("dead"), texts: [...beam.querySelectorAll("span")].map((span) =>
               span.textContent), struck: getComputedStyle(beam.querySelector(".prefix")).textDecorationLine})))"""
    )


def test_items_and_dead_beams(page: Any, url: str) -> None:
    find(page, "100, 107 131")
    answer = retrieve(url, history=[100, 107, 131], top_k=5, trace=True)
    assert page.locator("#items .item").all_inner_texts() == [str(item) for item in answer["items"]]
    assert page.locator("#items .score").all_inner_texts() == [f"{score:.4f}" for score in answer["scores"]]
    shown = beams(page)
    assert [len(column) for column in shown] == [len(column) for column in answer["beams"]] == [6, 6, 6]
    for column, said in zip(shown, answer["beams"], strict=True):
        assert [beam["texts"][0] for beam in column] == [" ".join(map(str, beam["prefix"])) for beam in said]
        assert [beam["texts"][-1] for beam in column] == [f"{beam['score']:.3f}" for beam in said]
        dead = [not beam["alive"] for beam in said]
        assert [beam["dead"] for beam in column] == dead
        assert ["dead" in beam["texts"] for beam in column] == dead  # in words
        assert [beam["struck"] == "line-through" for beam in column] == dead  # and not by colour alone
    assert any(beam["dead"] for column in shown for beam in column)
    items = {word for beam in shown[-1] for text in beam["texts"] if "item" in text for word in text[5:].split(", ")}
    assert items == {str(item) for item in answer["items"]}


def test_lines_join_beams_to_their_parents(page: Any, url: str) -> None:
    find(page, "100, 107 131")
    answer = retrieve(url, history=[100, 107, 131], trace=True, top_k=5)
    drawn = page.evaluate(
        """() => [...document.querySelectorAll("#tree svg")].map((svg) =>
             [...svg.querySelectorAll("path")].map((path) =>
               path.getAttribute("d").match(/^M0 (\\d+) .* 56 (\\d+)$/).slice(1).map((y) => (y - 13) / 30)))"""
    )
    assert drawn == [[[beam["parent"], slot] for slot, beam in enumerate(said)] for said in answer["beams"][1:]]
    page.click("#items tr:nth-child(2) button")
    chosen = page.locator("#tree .beam.on .prefix").all_inner_texts()
    sid = [str(code) for code in answer["sids"][1]]
    assert chosen == [" ".join(sid[: level + 1]) for level in range(3)]


def test_token_ids_and_large_ids(page: Any, url: str) -> None:
    page.check("input[value=input_ids]")
    find(page, "4 12 20", top_k=6)
    expected = retrieve(url, input_ids=[4, 12, 20], top_k=6)["items"]
    assert page.locator("#items .item").all_inner_texts() == [str(item) for item in expected]
    prompt = next(token for token in range(3, 27) if LARGE in retrieve(url, input_ids=[token], top_k=6)["items"])
    find(page, str(prompt), top_k=6)
    assert str(LARGE) in page.locator("#items .item").all_inner_texts()
    page.check("input[value=history]")
    find(page, str(LARGE), top_k=6)
    expected = retrieve(url, history=[LARGE], top_k=6)["items"]
    assert page.locator("#items .item").all_inner_texts() == [str(item) for item in expected]


def test_errors_in_words(page: Any, url: str) -> None:
    for history, words in (
        ("7 x", "The history holds “x”, which is not a whole number."),
        (" ", "The history is empty: type at least one id."),
        ("7", "The service refused: history[0] must be an item of the catalogue, got 7."),
    ):
        find(page, history)
        assert page.inner_text("#error") == words
        assert page.is_hidden("#found")
    find(page, "100", top_k=7)
    assert page.inner_text("#error") == "The service refused: top_k must be at most 6, the beam width, got 7."
    page.route("**/retrieve", lambda route: route.abort())
    find(page, "100")
    assert page.inner_text("#error") == "The service could not be reached. Is it still running?"
    page.unroute("**/retrieve")
    find(page, "100")
    assert page.is_hidden("#error")
    assert page.locator("#items tr").count() == 5


def test_begins_with_an_example_that_gives_items(page: Any, url: str) -> None:
    page.wait_for_selector("#example:visible")
    with urllib.request.urlopen(f"{url}/example") as response:
        example = json.load(response)
    assert page.input_value("#history") == ", ".join(map(str, example["history"]))
    page.fill("#top_k", "6")
    page.click("#send")
    page.wait_for_selector("#send:enabled")
    assert page.is_hidden("#error")
    assert page.locator("#items tr").count() == 6  # the beam has no more
    assert page.locator("#items .item").all_inner_texts() == [
        str(item) for item in retrieve(url, history=example["history"], top_k=6)["items"]
    ]
