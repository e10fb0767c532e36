"""Changing and filtering a catalogue of ten million items, two CPU threads, and one for the searches::

    python -m benchmarks.bench_trie_live
    python -m benchmarks.bench_trie_live --quick    # one million items

A fresh process builds the index and times each call on it: the first call on the fresh index, then the median of the
repeats; of several processes the median of their medians. A filtered search is the sum of its fused steps, one query
and 50 beams, the logits (as many as a level has codes) given and the same for all shares.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import astuple, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

import raddpo_ext as rx
from benchmarks.harness import report, results
from benchmarks.harness.timing import timed
from raddpo_ext.bench import catalogues

MODULE = "benchmarks.bench_trie_live"
THREADS = 2
MILLION = 1_000_000
SHAPES = ((8192, 3), (2048, 8))  # codes, levels
DISCARDED, ADDED = 10_000, 100_000
SHARES = (1.0, 0.5, 0.1, 0.01, 0.001, 0.0001)
BEAMS = 50


@dataclass(frozen=True)
class Case:
    items: int
    codes: int
    levels: int

    @property
    def name(self) -> str:
        return f"uniform {self.items // MILLION}M L{self.levels} V{self.codes}"


def milliseconds(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Of the first call, and the median of those after it."""
    times = [1e3 * timed(call).wall for _ in range(repeats + 1)]
    return times[0], median(times[1:])


def search_ms(index: rx.TrieIndex, logits: list[torch.Tensor], normalize: str, repeats: int) -> float:
    """All steps of a search, on one thread."""
    torch.set_num_threads(1)
    total, state = 0.0, rx.BeamState.start(index, 1)
    for rows in logits:
        width = state.nodes.shape[1]
        _, step_ms = milliseconds(
            lambda state=state, rows=rows[:, :width]: rx.beam_step(rows, state, index, BEAMS, normalize=normalize),
            repeats,
        )
        total += step_ms
        state = rx.beam_step(rows[:, :width], state, index, BEAMS, normalize=normalize)
    torch.set_num_threads(THREADS)
    return total


def measure(items: int, codes: int, levels: int, repeats: int) -> dict[str, Any]:
    """One process's numbers."""
    torch.set_num_threads(THREADS)
    rng = np.random.default_rng(0)
    sids = catalogues.uniform(items, codes, levels)
    more = catalogues.uniform(ADDED, codes, levels, seed=1)
    index = rx.TrieIndex.build(sids)
    some = rng.choice(items, DISCARDED, replace=False)
    result: dict[str, Any] = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        result[f"first_{name}_ms"], result[f"{name}_ms"] = milliseconds(call, repeats)

    note("discard", lambda: index.discard(some))
    note("add", lambda: index.add(more))
    less = index.discard(some)
    note("add_after_discard", lambda: less.add(more))
    note("build", lambda: rx.TrieIndex.build(sids))
    sparse_ids = 2**40 + 17 * np.arange(items)
    sparse = rx.TrieIndex.build(sids, item_ids=sparse_ids)
    note("discard_sparse_ids", lambda: sparse.discard(sparse_ids[some]))
    result["live_bytes_per_item"] = less.live.numel() / items
    logits = [torch.randn(1, BEAMS, codes, generator=torch.Generator().manual_seed(level)) for level in range(levels)]
    result["search_ms"] = {norm: search_ms(index, logits, norm, 20 * repeats) for norm in ("vocab", "trie")}
    result["filters"] = []
    for share in SHARES:
        allowed = np.sort(rng.choice(items, round(share * items), replace=False))
        mask = torch.zeros(items, dtype=torch.bool)
        mask[allowed] = True
        left = index.restrict(mask)
        result["filters"].append(
            {
                "share": share,
                "restrict_mask_ms": milliseconds(lambda mask=mask: index.restrict(mask), repeats)[1],
                "restrict_ids_ms": milliseconds(lambda allowed=allowed: index.restrict(allowed), repeats)[1],
                "search_ms": {norm: search_ms(left, logits, norm, 20 * repeats) for norm in ("vocab", "trie")},
            }
        )
    return result


def middle(runs: list[Any]) -> Any:
    """The median of each number of equal structures."""
    if isinstance(runs[0], dict):
        return {key: middle([run[key] for run in runs]) for key in runs[0]}
    if isinstance(runs[0], list):
        return [middle(list(parts)) for parts in zip(*runs, strict=True)]
    return median(runs)


def tables(cells: list[dict[str, Any]]) -> str:
    names = ("discard", "discard_sparse_ids", "add", "add_after_discard", "build")
    rows = []
    for cell in cells:
        times = (f"{cell[f'{name}_ms']:.0f} ({cell[f'first_{name}_ms']:.0f})" for name in names)
        rows.append([cell["case"], *times, f"{cell['live_bytes_per_item']:.2f}"])
    head = ["catalogue, ms (first call)", f"discard {DISCARDED}", "of 64-bit ids", f"add {ADDED}"]
    changes = report.markdown([*head, "add after a discard", "build anew", "live bytes an item"], rows)
    rows = []
    for cell in cells:
        rows.append([cell["case"], "no filter", "-", "-", *(f"{v:.3f}" for v in cell["search_ms"].values())])
        for f in cell["filters"]:
            made = [f"{f['restrict_mask_ms']:.1f}", f"{f['restrict_ids_ms']:.1f}"]
            rows.append([cell["case"], f"{f['share']:.2%}", *made, *(f"{v:.3f}" for v in f["search_ms"].values())])
    head = ["catalogue", "allowed", "restrict by mask, ms", "by ids, ms", "search, vocab, ms", "search, trie, ms"]
    return changes + "\n\n" + report.markdown(head, rows)


def main() -> None:
    parser = report.parser(MODULE, __doc__, processes=3)
    parser.add_argument("--repeats", type=int, default=5, help="calls after the first (5)")
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)  # measures these and prints JSON
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(*args.worker, args.repeats)))
        return
    cases = [Case(MILLION if args.quick else 10 * MILLION, codes, levels) for codes, levels in SHAPES]
    measured = []
    for case in (cases[i] for i in report.choose(parser, cases, args.cases)):
        worker = ("--worker", *map(str, astuple(case)), "--repeats", str(args.repeats))
        runs = [report.run_fresh(MODULE, *worker) for _ in range(1 if args.quick else args.processes)]
        measured.append({"case": case.name, **middle(runs)})
        print(json.dumps(measured[-1]), flush=True)
    print(tables(measured))
    if args.out:
        run = {**report.environment(MODULE), "processes": args.processes, "threads": THREADS}
        results.write(args.out, {MODULE: run | {"results": measured}})


if __name__ == "__main__":
    main()
