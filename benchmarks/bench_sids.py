"""Semantic IDs of a million embeddings of 768 numbers, two CPU threads::

    python -m benchmarks.bench_sids
    python -m benchmarks.bench_sids --quick    # 20,000 embeddings of 64 numbers

``sids build`` runs as its users run it, in a process of its own, from a file to a report; its peak memory counts the
pages of the mapped file that it has read. Then each part is timed on rows in memory: ``encode`` and ``assign_balanced``
beside the bare products of rows and codebooks, their floor, in turns, and ``resolve_collisions`` on all items, with
these codes and with uniform ones. The embeddings are clusters of clusters, of which k-means finds too few at the first
level: nearly all items collide.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.harness import report, results
from raddpo_ext._matmul import linear
from raddpo_ext.sids.embeddings import CHUNK

MODULE = "benchmarks.bench_sids"
THREADS, REPEATS = 2, 5
SIZES = (256, 256, 256)


def embeddings(rows: int, dim: int, path: Path) -> np.ndarray:
    """Three levels of normal clusters and noise, in a file."""
    rng = np.random.default_rng(0)
    centres = [scale * rng.standard_normal((256, dim), np.float32) for scale in (1.0, 0.5, 0.25)]
    x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dim))
    for begin in range(0, rows, CHUNK):
        part = x[begin : begin + CHUNK]
        part[:] = 0.1 * rng.standard_normal(part.shape, np.float32)
        for level in centres:
            part += level[rng.integers(256, size=len(part))]
    x.flush()
    return x


def build(path: Path, folder: Path) -> dict[str, Any]:
    """Time and peak memory of the command."""
    command = [sys.executable, "-m", "raddpo_ext", "sids", "build", path, "--sizes", *map(str, SIZES), "--out", folder]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(THREADS)})
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"sids build: exit code {process.returncode}")
    return {"build_s": time.perf_counter() - begin, "build_bytes": 1024 * used.ru_maxrss}


def products(x: Tensor, levels: tuple[Tensor, ...]) -> None:
    """What a row's distances to the codes cannot do without."""
    for book in levels:
        for part in x.split(CHUNK):
            linear(part, book)


def parts(x: Tensor, books: rx.sids.Codebooks) -> dict[str, float]:
    """Microseconds per row of each part, medians, the parts in turns."""
    capacity = -(-len(x) // len(books.levels[0]))
    runs = {
        "encode": lambda: rx.sids.encode(x, books),
        "products": lambda: products(x, books.levels),
        "assign_balanced": lambda: rx.sids.assign_balanced(x, books.levels[0], capacity),
        "product": lambda: products(x, books.levels[:1]),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e6 * (time.perf_counter() - begin) / len(x))
    return {name: round(median(found), 3) for name, found in times.items()}


def measure(rows: int, dim: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        x = embeddings(rows, dim, folder / "x.npy")
        found: dict[str, Any] = {"case": f"{rows} x {dim}", **build(folder / "x.npy", folder / "out")}
        known = json.loads((folder / "out/report.json").read_text())
        found |= {name: known[name] for name in ("collisions", "error", "entropy")}
        books = rx.sids.Codebooks.load(folder / "out/codebooks.safetensors")
        torch.set_num_threads(THREADS)
        found |= parts(torch.from_numpy(x[:200_000]), books)
        uniform = torch.from_numpy(np.random.default_rng(1).integers(SIZES, size=(rows, len(SIZES))))
        for name, sids in (("encoded", rx.sids.encode(x, books)), ("uniform", uniform)):
            begin = time.perf_counter()
            rx.sids.resolve_collisions(sids, x, books)
            found[f"resolve_{name}_s"] = round(time.perf_counter() - begin, 3)
            counts = sids.unique(dim=0, return_counts=True)[1]
            found[f"collide_{name}"] = 1 - int((counts == 1).sum()) / rows
        return found


def tables(measured: list[dict[str, Any]]) -> str:
    head = ["embeddings", "`sids build`", "peak"]
    head += [f"`resolve_collisions`, {name} codes (items that collide)" for name in ("these", "uniform")]
    head += ["us per row: `encode`", "its products", "`assign_balanced`", "its product"]
    body = [
        [
            row["case"],
            f"{row['build_s']:.0f} s",
            f"{row['build_bytes'] / 2**30:.1f} GiB",
            *(f"{row[f'resolve_{name}_s']:.2f} s ({row[f'collide_{name}']:.1%})" for name in ("encoded", "uniform")),
            *(f"{row[name]:.2f}" for name in ("encode", "products", "assign_balanced", "product")),
        ]
        for row in measured
    ]
    return report.markdown(head, body)


def main() -> None:
    parser = report.parser(MODULE, __doc__, processes=1)
    args = parser.parse_args()
    measured = [measure(*((20_000, 64) if args.quick else (1_000_000, 768)))]
    print(tables(measured))
    if args.out:
        results.write(args.out, {MODULE: report.environment(MODULE) | {"threads": THREADS, "results": measured}})


if __name__ == "__main__":
    main()
