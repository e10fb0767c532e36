"""A generative retriever from its data to answers: ``python -m demo [--data FOLDER]``.

Without a folder it is a search shop: SFT on clicks, alignment on what was shown and passed over, and retrieval measured
against the truth, which a simulated shop knows. With one it is the purchases of a real catalogue.
Exit code: 0; 1 if the aligned model is not better; 2 on bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

THREADS = 2  # more save such small models nothing


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    # Each demo imports matplotlib and transformers, which --help can do without.
    if options.data is None:
        from demo.search.run import run
    else:
        from demo.purchases.run import run
    return run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo", description="Train, align, retrieve, measure.")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a real catalogue instead of the simulated shop")
    parser.add_argument("--full", action="store_true", help="the shop with three times the data")
    parser.add_argument("--valid", action="store_true", help="with --data: report on the validation purchases")
    parser.add_argument("--clicks", type=_positive, metavar="N", help="sessions that SFT learns from (default 20000)")
    parser.add_argument("--sessions", type=_positive, metavar="N", help="to align on (default 5000, with --data 8000)")
    parser.add_argument("--cases", type=_positive, metavar="N", help="reported on (default 1500, with --data 5000)")
    parser.add_argument("--epochs", type=_positive, metavar="N", help="of SFT (default 6, with --data by its size)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    sys.stdout.reconfigure(line_buffering=True)  # each result at once, into a pipe too
    sys.exit(main())
