"""What the commands of the command line share: numbers, output paths, a progress bar and messages."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

_BAR = 40  # characters
_LARGEST = 2**31 - 2  # the maximum token id and code


def integer(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > _LARGEST:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {_LARGEST}, got {text!r}")
    return int(text)


def integers(text: str) -> list[int]:
    return [integer(part) for part in text.split(",")]


def bar(share: float) -> None:
    """Redraw the progress bar on standard error."""
    filled = int(share * _BAR)
    print(f"\rbuilding {'#' * filled}{'.' * (_BAR - filled)} {share:4.0%}", end="", file=sys.stderr, flush=True)


def complain(message: str) -> None:
    """Print a message on standard error, in one line."""
    print("raddpo_ext: " + " ".join(message.split()), file=sys.stderr)


def check_parent(path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such directory")


def check_output(path: Path) -> None:
    check_parent(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a directory")
