"""load_catalogue on a folder of any files, their contents separated by two zero bytes; the first byte says which."""

from __future__ import annotations

import raddpo_ext.data.catalogue as catalogue
from fuzz.scratch import FOLDER, names

FILES = ("x.index.json", "x.item.json", "x.inter.json", "valid.csv", "test.csv", "train.csv")
SEPARATOR = b"\0\0"


def run(data: bytes) -> None:
    folder = FOLDER / "catalogue"
    folder.mkdir(exist_ok=True)
    choice, parts = (data[0] if data else 0), iter(data[1:].split(SEPARATOR))
    for bit, name in enumerate(FILES):
        (folder / name).unlink(missing_ok=True)
        if choice >> bit & 1:
            (folder / name).write_bytes(next(parts, b""))
    try:
        found = catalogue.load_catalogue(folder)
    except ValueError as error:
        return names(error, folder)
    items = range(len(found.sids))
    assert len(found.titles) == len(items)
    assert found.train
    assert found.test
    for case in found.valid + found.test:
        assert case.history
        assert {case.item, *case.history} <= {*items}
    assert all(item in items for history in found.train for item in history)
