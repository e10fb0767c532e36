"""Building, loading and searching the trie index on two CPU threads: speed and memory::

    python -m benchmarks.bench_trie
    python -m benchmarks.bench_trie --quick --cases 1M

Each catalogue is drawn once into a file, 1 % of its rows copies of others (SIDs that collide); fresh processes, one a
method and turn, then read it, note the memory they hold, and build. Extra memory is the peak of the first build, the
index itself included, above that note. The build's time is the median of its repeats, whole Python call, validation
included, input in memory; of several processes the median of their medians.

Peers build once a process, on one thread. Each is given its input as it wants it, untimed: ``static``
(``static_decoding``) distinct, sorted SIDs; ``numpy_sort``, no index, SIDs packed into words; ``marisa``
(``marisa_trie.BinaryTrie``: distinct keys, no items) the bytes that its keys are cut from while it builds, two a code,
and it finds keys in a Python loop, where ours finds a batch (``contains``) and then its items (``lookup``). A peer that
needs more memory than the machine has is stopped there.
"""

import argparse
import json
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import raddpo_ext as rx
from benchmarks.harness import report, results
from benchmarks.harness.report import markdown
from benchmarks.harness.timing import Cost, measured, middle, timed
from raddpo_ext.bench import catalogues
from raddpo_ext.bench.compare import Missing
from raddpo_ext.bench.trie import words_of

MODULE = "benchmarks.bench_trie"
THREADS = 2
MILLION = 1_000_000
COLLIDING = 0.01
LOOKUPS = 200_000
REPEATS = 3
SPARED = 2**30  # bytes of the free memory that no process takes


@dataclass(frozen=True)
class Case:
    kind: str  # "uniform" or "clustered"
    items: int
    codes: int
    levels: int
    dtype: str = "int32"

    @property
    def name(self) -> str:
        return f"{self.kind} {self.items // MILLION}M L{self.levels} V{self.codes}"


CASES = [
    Case(kind, items * MILLION, codes, levels)
    for items in (1, 10)
    for codes, levels in ((8192, 3), (2048, 8))
    for kind in ("uniform", "clustered")
]
CASES.append(Case("uniform", 100 * MILLION, 8192, 4, "uint16"))
# SIDs a second at least by number of levels; bytes an item at most.
LEAST_SPEED = {3: 12e6, 8: 6e6}
MOST_BYTES = {3: 12, 8: 24}
MOST_EXTRA_BYTES = 48


def draw(case: Case, path: Path) -> None:
    """Writes the catalogue's SIDs, in blocks of few columns' worth of memory."""
    sids = np.empty((case.items, case.levels), case.dtype)
    for begin in range(0, case.items, 10 * MILLION):
        size = min(10 * MILLION, case.items - begin)
        sids[begin : begin + size] = getattr(catalogues, case.kind)(size, case.codes, case.levels, seed=begin)
    rng = np.random.default_rng(1)
    copies = rng.integers(case.items, size=int(COLLIDING * case.items))
    sids[copies] = sids[rng.integers(case.items, size=len(copies))]
    np.save(path, sids)


def repeated(call: Callable[[], Any], repeats: int = REPEATS) -> Cost:
    """Medians."""
    return middle([timed(call) for _ in range(repeats)])


def ours(sids: np.ndarray) -> dict[str, Any]:
    torch.set_num_threads(THREADS)
    items = len(sids)
    first = measured(lambda: rx.TrieIndex.build(sids))
    peak, index = report.memory_status("VmHWM"), first.value
    repeats = REPEATS if items <= 10 * MILLION else 1
    build = repeated(lambda: rx.TrieIndex.build(sids), repeats)
    item_ids = np.random.default_rng(2).permutation(items)
    some = sids[np.random.default_rng(3).integers(items, size=LOOKUPS)]
    assert bool(index.contains(some).all())
    result = {
        "first_build_s": first.cost.wall,
        "build_s": build.wall,
        "build_cpu_s": build.cpu,
        "build_with_item_ids_s": repeated(lambda: rx.TrieIndex.build(sids, item_ids=item_ids), repeats).wall,
        "extra_bytes_per_item": first.peak_bytes / items,
        "peak_bytes": peak,
        "index_bytes_per_item": index.nbytes / items,
        "nodes": index.num_nodes,
        "sids": index.num_sids,
        "found_per_s": LOOKUPS / repeated(lambda: index.contains(some)).wall,
        "lookups_per_s": LOOKUPS / repeated(lambda: index.lookup(some)).wall,
        "items_per_lookup": len(index.lookup(some).items) / LOOKUPS,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.bin"
        result["save_s"] = repeated(lambda: index.save(path), repeats).wall
        result["load_s"] = repeated(lambda: rx.TrieIndex.load(path), repeats).wall
    return result


def numpy_sort(sids: np.ndarray) -> dict[str, Any]:
    words = words_of(sids)
    sort = partial(np.argsort, words[0]) if len(words) == 1 else partial(np.lexsort, words[::-1])
    return peer(sort, len(sids))


def static(sids: np.ndarray) -> dict[str, Any]:
    try:
        from static_decoding.csr_utils import build_static_index
    except ImportError:
        raise Missing("the module static_decoding (STATIC) is not importable") from None
    codes = int(sids.max()) + 1
    sids = sids[np.lexsort(words_of(sids)[::-1])]
    distinct = sids[np.r_[True, (sids[1:] != sids[:-1]).any(1)]]
    items = len(sids)
    del sids
    stored = lambda arrays: sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))  # noqa: E731
    return peer(lambda: build_static_index(distinct, codes, dense_lookup_layers=2), items, stored)


def marisa(sids: np.ndarray) -> dict[str, Any]:
    try:
        import marisa_trie
    except ImportError:
        raise Missing("the package marisa-trie is not installed") from None
    size = 2 * sids.shape[1]
    keys = sids.astype(">u2").tobytes()
    cut = lambda row: keys[row * size : (row + 1) * size]  # noqa: E731
    tries = []

    def build() -> Any:
        tries.append(marisa_trie.BinaryTrie(map(cut, range(len(sids)))))
        return tries[0]

    result = peer(build, len(sids), lambda trie: len(trie.tobytes()))
    some = [cut(int(row)) for row in np.random.default_rng(3).integers(len(sids), size=LOOKUPS)]
    return result | {"found_per_s": LOOKUPS / repeated(lambda: [tries[0][key] for key in some]).wall}


def peer(build: Callable[[], Any], items: int, stored: Callable[[Any], int] = lambda _: 0) -> dict[str, Any]:
    """Of one build on one thread."""
    built = measured(build)
    return {
        "build_s": built.cost.wall,
        "build_cpu_s": built.cost.cpu,
        "extra_bytes_per_item": built.peak_bytes / items,
        "peak_bytes": report.memory_status("VmHWM"),
        "index_bytes_per_item": stored(built.value) / items,
    }


METHODS = {"ours": ours, "numpy_sort": numpy_sort, "static": static, "marisa": marisa}


def work(method: str, sids_file: Path, most_bytes: int) -> dict[str, Any]:
    """One process's numbers, or why there are none."""
    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    try:
        return METHODS[method](np.load(sids_file))
    except Missing as missing:
        return {"unavailable": str(missing)}


def run_method(name: str, path: Path) -> dict[str, Any]:
    """A peer that runs out of memory ends as it does, with MemoryError or without."""
    free = report.available_memory() - SPARED
    try:
        return report.run_fresh(MODULE, "--worker", name, str(path), str(free))
    except SystemExit:
        if name == "ours":
            raise
        return {"unavailable": f"failed with {free / 1e9:.1f} GB to itself"}


def run_case(case: Case, processes: int) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sids.npy"
        draw(case, path)
        for _ in range(processes if case.items <= 10 * MILLION else 1):
            for name, done in runs.items():
                if not (done and "unavailable" in done[0]):
                    done.append(run_method(name, path))
    found = {
        name: done[0] if "unavailable" in done[0] else {key: median(run[key] for run in done) for key in done[0]}
        for name, done in runs.items()
    }
    own = found.pop("ours")
    builds = [run["build_s"] for run in runs["ours"]]
    return {
        "case": case.name,
        "items": case.items,
        "codes": case.codes,
        "levels": case.levels,
        "dtype": case.dtype,
        **own,
        "sids_per_s_spread": [case.items / max(builds), case.items / min(builds)],
        "peers": found,
    }


def table(cells: list[dict[str, Any]]) -> str:
    """Ours; an exclamation mark where a target is missed."""
    head = ["catalogue", "build, s", "CPU, s", "M SIDs/s (spread)", "with item ids", "bytes an item"]
    head += ["extra bytes an item at the peak", "peak, GB", "M found/s", "M lookups/s (items)", "save, ms", "load, ms"]
    rows = []
    for r in cells:
        least, most = (value / 1e6 for value in r["sids_per_s_spread"])
        speed = r["items"] / r["build_s"]
        slow = speed < LEAST_SPEED.get(r["levels"], 0)
        big = r["index_bytes_per_item"] > MOST_BYTES.get(r["levels"], 1e9)
        hungry = r["extra_bytes_per_item"] > MOST_EXTRA_BYTES
        marks = [" **!**" if missed else "" for missed in (slow, big, hungry)]
        rows.append(
            [
                r["case"],
                f"{r['build_s']:.3f}",
                f"{r['build_cpu_s']:.3f}",
                f"{speed / 1e6:.1f} ({least:.1f}-{most:.1f}){marks[0]}",
                f"{r['items'] / r['build_with_item_ids_s'] / 1e6:.1f}",
                f"{r['index_bytes_per_item']:.1f}{marks[1]}",
                f"{r['extra_bytes_per_item']:.1f}{marks[2]}",
                f"{r['peak_bytes'] / 1e9:.2f}",
                f"{r['found_per_s'] / 1e6:.2f}",
                f"{r['lookups_per_s'] / 1e6:.2f} ({r['items_per_lookup']:.1f})",
                f"{r['save_s'] * 1e3:.1f}",
                f"{r['load_s'] * 1e3:.1f}",
            ]
        )
    return markdown(head, rows)


def peer_table(cells: list[dict[str, Any]]) -> str:
    head = ["catalogue", "peer", "build, s", "CPU, s", "times ours", "bytes an item", "times ours"]
    head += ["extra bytes an item at the peak", "M found/s"]
    rows = []
    for r in cells:
        for name, found in r["peers"].items():
            if "unavailable" in found:
                rows.append([r["case"], name, found["unavailable"], *[""] * (len(head) - 3)])
                continue
            stored, per_second = found["index_bytes_per_item"], found.get("found_per_s")
            rows.append(
                [
                    r["case"],
                    name,
                    f"{found['build_s']:.3f}",
                    f"{found['build_cpu_s']:.3f}",
                    f"{found['build_s'] / r['build_s']:.2f}x",
                    f"{stored:.1f}" if stored else "-",
                    f"{stored / r['index_bytes_per_item']:.2f}x" if stored else "-",
                    f"{found['extra_bytes_per_item']:.1f}",
                    f"{per_second / 1e6:.2f}" if per_second else "-",
                ]
            )
    return markdown(head, rows)


def main() -> None:
    parser = report.parser(MODULE, __doc__, processes=2)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # a method, a file, most bytes; prints JSON
    args = parser.parse_args()
    if args.worker:
        method, file, most_bytes = args.worker
        print(json.dumps(work(method, Path(file), int(most_bytes))))
        return
    processes = 1 if args.quick else args.processes
    environment = {**report.environment(MODULE), "processes": processes, "threads": THREADS}
    cells: list[dict[str, Any]] = []
    for i in report.choose(parser, CASES, args.cases):
        cells.append(run_case(CASES[i], processes))
        print(json.dumps(cells[-1]), flush=True)
        if args.out:
            results.write(args.out, {MODULE: environment | {"results": cells}})
    print(table(cells), peer_table(cells), sep="\n\n")


if __name__ == "__main__":
    main()
