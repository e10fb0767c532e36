"""What a service records for the publishers of its store: its model's vocabulary, the versions it serves and refused.

The record is two files beside the versions: ``.service.json``, which is replaced atomically, and ``.service.lock``,
which every worker keeps locked while it runs. All workers of a store have the same model.
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
    """The record of a store's service, by the worker that wrote last.

    Attributes:
        vocab_size: size of the model's vocabulary; its token ids are smaller.
        version: the version that the service serves.
        refused: the versions that its model cannot serve.
    """

    vocab_size: int
    version: int
    refused: tuple[int, ...] = ()


def last_served(folder: Path) -> Served | None:
    """The record of the last service of this store, which may have ended; None if there was none."""
    with suppress(OSError, ValueError, TypeError):
        with open_regular(folder / _RECORD) as file:
            found = Served(**json.load(file))
        numbers = (found.vocab_size, found.version, *found.refused)
        if all(isinstance(number, int) for number in numbers):
            return found
    return None


def is_running(folder: Path) -> bool:
    """Whether a worker of this store is running."""
    with suppress(FileNotFoundError), open_regular(folder / _LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class StoreService:
    """Writes the record of one worker. A store that cannot be written is served without a record."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder, self._vocab_size = folder, vocab_size
        self._told: Served | None = None
        try:
            # Opened for reading and writing, because that does not block even if the name is that of a FIFO.
            self._lock = os.fdopen(os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666), "rb+", 0)
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # until this object is deleted or its process ends
        except OSError as error:
            _LOG.warning("the store's publishers are not told of this service: %s", error)

    def tell(self, version: int, refused: list[int]) -> None:
        """Write the record if it has changed."""
        served = Served(self._vocab_size, version, tuple(sorted(refused)))
        if served == self._told:
            return
        self._told = served
        try:
            with replacing(self._folder / _RECORD) as file:
                file.write(json.dumps(asdict(served)).encode())
        except OSError as error:
            _LOG.warning("the store's publishers are not told of version %d: %s", version, error)
