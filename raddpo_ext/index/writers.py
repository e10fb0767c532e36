"""Write a catalogue's semantic IDs (SIDs) in the layouts that :func:`raddpo_ext.read_sids` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raddpo_ext import _check
from raddpo_ext._files import replacing
from raddpo_ext.index.sid_text import LARGEST_CODE

LAYOUTS = {"lc_rec": "<{}_{}>", "onerec": "<s_{}_{}>"}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_sids(
    path: str | os.PathLike[str],
    sids: Any,
    *,
    lengths: Any = None,
    items: Sequence[int | str] | None = None,
    layout: str = "lc_rec",
) -> None:
    """Write the SIDs of a catalogue. The suffix tells the format; the file replaces ``path`` atomically.

    - ``.json``: an ``index.json``, ``{"7": ["<a_12>", "<b_3>", ...], ...}``, with tokens ``<a_12>`` as LC-Rec, LETTER
      and MiniOneRec have them, or ``<s_a_12>`` as OneRec has them (``layout="onerec"``). At most 26 levels.
    - ``.npz``: the arrays ``sids``, ``lengths`` and ``item_ids``. Item ids are integers there.

    Args:
        path: the file.
        sids: integer codes ``[N, L]``, at least one row.
        lengths: integer ``[N]`` in ``[1, L]``; default: all ``L``.
        items: the item ids, one per row, all different. Default: the row numbers.
        layout: ``"lc_rec"`` or ``"onerec"``, for ``.json``.

    Raises:
        ValueError, TypeError: naming the argument and the value.
        OSError: the file cannot be written.

    Example:
        >>> rx.write_sids("index.json", [[0, 2], [1, 0]], items=[7, 9])
        >>> print(open("index.json").read())
        {"7": ["<a_0>", "<b_2>"], "9": ["<a_1>", "<b_0>"]}
        >>> rx.read_sids("index.json").item_ids
        array([7, 9])
    """
    path = Path(path)
    tensor = _check.integer_tensor(sids, "sids", 2)
    rows, levels = tensor.shape
    if not tensor.numel():
        raise ValueError(f"sids must have at least one row and level, got shape {(rows, levels)}")
    ends = None if lengths is None else _check.lengths(lengths, rows, 1, levels)
    codes = tensor.numpy()
    inside = np.ones_like(codes, bool) if ends is None else np.arange(levels) < ends.numpy()[:, None]
    outside = inside & ((codes < 0) | (codes > LARGEST_CODE))
    if outside.any():
        row, level = np.argwhere(outside)[0]
        raise ValueError(f"sids[{row}, {level}] must be from 0 to {LARGEST_CODE}, got {codes[row, level]}")
    names = range(rows) if items is None else list(items)
    if len(names) != rows or len({str(name) for name in names}) != rows:
        raise ValueError(f"items must have one id per row of sids ({rows}), all different")
    _check.choice(layout, "layout", tuple(LAYOUTS))
    if path.suffix == ".json":
        if levels > len(_LETTERS):
            raise ValueError(f"sids must have at most {len(_LETTERS)} levels in a .json file, got {levels}")
        form = LAYOUTS[layout]
        written = {
            str(name): [form.format(_LETTERS[level], code) for level, code in enumerate(row[kept].tolist())]
            for name, row, kept in zip(names, codes, inside, strict=True)
        }
        with replacing(path) as file:
            file.write(json.dumps(written).encode())
    elif path.suffix == ".npz":
        arrays = {"sids": np.where(inside, codes, -1)} | ({} if ends is None else {"lengths": ends.numpy()})
        if items is not None:
            arrays["item_ids"] = _check.integer_array(names, "items", 1)
        with replacing(path) as file:
            np.savez(file, **arrays)
    else:
        raise ValueError(f"{path}: expected a .json or .npz file")
