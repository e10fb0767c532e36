"""Very small folders in the layouts of the public catalogues."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ITEMS = 60


def row(item: int) -> int:
    """The row of an item."""
    return ITEMS - 1 - item


def write_letter(folder: Path) -> Path:
    """Users who buy items in the order of their numbers, which nobody's popularity tells."""
    folder.mkdir()
    _write_index(folder)
    rng = np.random.default_rng(0)
    users = {
        str(user): [int(item) for item in (rng.integers(ITEMS) + np.arange(rng.integers(6, 15))) % ITEMS]
        for user in range(300)
    }
    (folder / "Tiny.inter.json").write_text(json.dumps(users | {"short": [1, 2]}))
    return folder


def write_minionerec(folder: Path) -> Path:
    """Two users' validation cases; the test cases of one of them and of a third."""
    folder.mkdir()
    _write_index(folder)
    (folder / "Tiny.item.json").write_text('{"3": {"title": "Nuts &amp; bolts"}, "4": [], "x": {}}')
    head = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid\n"
    lines = ('A,"[\'a, b\']",c,"[3, 4]",5,s,s', "B,t,t,[9],8,s,s", 'A,t,t,"[3, 4, 5]",6,s,s')
    (folder / "valid.csv").write_text(head + "\n".join(lines) + "\n")
    (folder / "test.csv").write_text(head + 'C,t,t,"[7, 3]",1,s,s\nB,t,t,"[9, 8]",2,s,s\n')
    return folder


def _write_index(folder: Path) -> None:
    """``ITEMS`` items, numbered backwards in the file, of which the last shares the first one's SID."""
    codes = [divmod(item % (ITEMS - 1), 8) for item in range(ITEMS)]
    index = {str(item): [f"<a_{codes[item][0]}>", f"<b_{codes[item][1]}>"] for item in reversed(range(ITEMS))}
    (folder / "Tiny.index.json").write_text(json.dumps(index))


def write_walks(folder: Path) -> Path:
    """A catalogue of 60 items, two of them with one SID, and 50 users who walk through it."""
    rng = np.random.default_rng(0)
    names = [f"<{level}_{code}>" for level in "abc" for code in range(4)]
    codes = [divmod(item, 16) for item in range(60)]
    sids = [[names[a], names[4 + b // 4], names[8 + b % 4]] for a, b in codes]
    sids[59] = sids[58]
    (folder / "Toys.index.json").write_text(json.dumps({str(item): sid for item, sid in enumerate(sids)}))
    walks = rng.integers([0, 5], [60, 16], size=(50, 2)).tolist()
    users = {str(user): [(first + 7 * k) % 60 for k in range(count)] for user, (first, count) in enumerate(walks)}
    (folder / "Toys.inter.json").write_text(json.dumps(users))
    return folder
