"""CatalogueStore: versions of a catalogue in a folder, published atomically and picked up by running searches."""

from __future__ import annotations

import fcntl
import filecmp
import logging
import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raddpo_ext import _check
from raddpo_ext.trie import TrieIndex

_NAME = re.compile(r"(\d{6,})\.trie")
_STAGED = ".publishing."
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CatalogueVersion:
    """One version of a catalogue. A search that holds it from start to end sees nothing of a newer one.

    Attributes:
        version: its number in the store, from 1 up.
        index: memory-mapped; unmapped when nothing refers to it any more.
    """

    version: int
    index: TrieIndex


class CatalogueStore:
    """Versions of a catalogue on disk, ``000001.trie``, ``000002.trie``, ...: the highest number is the newest.

    Any number of processes may read and publish at once. A version appears in the folder under its final name whole and
    verified, is never changed, and is deleted once ``keep`` newer or equal ones are there; searches that hold it go on
    with it, since a mapped file outlives its name. A publisher killed at any point leaves the store as it was.

    Args:
        path: the folder, on a local disk; made by the first :meth:`publish`.
        keep: versions left on disk by :meth:`publish`, at least 1.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.path = Path(path)
        self.keep = _check.integer(keep, "keep", 1)
        #: Versions on disk that could not be loaded, and why.
        self.refused: dict[int, str] = {}
        self._current: CatalogueVersion | None = None
        self._loading = threading.Lock()

    @property
    def version(self) -> int:
        """The newest version on disk, 0 for an empty store."""
        return max(self._versions(), default=0)

    def publish(self, index: TrieIndex | str | os.PathLike[str], *, unless_newest: bool = False) -> int:
        """Makes an index, or a file that :meth:`TrieIndex.save` wrote, the newest version.

        The copy in the store is on the disk and its checksum verified before it has its name.

        Args:
            index: the index, or its file.
            unless_newest: change nothing where the newest version holds the same already, to the byte.

        Returns:
            Its version: one more than the newest, or the newest where nothing was changed.

        Raises:
            ValueError: the file is no index, truncated or altered; nothing has changed.
            OSError: it cannot be read, or the store not written.
        """
        if not isinstance(index, TrieIndex):
            index = TrieIndex.load(index)
        self.path.mkdir(exist_ok=True)
        with self._publishing():
            staged = self.path / f"{_STAGED}{secrets.token_hex(8)}"
            try:
                index.save(staged)
                TrieIndex.load(staged)
                version = self.version
                if unless_newest and version and filecmp.cmp(staged, self._file(version), shallow=False):
                    return version
                version += 1
                os.replace(staged, self._file(version))
            finally:
                staged.unlink(missing_ok=True)
            for old in sorted(self._versions())[: -self.keep]:
                self._file(old).unlink(missing_ok=True)
        return version

    def current(self) -> CatalogueVersion:
        """The newest version that loads; one look at the folder unless there is a new one.

        A newer one that is damaged is refused, logged and entered in :attr:`refused`: the version at hand, or the next
        older one on disk, goes on. The answer never goes back to an older version than before.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._loading:
            self._current = self._newest()
            return self._current

    def _newest(self) -> CatalogueVersion:
        at_hand = self._current
        for version in sorted(self._versions() - self.refused.keys(), reverse=True):
            if at_hand is not None and version <= at_hand.version:
                break
            try:
                return CatalogueVersion(version, TrieIndex.load(self._file(version)))
            except FileNotFoundError as error:
                if version not in self._versions():  # pruned since the look at the folder: newer ones are there
                    return self._newest()
                self._refuse(version, error)
            except ValueError as error:
                self._refuse(version, error)
        if at_hand is None:
            raise FileNotFoundError(2, "no version of a catalogue in this folder", str(self.path))
        return at_hand

    def _refuse(self, version: int, error: Exception) -> None:
        self.refused[version] = str(error)
        _LOG.error("catalogue version %d is refused: %s", version, error)

    def _versions(self) -> set[int]:
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return set()
        return {int(match[1]) for match in map(_NAME.fullmatch, names) if match}

    def _file(self, version: int) -> Path:
        return self.path / f"{version:06}.trie"

    @contextmanager
    def _publishing(self) -> Iterator[None]:
        """One publisher at a time; the kernel opens the lock of one that is killed."""
        with open(self.path / ".lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in os.listdir(self.path):
                if _STAGED in name:  # left by one that was killed
                    (self.path / name).unlink(missing_ok=True)
            yield
