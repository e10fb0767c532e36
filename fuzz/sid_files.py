"""read_sids on any bytes; the first byte says of which kind of file. What is read can be indexed, or is refused."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

import raddpo_ext as rx
from fuzz.scratch import FOLDER, names
from raddpo_ext.index.readers import read_sids

MEMBERS = ("sids", "lengths", "item_ids")
SEPARATOR = b"|/|"  # between the members of an archive


def run(data: bytes) -> None:
    kind, content = (data[0] % 4 if data else 0), data[1:]
    path = FOLDER / ("x.json", "x.npy", "x.npz", "x.npz")[kind]
    path.unlink(missing_ok=True)  # a memory map of the last one may be alive
    path.write_bytes(_archive(content) if kind == 3 else content)
    if kind == 0:
        _vocab(path)
    try:
        table = read_sids(path)
    except ValueError as error:
        return names(error, path)
    rows, columns = table.sids.shape
    ends = np.full(rows, columns) if table.lengths is None else table.lengths
    assert rows
    assert ends.shape == (rows,)
    assert ((ends >= 1) & (ends <= columns)).all()
    assert table.item_ids is None or table.item_ids.shape == (rows,)
    for level, size in enumerate(table.sizes):
        column = table.sids[ends > level, level]
        assert (column >= 0).all()
        assert size == int(column.max(initial=0)) + 1
    try:
        index = rx.TrieIndex.build(table.sids, lengths=table.lengths, item_ids=table.item_ids)
    except ValueError:  # such as one SID that is a prefix of another
        return
    assert index.contains(table.sids, torch.from_numpy(ends)).all()


def _archive(content: bytes) -> bytes:
    """A sound .npz of unsound members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, member in zip(MEMBERS, content.split(SEPARATOR), strict=False):
            if member:
                archive.writestr(f"{name}.npy", member)
    return out.getvalue()


def _vocab(path: Path) -> None:
    try:
        vocab = rx.SIDVocab.from_tokenizer(_Tokenizer(), path)
    except ValueError:
        return
    assert vocab.max_token < 10**6


class _Tokenizer:
    unk_token_id = None

    def convert_tokens_to_ids(self, token: str) -> int:
        return zlib.crc32(token.encode(errors="surrogatepass")) % 10**6
