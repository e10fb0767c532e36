"""Trains a small model on purchases, indexes the catalogue and retrieves from it: ``python -m demo [--data FOLDER]``.

Exit code: 0, 1 when the model does not beat the most popular items, 2 on bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import raddpo_ext as rx
from demo import report
from demo.model import Tokens, train
from demo.shop import make_shop
from raddpo_ext.catalogue import Catalogue, load_catalogue

FREE_CASES = 200  # cases on which the unconstrained search runs
TIMED_CASES = 20
SHOWN_CASES = 3
ARTIFACTS = Path(".demo")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.data is None:
            catalogue = make_shop(options.shoppers, options.cases, options.seed)
        else:
            catalogue = load_catalogue(options.data)
            catalogue = dataclasses.replace(catalogue, test=report.spread(catalogue.test, options.cases))
    except (OSError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return run(catalogue, _epochs(catalogue) if options.epochs is None else options.epochs, options.seed)


def run(catalogue: Catalogue, epochs: int, seed: int) -> int:
    tokens = Tokens.of(catalogue)
    index = _make_index(catalogue, tokens)
    begin = time.perf_counter()
    model, loss = train(catalogue, tokens, epochs, seed)
    print(
        f"model        {sum(p.numel() for p in model.parameters()):,} parameters, {epochs} epochs in "
        f"{time.perf_counter() - begin:.0f} s, loss {loss:.3f} nats a token"
    )
    retriever = rx.SIDRetriever(model, index, beam_width=report.BEAMS)

    quality, valid = report.measure(retriever, tokens, catalogue.test)
    popular = report.measure_popularity(catalogue)
    print(f"\n{len(catalogue.test):,} held-out purchases, {report.BEAMS} beams")
    print(" " * 25 + "".join(f"{f'recall@{cut}':>11}" for cut in report.CUTS) + f"{'MRR':>11}")
    print(f"  SIDRetriever           {quality}\n  most popular items     {popular}")

    free_cases = report.spread(catalogue.test, FREE_CASES)
    free = report.share_of_items(model, tokens, free_cases)
    print("\ninvalid items")
    print(f"  with the index         {1 - valid:10.1%}  of the top {max(report.CUTS)}")
    print(f"  without (generate)     {1 - free:10.1%}  of the top 10, {len(free_cases)} queries")

    ours, theirs = report.latencies(retriever, tokens, report.spread(catalogue.test, TIMED_CASES))
    print(f"\nlatency, one query at a time, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}")
    print(f"  SIDRetriever                            {1000 * ours:7.1f} ms")
    print(f"  generate with prefix_allowed_tokens_fn  {1000 * theirs:7.1f} ms, {theirs / ours:.1f} times as long")

    print("\nsome of them, with log-probabilities; * is what was bought next")
    print("\n".join(report.examples(retriever, tokens, catalogue, report.spread(catalogue.test, SHOWN_CASES))))
    if not quality.beats(popular):
        print("demo: the model does not beat the most popular items", file=sys.stderr)
        return 1
    return 0


def _epochs(catalogue: Catalogue) -> int:
    """Enough to train on the data: the fewer purchases, the more often each is seen."""
    return min(12, max(6, 480_000 // sum(map(len, catalogue.train))))


def _make_index(catalogue: Catalogue, tokens: Tokens) -> rx.TrieIndex:
    """The catalogue's index, by way of its file."""
    begin = time.perf_counter()
    built = rx.TrieIndex.build(catalogue.sids, lengths=catalogue.lengths, vocab=tokens.vocab)
    seconds = time.perf_counter() - begin
    path = ARTIFACTS / f"{catalogue.name}.index"
    ARTIFACTS.mkdir(exist_ok=True)
    built.save(path)
    index = rx.TrieIndex.load(path)
    lengths = "" if catalogue.lengths is None else f"{catalogue.lengths.min()} to "
    print(
        f"catalogue    {catalogue.name}: {index.num_items:,} items, {index.num_sids:,} SIDs of {lengths}"
        f"{index.sid_levels} codes; {len(catalogue.train):,} shoppers\n"
        f"index        {path}: {index.nbytes / index.num_items:.1f} bytes an item, built in {1000 * seconds:.1f} ms"
    )
    return index


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo", description="Train, index, retrieve.")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a real catalogue; default: a made-up shop")
    parser.add_argument("--cases", type=_positive, default=5000, metavar="N", help="held-out purchases (default 5000)")
    parser.add_argument("--shoppers", type=_positive, default=4000, metavar="N", help="of the shop (default 4000)")
    parser.add_argument("--epochs", type=_positive, metavar="N", help="of training (default: enough for the data)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a second one saves such a small model little, and on a busy machine costs minutes
    sys.stdout.reconfigure(line_buffering=True)  # each result at once, into a pipe too
    sys.exit(main())
