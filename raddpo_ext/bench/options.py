"""The command-line options of ``python -m raddpo_ext bench``. Does not import torch."""

from __future__ import annotations

import argparse
from pathlib import Path

PROCESSES = 5  # without --quick


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quick", action="store_true", help=f"run one process, about a minute (default: {PROCESSES} processes)"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="device of the operators (default cpu)"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # tiny sizes, for tests
