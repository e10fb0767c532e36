"""``python -m raddpo_ext sids build``: from a file of embeddings to a catalogue's SIDs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raddpo_ext import _check
from raddpo_ext._files import replacing
from raddpo_ext.index.writers import LAYOUTS, write_sids
from raddpo_ext.sids.report import draw, measure, text
from raddpo_ext.sids.residual_kmeans import encode, fit_residual_kmeans
from raddpo_ext.sids.resolve_collisions import MODES, resolve_collisions


def build(options: argparse.Namespace, bar: Callable[[float], None] | None) -> int:
    """Run the command, with ``bar`` to show the share of the work that is done."""
    _check.choice(options.collisions, "--collisions", MODES)
    _check.choice(options.layout, "--layout", tuple(LAYOUTS))
    x, items, categories = _read(options)
    sizes: Sequence[int] = options.sizes
    forced = names = labels = None
    if categories is not None:
        names, codes = np.unique(categories, return_inverse=True)
        labels = torch.from_numpy(codes)
    if options.force_category:
        if names is None or labels is None:
            raise ValueError("--force-category needs --category COLUMN")
        sizes = [len(names), *sizes]
        forced = torch.full((len(x), len(sizes)), -1)
        forced[:, 0] = labels
    options.out.mkdir(exist_ok=True)
    books = fit_residual_kmeans(x, sizes, seed=options.seed, forced=forced, progress=bar)
    encoded = encode(x, books, forced)
    resolved = resolve_collisions(encoded, x, books, options.collisions)
    report = measure(encoded, resolved, x, books, labels)
    if bar is not None:
        print(file=sys.stderr)
    write_sids(options.out / "index.json", resolved.sids, lengths=resolved.lengths, items=items, layout=options.layout)
    books.save(options.out / "codebooks.safetensors")
    described = asdict(report) | ({} if names is None or forced is None else {"categories": names.tolist()})
    with replacing(options.out / "report.json") as file:
        file.write(json.dumps(described).encode())
    print(text(report))
    try:
        draw(report, options.out / "report.png")
    except ImportError as error:
        print(f"raddpo_ext: {error}", file=sys.stderr)
    return 0


def _read(options: argparse.Namespace) -> tuple[Any, list[int | str] | None, np.ndarray | None]:
    """The embeddings, item ids and categories of the file."""
    path: Path = options.embeddings
    if path.suffix == ".npy":
        if options.item or options.category:
            raise ValueError(f"{path}: --item and --category name columns of a .parquet file")
        with open(path, "rb"):
            pass  # an OSError names the file
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False), None, None
        except ValueError as error:
            raise ValueError(f"{path}: not a numpy file of plain numbers, or damaged: {error}") from None
    if path.suffix != ".parquet":
        raise ValueError(f"{path}: expected a .npy or .parquet file")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: needs pyarrow: pip install pyarrow ({error})") from None
    wanted = [name for name in (options.embedding, options.item, options.category) if name]
    try:
        with open(path, "rb") as source:
            file = pyarrow.parquet.ParquetFile(source)
            for name in wanted:
                if name not in file.schema_arrow.names:
                    raise ValueError(f"has no column {name!r}, only {', '.join(file.schema_arrow.names)}")
            table = file.read(columns=wanted)
    except (ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: {error}") from None
    for name in wanted:
        if table[name].null_count:
            raise ValueError(f"{path}: column {name!r} has {table[name].null_count} empty rows")
    column = table[options.embedding].combine_chunks()
    if not pyarrow.types.is_list(column.type) and not pyarrow.types.is_fixed_size_list(column.type):
        raise ValueError(f"{path}: column {options.embedding!r} must hold lists of numbers, got {column.type}")
    values = column.flatten().to_numpy(zero_copy_only=False)
    if not len(column) or len(values) % len(column) or len({*column.value_lengths().to_pylist()}) > 1:
        raise ValueError(f"{path}: column {options.embedding!r} must hold lists of one length")
    items = None if options.item is None else table[options.item].to_pylist()
    categories = (
        None if options.category is None else np.array([str(name) for name in table[options.category].to_pylist()])
    )
    return values.reshape(len(column), -1), items, categories
