"""IdMap.load on any file beside a sound index; under an odd first byte the rest is the body of a sound head."""

from __future__ import annotations

import hashlib
import json

import raddpo_ext as rx
from fuzz.scratch import FOLDER, names
from raddpo_ext.index.id_map import _FORMAT, _stamp
from raddpo_ext.index.trie_file import map_path

INDEX = FOLDER / "named.trie"
rx.TrieIndex.build([[1, 2], [1, 2], [0, 7]], item_ids=[0, 1, 2]).save(INDEX)


def sound(body: bytes) -> bytes:
    """The file of a body, with its checksum and as the index's own."""
    head = {"format": _FORMAT, "index": _stamp(INDEX), "sha256": hashlib.sha256(body).hexdigest()}
    return json.dumps(head).encode() + b"\n" + body


def run(data: bytes) -> ValueError | None:
    """The error, where it is refused."""
    content = data[1:]
    map_path(INDEX).write_bytes(sound(content) if data[:1] and data[0] % 2 else content)
    try:
        found = rx.IdMap.load(INDEX)
    except ValueError as error:
        names(error, map_path(INDEX))
        return error
    assert found is not None
    items = found.items.tolist()
    assert len(set(items)) == len(items)
    ids = found.ids_of(items)
    assert found.items_of(ids) == items
    assert all(isinstance(title, str) for title in found.titles_of(items))
    assert ids == items if found.ids is None else all(isinstance(name, str) for name in ids)
    return None
