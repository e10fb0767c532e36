"""What a running service tells the publishers of its store: its model's vocabulary, what it serves and what it refused.

Two files beside the versions: ``.service.json``, always whole, and ``.service.lock``, which every worker holds locked
while it lives. The workers of a store have one model.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from raddpo_ext._files import open_regular, replacing

_RECORD, _LOCK = ".service.json", ".service.lock"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """The service of a store, as the worker that wrote last knows it.

    Attributes:
        vocab_size: its model's token ids are below.
        version: the version that it serves.
        refused: versions that its model cannot serve.
    """

    vocab_size: int
    version: int
    refused: tuple[int, ...] = ()


def last_served(folder: Path) -> Served | None:
    """What the last service of this store wrote, whether it still runs or not; None where there was none."""
    with suppress(OSError, ValueError, TypeError):
        with open_regular(folder / _RECORD) as file:
            found = Served(**json.load(file))
        numbers = (found.vocab_size, found.version, *found.refused)
        if all(isinstance(number, int) for number in numbers):
            return found
    return None


def is_running(folder: Path) -> bool:
    """Whether a worker of this store lives."""
    with suppress(FileNotFoundError), open_regular(folder / _LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class StoreService:
    """A worker's end. A store that may not be written to is served all the same, and its publishers know nothing."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder, self._vocab_size = folder, vocab_size
        self._told: Served | None = None
        try:
            # Read and write, so that not even a FIFO of this name makes it wait.
            self._lock = os.fdopen(os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666), "rb+", 0)
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # until this object or its process goes
        except OSError as error:
            _LOG.warning("the store's publishers are not told of this service: %s", error)

    def tell(self, version: int, refused: list[int]) -> None:
        """Writes down what is served now, where that is news."""
        served = Served(self._vocab_size, version, tuple(sorted(refused)))
        if served == self._told:
            return
        self._told = served
        try:
            with replacing(self._folder / _RECORD) as file:
                file.write(json.dumps(asdict(served)).encode())
        except OSError as error:
            _LOG.warning("the store's publishers are not told of version %d: %s", version, error)
