"""The demo on a real catalogue: SFT, index, mining of preference sessions, RAD-DPO, and a table of before and after."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

import raddpo_ext as rx
from demo.measure import latencies
from demo.purchases import report
from demo.purchases.alignment import align, session_logps
from demo.purchases.figure import LABELS, draw
from demo.purchases.mining import Session, cut_sessions, mine
from demo.purchases.model import Tokens, train
from demo.sft import HISTORY
from raddpo_ext.data.catalogue import Case, Catalogue, load_catalogue

CASES = 5000
SESSIONS = 8000
FREE_CASES = 300  # on which the unconstrained search runs
TIMED_CASES = 20
SHOWN_CASES = 3
FOLLOWED = 300  # sessions kept from the alignment whose log-probs are followed
ARTIFACTS = Path(".demo")


def run(options: argparse.Namespace) -> int:
    """Exit code 1 when the aligned model does not beat the most popular items."""
    try:
        catalogue = load_catalogue(options.data)
        sessions = cut_sessions(catalogue, options.sessions or SESSIONS, FOLLOWED, options.seed)
    except (OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return _run(catalogue, *sessions, options)


def _run(catalogue: Catalogue, to_align: list[Session], aside: list[Session], options: argparse.Namespace) -> int:
    started, on_cpu = time.perf_counter(), time.process_time()
    ARTIFACTS.mkdir(exist_ok=True)
    tokens = Tokens.of(catalogue)
    index = _make_index(catalogue, tokens)

    begin = time.perf_counter()
    epochs = options.epochs or _epochs(catalogue)
    model, loss = train(catalogue, tokens, epochs, options.seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"SFT          {size:,} parameters, {epochs} epochs, loss {loss:.3f} nats a token{_since(begin)}")

    begin = time.perf_counter()
    logs = [ARTIFACTS / f"{catalogue.name}-{part}.jsonl" for part in ("sessions", "aside")]
    sessions, followed = (
        mine(part, path, catalogue, tokens, model, index, options.seed)
        for part, path in zip((to_align, aside), logs, strict=True)
    )
    print(
        f"mining       {logs[0]}: {len(sessions):,} sessions, {_mean(sessions['positives']):.1f} positives and "
        f"{_mean(sessions['negatives']):.1f} negatives each{_since(begin)}"
    )

    cases = report.spread(catalogue.valid if options.valid else catalogue.test, options.cases or CASES)
    retriever = rx.SIDRetriever(model, index, beam_width=report.BEAMS)
    before = _measure(retriever, tokens, cases, followed)
    begin = time.perf_counter()
    curves = align(model, tokens, sessions, followed, ARTIFACTS, options.seed)
    right = [entry["rewards/accuracies"] for entry in curves.log]
    print(
        f"RAD-DPO      {curves.drift[-1]['step']} steps, the winner ahead in {right[0]:.1%} of the pairs, "
        f"at the end in {right[-1]:.1%}{_since(begin)}"
    )
    after = _measure(retriever, tokens, cases, followed)

    popular = report.measure_popularity(catalogue, cases)
    print(f"\n{'':29}{'popular':>9}{'SFT':>10}{'RAD-DPO':>10}{'change':>10}   95 % interval")
    for title in before:
        print("\n".join([title, *report.table(before[title], after[title], popular)]))

    prompts = [tokens.prompt(case.history[-HISTORY:]).tolist() for case in report.spread(cases, TIMED_CASES)]
    ours, theirs = latencies(retriever, prompts, (row.tolist() for row in tokens.of_item), report.BEAMS)
    print(f"\nlatency, one query at a time, {torch.get_num_threads()} threads")
    print(f"  SIDRetriever                            {1000 * ours:7.1f} ms")
    print(f"  generate with prefix_allowed_tokens_fn  {1000 * theirs:7.1f} ms, {theirs / ours:.1f} times as long")

    print("\nsome of them, with log-probabilities; * is what was bought next")
    print("\n".join(report.examples(retriever, tokens, catalogue, report.spread(cases, SHOWN_CASES))))
    picture = ARTIFACTS / f"{catalogue.name}.png"
    draw(curves, f"RAD-DPO on {catalogue.name}", picture)
    seconds = time.perf_counter() - started
    print(
        f"\ncurves       {picture}\nin all       {seconds:.0f} s, {time.process_time() - on_cpu:.0f} s of them on a CPU"
    )
    if not report.beats(next(iter(after.values())), popular):
        print("demo: the aligned model does not beat the most popular items", file=sys.stderr)
        return 1
    return 0


def _measure(
    retriever: rx.SIDRetriever, tokens: Tokens, cases: list[Case], followed: Any
) -> dict[str, dict[str, torch.Tensor]]:
    """The model as it is now: by part of the table, each metric of each purchase or session."""
    free = report.spread(cases, FREE_CASES)
    logps = session_logps(retriever.model, tokens, followed)
    return {
        f"{len(cases):,} purchases left out of the training, {report.BEAMS} beams": report.measure(
            retriever, tokens, cases
        ),
        f"{len(free):,} of them, searched without the index": {
            "invalid@10": report.measure_freely(retriever.model, tokens, retriever.index, free)
        },
        f"log-probs in {len(followed):,} sessions that the alignment never sees, in nats": {
            LABELS[group]: values for group, values in logps.items()
        },
    }


def _epochs(catalogue: Catalogue) -> int:
    """Enough to train on the data: the fewer purchases, the more often each is seen."""
    return min(12, max(6, 480_000 // sum(map(len, catalogue.train))))


def _make_index(catalogue: Catalogue, tokens: Tokens) -> rx.TrieIndex:
    """The catalogue's index, by way of its file."""
    begin = time.perf_counter()
    built = rx.TrieIndex.build(catalogue.sids, lengths=catalogue.lengths, vocab=tokens.vocab)
    seconds = time.perf_counter() - begin
    path = ARTIFACTS / f"{catalogue.name}.index"
    built.save(path)
    index = rx.TrieIndex.load(path)
    lengths = "" if catalogue.lengths is None else f"{catalogue.lengths.min()} to "
    print(
        f"catalogue    {catalogue.name}: {index.num_items:,} items, {index.num_sids:,} SIDs of {lengths}"
        f"{index.sid_levels} codes; {len(catalogue.train):,} shoppers\n"
        f"index        {path}: {index.nbytes / index.num_items:.1f} bytes an item, built in {1000 * seconds:.1f} ms"
    )
    return index


def _mean(lists: Any) -> float:
    return sum(map(len, lists)) / len(lists)


def _since(begin: float) -> str:
    return f", {time.perf_counter() - begin:.0f} s"
