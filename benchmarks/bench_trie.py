"""Building, loading and searching the trie index on two CPU threads: speed and memory::

    python -m benchmarks.bench_trie            # writes benchmarks/results/trie-cpu.json
    python -m benchmarks.bench_trie --huge     # 100M SIDs of 4 levels; writes benchmarks/results/trie-huge-cpu.json
    python -m benchmarks.bench_trie --quick    # one million only, one process; prints only

Each catalogue is drawn once into a file, 1 % of its rows copies of others (SIDs that collide); fresh processes then
read it, note the memory they hold, and build. Extra memory is the peak of the first build, the index itself included,
above that note. The build's time is the median of its repeats, whole Python call, validation included, input in memory;
of several processes the median of their medians.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import raddpo_ext as rx
from benchmarks import catalogues, report

MODULE = "benchmarks.bench_trie"
THREADS = 2
MILLION = 1_000_000
COLLIDING = 0.01
LOOKUPS = 200_000


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
HUGE = Case("uniform", 100 * MILLION, 8192, 4, "uint16")
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


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times)


def measure(sids_file: Path, repeats: int, baselines: bool) -> dict[str, float]:
    """One process's numbers."""
    torch.set_num_threads(THREADS)
    sids = np.load(sids_file)
    items = len(sids)
    held = report.memory_status("VmRSS")
    start = time.perf_counter()
    index = rx.TrieIndex.build(sids)
    first = time.perf_counter() - start
    peak = report.memory_status("VmHWM")  # not getrusage's, which a process inherits from its parent
    result = {
        "first_build_s": first,
        "extra_bytes_per_item": (peak - held) / items,
        "peak_bytes": peak,
        "index_bytes_per_item": index.nbytes / items,
        "nodes": index.num_nodes,
        "sids": index.num_sids,
    }
    if not repeats:
        return result
    result["build_s"] = seconds(lambda: rx.TrieIndex.build(sids), repeats)
    item_ids = np.random.default_rng(2).permutation(items)
    result["build_with_item_ids_s"] = seconds(lambda: rx.TrieIndex.build(sids, item_ids=item_ids), repeats)
    some = sids[np.random.default_rng(3).integers(items, size=LOOKUPS)]
    assert bool(index.contains(some).all())
    result["lookups_per_s"] = LOOKUPS / seconds(lambda: index.lookup(some), repeats)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.bin"
        result["save_s"] = seconds(lambda: index.save(path), repeats)
        result["load_s"] = seconds(lambda: rx.TrieIndex.load(path), repeats)
    if baselines:
        result |= measure_baselines(sids, repeats)
    return result


def measure_baselines(sids: np.ndarray, repeats: int) -> dict[str, float]:
    """numpy's sort alone, of SIDs packed beforehand, and STATIC's builder, which wants distinct, sorted SIDs. Both run
    on one thread."""
    codes = int(sids.max()) + 1
    width = (codes - 1).bit_length()
    most = 63 // width  # levels in a word
    words = []
    for begin in range(0, sids.shape[1], most):
        word = np.zeros(len(sids), np.int64)
        for column in sids[:, begin : begin + most].T:
            word = word << width | column
        words.append(word)
    order = np.lexsort(words[::-1])
    ours = {
        "numpy_sort_s": seconds(lambda: np.argsort(words[0]) if len(words) == 1 else np.lexsort(words[::-1]), repeats)
    }
    try:
        from static_decoding.csr_utils import build_static_index
    except ImportError:
        return ours
    distinct = sids[order]
    distinct = distinct[np.r_[True, (distinct[1:] != distinct[:-1]).any(1)]]
    start = time.perf_counter()
    arrays = build_static_index(distinct, codes, dense_lookup_layers=2)
    static_s = time.perf_counter() - start
    stored = sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
    return ours | {"static_build_s": static_s, "static_bytes_per_item": stored / len(sids)}


def run_case(case: Case, processes: int, repeats: int, baselines: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sids.npy"
        draw(case, path)
        options = ["--worker", str(path), "--repeats", str(repeats)] + ["--baselines"] * baselines
        runs = [report.run_fresh(MODULE, *options) for _ in range(processes)]
    middle = {key: median(run[key] for run in runs) for key in runs[0]}
    build_s = middle.get("build_s", middle["first_build_s"])
    result = {"case": case.name, "dtype": case.dtype, **middle, "sids_per_s": case.items / build_s}
    builds = [run.get("build_s", run["first_build_s"]) for run in runs]
    return result | {"sids_per_s_spread": [case.items / max(builds), case.items / min(builds)]}


def table(results: list[dict[str, Any]]) -> str:
    head = [
        "catalogue",
        "build, s",
        "M SIDs/s (spread)",
        "with item ids",
        "numpy sort",
        "STATIC",
        "bytes an item",
        "STATIC's",
    ]
    head += ["extra bytes an item at the peak", "peak, GB", "M lookups/s", "save, ms", "load, ms"]

    def cell(result: dict[str, Any], key: str, scale: float, digits: int = 1) -> str:
        return f"{result[key] * scale:.{digits}f}" if key in result else "-"

    def speed(result: dict[str, Any], items: int, key: str) -> str:
        return f"{items / result[key] / 1e6:.1f}" if key in result else "-"

    rows = []
    for result in results:
        case = next(case for case in (*CASES, HUGE) if case.name == result["case"])
        least, most = (value / 1e6 for value in result["sids_per_s_spread"])
        slow = result["sids_per_s"] < LEAST_SPEED.get(case.levels, 0)
        big = result["index_bytes_per_item"] > MOST_BYTES.get(case.levels, 1e9)
        hungry = result["extra_bytes_per_item"] > MOST_EXTRA_BYTES
        marks = [" **!**" if missed else "" for missed in (slow, big, hungry)]
        rows.append(
            [
                result["case"],
                f"{case.items / result['sids_per_s']:.3f}",
                f"{result['sids_per_s'] / 1e6:.1f} ({least:.1f}-{most:.1f}){marks[0]}",
                speed(result, case.items, "build_with_item_ids_s"),
                speed(result, case.items, "numpy_sort_s"),
                speed(result, case.items, "static_build_s"),
                cell(result, "index_bytes_per_item", 1) + marks[1],
                cell(result, "static_bytes_per_item", 1, 0),
                cell(result, "extra_bytes_per_item", 1) + marks[2],
                cell(result, "peak_bytes", 1e-9, 2),
                cell(result, "lookups_per_s", 1e-6, 2),
                cell(result, "save_s", 1e3),
                cell(result, "load_s", 1e3),
            ]
        )
    return report.markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=3, help="fresh processes a catalogue (3)")
    parser.add_argument(
        "--quick", action="store_true", help="the catalogues of one million, one process; no file by default"
    )
    parser.add_argument("--huge", action="store_true", help="only 100M SIDs of 4 levels, one build a process")
    parser.add_argument(
        "--out", type=Path, help="result file (benchmarks/results/trie-cpu.json, or trie-huge-cpu.json)"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # measures that file and prints JSON
    parser.add_argument("--repeats", type=int, default=3, help=argparse.SUPPRESS)
    parser.add_argument("--baselines", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args.repeats, args.baselines)))
        return
    cases = [HUGE] if args.huge else [case for case in CASES if not args.quick or case.items == MILLION]
    processes = 1 if args.quick else args.processes
    results = []
    for case in cases:
        repeats = 0 if args.huge else 3
        results.append(run_case(case, processes, repeats, baselines=case.items == MILLION))
        print(json.dumps(results[-1]), flush=True)
    print(table(results))
    name = "trie-huge-cpu.json" if args.huge else "trie-cpu.json"
    out = args.out or (None if args.quick else report.RESULTS / name)
    if out:
        result = {**report.environment(MODULE), "processes": processes, "threads": THREADS}
        report.write_json(out, result | {"markdown": table(results).splitlines(), "results": results})


if __name__ == "__main__":
    main()
