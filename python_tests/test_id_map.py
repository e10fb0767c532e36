"""IdMap: strings to integers and back, and a file that is the index's own or refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import raddpo_ext as rx

IDS = ["B00005ML71", "007", "\u00dc 3"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rx.TrieIndex.build([[1, 2], [1, 2], [0, 7]]).save(tmp_path / "shop.trie")
    return tmp_path / "shop.trie"


def test_there_and_back(path: Path) -> None:
    rx.IdMap(IDS, ["Hat", "", "Cap"]).save(path)
    found = rx.IdMap.load(path)
    assert found is not None
    assert found.items_of(["007", "B00005ML71", "007"]) == [1, 0, 1]
    assert found.ids_of(torch.tensor([[2, 0], [1, -1]])) == [["\u00dc 3", "B00005ML71"], ["007", None]]
    assert found.titles_of([2, 1]) == ["Cap", ""]
    assert found.ids_of(2) == "\u00dc 3"
    for wanted in ("7", 7, 0, None, [], 0.0):
        with pytest.raises(ValueError, match=r"history\[1\] = .* is no item of the index"):
            found.items_of(["007", wanted], "history")
    with pytest.raises(ValueError, match="items hold 3, which is not in the map"):
        found.ids_of([3])


def test_titles_alone(path: Path) -> None:
    last = 2**63 - 1
    rx.TrieIndex.build([[1], [2]], item_ids=[last, 4]).save(path)
    rx.IdMap(titles=["Hat", "Cap"], items=[last, 4]).save(path)
    found = rx.IdMap.load(path)
    assert found is not None
    assert (found.ids, found.ids_of([4, last]), found.titles_of([4, last])) == (None, [4, last], ["Cap", "Hat"])
    assert found.items_of([last]) == [last]
    for wanted in (5, "4", True):
        with pytest.raises(ValueError, match=r"ids\[0\] = .* is no item"):
            found.items_of([wanted])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "ids or titles must be given"),
        ({"ids": ["a", "a"]}, "ids must be distinct, got 'a' twice"),
        ({"ids": "abc"}, "ids must be a list, got 'abc'"),
        ({"ids": {"a": "b"}}, "ids must be a list, got {'a': 'b'}"),
        ({"titles": {"Hat"}}, "titles must be a list, got {'Hat'}"),
        ({"ids": ["a", 7]}, "ids must hold strings, got 7"),
        ({"ids": ["a"], "titles": ["x", "y"]}, "must have one entry per item"),
        ({"ids": ["a", "b"], "items": [1, 1]}, "items must be distinct, got 1 twice"),
        ({"ids": ["a"], "items": [-1]}, "items\\[0\\] = -1 is negative"),
        ({"ids": ["a"], "items": ["a"]}, "items must hold integers"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        rx.IdMap(**arguments)


def test_an_item_without_a_name_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"shop\.trie: the id map lacks the item 2"):
        rx.IdMap(IDS[:2]).save(path)
    assert rx.IdMap.load(path) is None


def test_damage_is_refused(path: Path) -> None:
    """Cut anywhere or with any byte changed, the map is refused by its name; so is a sound file of unsound content."""
    rx.IdMap(IDS).save(path)
    file = path.with_name("shop.trie.idmap")
    whole = file.read_bytes()
    damaged = [whole[:end] for end in range(len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in range(len(whole))]
    for content in (
        "[]",
        "{}",
        '{"ids": 7}',
        '{"ids": "abc"}',
        '{"ids": {"a": 1}}',
        '{"titles": ["Hat"], "items": [1e3]}',
        '{"ids": ["a", "a"]}',
        '{"ids": [1]}',
        '{"name": []}',
        "[" * 99_999,
    ):
        head = json.loads(whole.split(b"\n")[0]) | {"sha256": hashlib.sha256(content.encode()).hexdigest()}
        damaged.append(json.dumps(head).encode() + b"\n" + content.encode())
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"shop\.trie\.idmap: ") as error:
            rx.IdMap.load(path)
        assert "\n" not in str(error.value)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match="is not a regular file"):
        rx.IdMap.load(path)
