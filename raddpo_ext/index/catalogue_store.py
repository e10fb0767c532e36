"""CatalogueStore: versions of a catalogue in a folder, published atomically and picked up by running searches."""

from __future__ import annotations

import errno
import fcntl
import filecmp
import logging
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from raddpo_ext import _check
from raddpo_ext.index.id_map import IdMap, map_path, move_map
from raddpo_ext.index.store_service import is_running, last_served
from raddpo_ext.index.trie import TrieIndex

_NAME = re.compile(r"((?!000000)[0-9]{6}|[1-9][0-9]{6,17})\.trie")
_LAST = 10**18 - 1  # version
_STAGED = ".publishing."
_LEFT = re.compile(r"\.?\.publishing\.[0-9a-f]{16}(\.idmap)?(\.[0-9a-f]{16})?")  # by a publisher that was killed
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of this process, which may pass
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CatalogueVersion:
    """One version of a catalogue. A search that holds it from start to end sees nothing of a newer one.

    Attributes:
        version: its number in the store, from 1 up.
        index: memory-mapped; unmapped when nothing refers to it any more.
        names: the items' own ids and titles, or None where they were published without.
    """

    version: int
    index: TrieIndex
    names: IdMap | None = None


class CatalogueStore:
    """Versions of a catalogue on disk, ``000001.trie``, ``000002.trie``, ...: the highest number is the newest.

    Any number of processes may read and publish at once. A version appears in the folder under its final name whole and
    verified, is never changed, and is deleted once ``keep`` newer or equal ones are there; searches that hold it go on
    with it, since a mapped file outlives its name. A publisher killed at any point leaves the store as it was.

    Where a service runs, or ran last, the newest ``keep`` of the versions that it served stay as well, whatever came
    after them: its model may be unable to serve that. What else is in the folder (a folder or FIFO of a version's name,
    other names) is passed over.

    Args:
        path: the folder, on a local disk; made by the first :meth:`publish`.
        keep: versions left on disk by :meth:`publish`, at least 1.
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.path = Path(path)
        self.keep = _check.integer(keep, "keep", 1)
        #: Versions on disk that could not be loaded, or that ``accept`` refused, and why.
        self.refused: dict[int, str] = {}
        self._current: CatalogueVersion | None = None
        self._loading = threading.Lock()

    @property
    def version(self) -> int:
        """The newest version on disk, 0 for an empty store."""
        return max(self._versions(), default=0)

    def publish(
        self,
        index: TrieIndex | str | os.PathLike[str],
        *,
        names: IdMap | None = None,
        unless_newest: bool = False,
        force: bool = False,
    ) -> int:
        """Makes an index, or a file that :meth:`TrieIndex.save` wrote, the newest version.

        The copy in the store is on the disk and its checksum verified before it has its name.

        Args:
            index: the index, or its file.
            names: its items' ids and titles. Default: of a file those beside it (:meth:`IdMap.save`), else none.
            unless_newest: change nothing where the newest version holds the same already, to the byte.
            force: publish it even where it has tokens that the running service's model lacks.

        Returns:
            Its version: one more than the newest, or the newest where nothing was changed.

        Raises:
            ValueError: the file is no index, truncated or altered, or it has tokens that the model of the service that
                runs on this store lacks; nothing has changed.
            OSError: it cannot be read, or the store not written.
        """
        if not isinstance(index, TrieIndex):
            names = IdMap.load(index) if names is None else names
            index = TrieIndex.load(index)
        self.path.mkdir(exist_ok=True)
        with self._publishing():
            staged = self.path / f"{_STAGED}{secrets.token_hex(8)}"
            try:
                index.save(staged)
                TrieIndex.load(staged)
                if names is not None:
                    names.save(staged)
                if not force:
                    self._check_tokens(max(index.max_tokens))
                version = self.version
                if unless_newest and self._is_same(staged, version):
                    return version
                version = self._next(version)
                move_map(staged, self._file(version))
                os.replace(staged, self._file(version))
            finally:
                staged.unlink(missing_ok=True)
                map_path(staged).unlink(missing_ok=True)
            self._prune()
        return version

    def _check_tokens(self, largest: int) -> None:
        served = last_served(self.path)
        if served is not None and largest >= served.vocab_size and is_running(self.path):
            raise ValueError(
                f"index has token id {largest}, but the model of the service that runs on {self.path} has a vocab_size "
                f"of {served.vocab_size}: it could not serve this version; force=True (--force) publishes it anyway"
            )

    def _is_same(self, staged: Path, version: int) -> bool:
        with suppress(OSError):  # none, or one that cannot be read
            newest = self._file(version)
            ours, theirs = map_path(staged), map_path(newest)
            same = ours.exists() == theirs.exists() and (not ours.exists() or filecmp.cmp(ours, theirs, shallow=False))
            return same and filecmp.cmp(staged, newest, shallow=False)
        return False

    def _next(self, version: int) -> int:
        """The number of the version after this one that nothing in the folder is called by."""
        version += 1
        while os.path.lexists(self._file(version)):
            version += 1
        if version > _LAST:
            raise ValueError(f"{self.path}: no version number is left after {_LAST}")
        return version

    def _prune(self) -> None:
        """Removes all but the newest ``keep``, and all but the newest ``keep`` of what a service has served."""
        versions = sorted(self._versions())
        kept = set(versions[-self.keep :])
        if (served := last_served(self.path)) is not None:
            kept |= set([v for v in versions if v <= served.version and v not in served.refused][-self.keep :])
        for old in set(versions) - kept:
            self._file(old).unlink(missing_ok=True)
            map_path(self._file(old)).unlink(missing_ok=True)

    def current(self, accept: Callable[[CatalogueVersion], object] | None = None) -> CatalogueVersion:
        """The newest version that loads and is accepted; one look at the folder unless there is a new one.

        A newer one that is damaged or not accepted is refused for good, logged and entered in :attr:`refused`: the
        version at hand, or the next older one on disk, goes on. The answer never goes back to an older version than
        before.

        Args:
            accept: is called with each newer version in turn, the newest first, and raises what speaks against it.
                A MemoryError is no reason and passes through, as does an OSError of a load that lacks file descriptors.

        Raises:
            FileNotFoundError: there is none, or every one was refused.
        """
        with self._loading:
            self._current = self._newest(accept)
            return self._current

    def _newest(self, accept: Callable[[CatalogueVersion], object] | None) -> CatalogueVersion:
        at_hand = self._current
        for version in sorted(self._versions() - self.refused.keys(), reverse=True):
            if at_hand is not None and version <= at_hand.version:
                break
            try:
                names = IdMap.load(self._file(version))  # goes after its index: while that is there, so is the map
                found = CatalogueVersion(version, TrieIndex.load(self._file(version)), names)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and version not in self._versions():
                    return self._newest(accept)  # pruned since the look at the folder: newer ones are there
                if error.errno in _SHORTAGES:
                    raise
                self._refuse(version, error)
                continue
            except ValueError as error:
                self._refuse(version, error)
                continue
            try:
                if accept is not None:
                    accept(found)
            except MemoryError:
                raise
            except Exception as error:  # whatever a model can raise
                self._refuse(version, error)
                continue
            return found
        if at_hand is None:
            why = "".join(f"; {version} is refused: {self.refused[version]}" for version in sorted(self.refused)[-1:])
            raise FileNotFoundError(2, f"no version of a catalogue in this folder{why}", str(self.path))
        return at_hand

    def _refuse(self, version: int, error: Exception) -> None:
        self.refused[version] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        _LOG.error("catalogue version %d is refused: %s", version, self.refused[version])

    def _versions(self) -> set[int]:
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return set()
        return {int(match[1]) for match in map(_NAME.fullmatch, names) if match and self._may_be_file(match[0])}

    def _may_be_file(self, name: str) -> bool:
        """False for a folder, a FIFO and the like; what cannot be told is for the loading to refuse."""
        try:
            return stat.S_ISREG((self.path / name).stat().st_mode)
        except OSError:
            return True

    def _file(self, version: int) -> Path:
        return self.path / f"{version:06}.trie"

    @contextmanager
    def _publishing(self) -> Iterator[None]:
        """One publisher at a time; the kernel opens the lock of one that is killed."""
        # Read and write, so that not even a FIFO of this name makes it wait for its other end.
        with os.fdopen(os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666), "rb+", 0) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in filter(_LEFT.fullmatch, os.listdir(self.path)):
                with suppress(OSError):  # a folder
                    (self.path / name).unlink()
            yield
