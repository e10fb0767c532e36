"""How the cost grows with the catalogue, the beam, the vocabulary, the SID, the session and the threads::

    python -m benchmarks.scaling --out FILE      # 5 minutes, 5 GB
    python -m benchmarks.scaling --quick         # a minute, few points

Every family of points runs in a fresh process, catalogues in one each, on one thread but for the family of threads. At
a point ours and the floor take turns in bursts whose first call is not counted; a time is the median over the bursts of
their medians, the spread these medians' least and most, and the CPU time that of all threads. A step's time is the mean
over the steps of one search, from random logits. Ours is one method or two that differ in what they compute; that they
are right is checked by the tests and by the other benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import log2
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

import raddpo_ext as rx
from benchmarks.harness import report, results
from benchmarks.pages import scaling_page
from raddpo_ext.bench import (
    catalogues,
    group_advantages,
    legal_mass,
    policy_loss,
    sample_step,
    session_loss,
    token_logps,
)
from raddpo_ext.bench.beam_search_peers import bare_lse
from raddpo_ext.bench.compare import Comparison, Run, measure
from raddpo_ext.bench.group_advantages_cases import Case as AdvantagesCase
from raddpo_ext.bench.policy_loss_cases import Case as PolicyCase
from raddpo_ext.bench.searches import Level, Search
from raddpo_ext.bench.session_loss_cases import Batch
from raddpo_ext.bench.session_loss_cases import Case as SessionCase
from raddpo_ext.bench.session_loss_peers import bare_bytes, ours
from raddpo_ext.bench.token_logps_cases import Case as LogpsCase

MODULE = "benchmarks.scaling"
CPU = torch.device("cpu")
ROUNDS, BURST = 5, 0.05  # seconds
MILLION = 1_000_000
BLOCK = 10 * MILLION  # rows of a catalogue that are drawn or copied together
CANDIDATES, PACKED = 8192, 1024  # of a batch of sessions for the loss, and of one that is packed
PROMPT = 128  # tokens of each session's
LARGE = 152_064  # a language model's vocabulary
ROWS = (256, 32768)  # of log-probs, and their vocabulary
CODES = 256  # of each level of those whose legal mass is asked
LOOKUPS, ADDED = 200_000, 100_000
Point = dict[str, Any]


def timed(
    family: str,
    panel: str,
    x: int,
    methods: dict[str, Run],
    floor: dict[str, Run],
    steps: int = 1,
    before: Run = lambda: None,
    **note: float,
) -> Point:
    """A point: the times of methods and floor, of one of the ``steps`` that a call makes, and what else is noted."""
    comparison = Comparison(panel, methods, floor, steps=steps, agree=lambda *_: None, before=before)
    times = measure(comparison, ROUNDS, BURST)
    return {"family": family, "panel": panel, "x": x, "methods": times, "floors": list(floor), "note": note}


def ours_of(family: str, panel: str, x: int, made: Comparison) -> Point:
    """A comparison's point without its peers."""
    return timed(family, panel, x, {"ours": made.methods["ours"]}, made.floors, before=made.before)


def uniform(items: int, codes: int, levels: int) -> np.ndarray:
    """The catalogue in 16 bits a code, drawn in blocks."""
    sids = np.empty((items, levels), np.uint16)
    for begin in range(0, items, BLOCK):
        size = min(BLOCK, items - begin)
        sids[begin : begin + size] = catalogues.uniform(size, codes, levels, seed=begin)
    return sids


def step(family: str, x: int, search: Search) -> Point:
    """The mean step of a search, normalised over the vocabulary and over the children alone."""
    levels = list(search.levels())

    def whole(prepare: Callable[[Level], Run]) -> Run:
        runs = [prepare(level) for level in levels]
        return lambda: [run() for run in runs]

    def ours(normalize: str) -> Run:
        options = {"normalize": normalize}
        return whole(
            lambda level: lambda: rx.beam_step(level.logits, level.state, search.index, search.beam_width, **options)
        )

    children = mean(int(search.index.child_ranges(level.state.nodes)[1].sum()) for level in levels)
    return timed(
        family,
        "beam step",
        x,
        {"ours": ours("vocab"), 'ours, normalize="trie"': ours("trie")},
        {"log-sum-exp of the logits": whole(lambda level: bare_lse(search, level))},
        len(levels),
        **{"children a step": round(children)},
    )


def items(counts: Sequence[int]) -> Iterator[Point]:
    """Catalogues of SIDs of 4 levels of 8192 codes; one query, 50 beams. A count a process: its memory is measured."""
    codes, levels = 8192, 4
    for count in counts:
        sids = torch.from_numpy(uniform(count, codes, levels))
        report.reset_peak_memory()
        held = report.memory_status("VmRSS")
        index = rx.TrieIndex.build(sids)
        sizes = {
            "index": index.nbytes / count,
            "peak of the build": (report.memory_status("VmHWM") - held) / count,
            "information in the SIDs": levels * log2(codes) / 8,
        }
        yield timed("items", "index build", count, {"ours": partial(rx.TrieIndex.build, sids)}, copying(sids))
        yield {
            "family": "items",
            "panel": scaling_page.BYTES,
            "x": count,
            "methods": {name: {"median": size} for name, size in sizes.items()},
            "floors": ["information in the SIDs"],
            "note": {"nodes an item": round(index.num_nodes / count, 2)},
        }
        yield step("items", count, Search(index, codes, 1, 50))


def copying(sids: torch.Tensor) -> dict[str, Run]:
    """The floor of a build."""
    copied = torch.empty_like(sids[:BLOCK])

    def copy() -> None:
        for block in sids.split(len(copied)):
            copied[: len(block)].copy_(block)

    return {"copy of the SIDs": copy}


def width(counts: Sequence[int]) -> Iterator[Point]:
    """One query in a million items of 3 levels of 8192 codes."""
    index = rx.TrieIndex.build(uniform(MILLION, 8192, 3))
    for count in counts:
        yield step("width", count, Search(index, 8192, 1, count))


def vocabulary(counts: Sequence[int]) -> Iterator[Point]:
    """100,000 items of 3 levels of the same 256 tokens, the vocabulary's last; one query, 50 beams. Log-probs of 64
    rows, from hidden states of 512."""
    sids = uniform(100_000, 256, 3)
    for count in counts:
        vocab = rx.SIDVocab([256] * 3, offsets=[count - 256] * 3)
        yield step("vocabulary", count, Search(rx.TrieIndex.build(sids, vocab=vocab), count, 1, 50))
        for panel, made in (
            ("token_logps", token_logps.comparison(CPU, case=LogpsCase("logits", 64, count), compiled=False)),
            ("linear_token_logps", token_logps.comparison(CPU, case=LogpsCase("sweep", 64, count, 512))),
        ):
            yield ours_of("vocabulary", panel, count, made)


def length(counts: Sequence[int]) -> Iterator[Point]:
    """A million items of codes of 2048; one query, 50 beams."""
    for count in counts:
        yield step("length", count, Search(rx.TrieIndex.build(uniform(MILLION, 2048, count)), 2048, 1, 50))


def sessions(counts: Sequence[int]) -> Iterator[Point]:
    """As many candidates of 4 codes in sessions of ``count``."""
    for count in counts:
        for panel, positives in (("one positive", 1), ("a quarter positives", max(1, count // 4))):
            batch = Batch(SessionCase("winner", CANDIDATES // count, (positives,) * 2, (count - positives,) * 2))
            methods, floor = {"ours": ours(batch)}, {"its bytes, copied": bare_bytes(batch)}
            pairs = batch.sessions.num_pairs
            yield timed("sessions", f"rad_dpo_loss, {panel}", count, methods, floor, pairs=pairs)
        packed = SessionCase("winner", PACKED // count, (1, 1), (count - 1,) * 2)
        yield from packing(count, Batch(packed).sessions)


def packing(count: int, batch: rx.SessionBatch) -> Iterator[Point]:
    """A row a session, which holds its prompt once."""
    prompts = list(torch.randint(1000, (batch.num_sessions, PROMPT)))
    layouts = {layout: partial(rx.pack_sessions, prompts, batch, layout=layout) for layout in ("candidates", "trie")}
    packed = {layout: pack() for layout, pack in layouts.items()}
    rows = torch.stack([packed["candidates"].input_ids] * 3)  # token ids, position ids and ends
    floor: dict[str, Run] = {"copy of its rows (candidates)": partial(torch.empty_like(rows).copy_, rows)}
    positions = {f"positions, {layout}": found.input_ids.numel() for layout, found in packed.items()}
    yield timed("sessions", "pack_sessions", count, layouts, floor, **positions)
    masks: dict[str, Run] = {layout: found.mask for layout, found in packed.items()}
    floor = {"its bytes written (candidates)": partial(packed["candidates"].mask().fill_, True)}
    yield timed("sessions", "PackedSessions.mask", count, masks, floor)


def index_calls(index: rx.TrieIndex, sids: torch.Tensor) -> dict[str, tuple[Run, dict[str, Run]]]:
    """Asking and changing a catalogue of these SIDs, and the floor of each."""
    asked, more = sids[:LOOKUPS].clone(), catalogues.uniform(ADDED, 8192, 3, seed=1)
    gone = torch.arange(0, len(sids), 1000)
    ids, block = index.items, index.data
    return {
        "contains": (partial(index.contains, asked), copying(asked)),
        "discard": (partial(index.discard, gone), {"copy of the item ids": partial(torch.empty_like(ids).copy_, ids)}),
        "add": (partial(index.add, more), {"copy of the index": partial(torch.empty_like(block).copy_, block)}),
    }


def threads(counts: Sequence[int]) -> Iterator[Point]:
    """Each operator at one size."""
    sids = torch.from_numpy(uniform(BLOCK, 8192, 3))
    vocab = rx.SIDVocab([256] * 3, offset=LARGE - 3 * 256)
    large = Search(rx.TrieIndex.build(uniform(100_000, 256, 3), vocab=vocab), LARGE, 1, 50)
    small = Search(rx.TrieIndex.build(uniform(MILLION, 2048, 3)), 2048, 2, 70)
    calls = index_calls(rx.TrieIndex.build(sids), sids)
    others = {
        "sample_step, a search": sample_step.comparison(CPU, case=sample_step.CASES[1]),
        "token_logps": token_logps.comparison(CPU, case=LogpsCase("logits", *ROWS), compiled=False),
        "linear_token_logps": token_logps.comparison(CPU, case=LogpsCase("sweep", *ROWS, 512)),
        "legal_mass": legal_mass.comparison(CPU, rows=ROWS[0], vocab_size=ROWS[1], codes=CODES),
        "rad_dpo_loss": session_loss.comparison(CPU, case=SessionCase("winner")),
        "group_advantages": group_advantages.comparison(CPU, case=AdvantagesCase("siblings", 16_384)),
        "policy_loss": policy_loss.comparison(CPU, case=PolicyCase("grpo", 16_384)),
    }
    for count in counts:
        torch.set_num_threads(count)
        build: dict[str, Run] = {"ours": partial(rx.TrieIndex.build, sids)}
        yield timed("threads", "index build", count, build, copying(sids))
        for panel, (run, floor) in calls.items():
            yield timed("threads", panel, count, {"ours": run}, floor)
        for panel, search in (("beam step V=2k W=2x70", small), ("beam step V=152k W=50", large)):
            point = step("threads", count, search) | {"panel": panel, "note": {}}
            del point["methods"]['ours, normalize="trie"']
            yield point
        for panel, made in others.items():
            yield ours_of("threads", panel, count, made)


CORES = len(os.sched_getaffinity(0))
FAMILIES: dict[str, tuple[Callable[[Sequence[int]], Iterator[Point]], list[int]]] = {
    "items": (items, [10**power for power in range(4, 9)]),
    "width": (width, [2**power for power in range(11)]),
    "vocabulary": (vocabulary, [256, 1024, 4096, 16384, 65536, LARGE]),
    "length": (length, [2, 3, 4, 6, 8, 12, 16]),
    "sessions": (sessions, [2**power for power in range(1, 11)]),
    "threads": (threads, [count for count in (1, 2, 4, 8, 16) if count <= CORES]),
}
QUICK = {
    "items": [10_000, MILLION],
    "width": [1, 64],
    "vocabulary": [256, 16384],
    "length": [2, 8],
    "sessions": [8, 128],
}


def run(quick: bool) -> list[Point]:
    """All points, from new processes."""
    points = []
    begin = time.monotonic()
    for family, (_, counts) in FAMILIES.items():
        chosen = QUICK.get(family, counts) if quick else counts
        for together in [[count] for count in chosen] if family == "items" else [chosen]:
            points += report.run_fresh(MODULE, "--worker", family, *map(str, together))
            print(f"{time.monotonic() - begin:5.0f} s  {family} {' '.join(map(str, together))}", flush=True)
    return points


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few points, to see that it works")
    parser.add_argument("--out", type=Path, help="write the result to this file")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)  # a family and its places; prints JSON
    args = parser.parse_args()
    if args.worker:
        torch.set_num_threads(1)
        family, *counts = args.worker
        print(json.dumps(list(FAMILIES[family][0]([int(count) for count in counts]))))
        return
    points = run(args.quick)
    print(*(line for lines in scaling_page.markdown(points).values() for line in lines), sep="\n")
    if args.out:
        results.write(args.out, {MODULE: report.environment(MODULE) | {"results": points}})


if __name__ == "__main__":
    main()
