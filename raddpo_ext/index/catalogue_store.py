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
from raddpo_ext.index.id_map import IdMap, move_map
from raddpo_ext.index.store_service import is_running, last_served
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.trie_file import map_path

_NAME = re.compile(r"((?!000000)[0-9]{6}|[1-9][0-9]{6,17})\.trie")
_LAST = 10**18 - 1  # the maximum version
_STAGED = ".publishing."
_LEFT = re.compile(r"\.?\.publishing\.[0-9a-f]{16}(\.idmap)?(\.[0-9a-f]{16})?")  # left by a publisher that was killed
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # shortages of this process, which may be temporary
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CatalogueVersion:
    """One version of a catalogue. A search that uses one from start to end is not affected by newer versions.

    Attributes:
        version: its number in the store, at least 1.
        index: the index, memory-mapped; unmapped when nothing refers to it any more.
        names: ids and titles of the items, or None if it was published without them.

    Example:
        >>> store = rx.CatalogueStore("catalogue")
        >>> version = store.publish(rx.TrieIndex.build([[0, 1], [0, 2]]))
        >>> current = store.current()
        >>> current.version, current.index.num_items, current.names
        (1, 2, None)
    """

    version: int
    index: TrieIndex
    names: IdMap | None = None


class CatalogueStore:
    """Versions of a catalogue on disk, ``000001.trie``, ``000002.trie``, ...: the highest number is the newest.

    Any number of processes may read and publish at the same time. A version gets its final name when it is complete and
    verified, and it never changes. :meth:`publish` keeps the newest ``keep`` versions and deletes older ones. A search
    that holds a deleted version goes on: the file stays mapped. A publisher that is killed leaves the store as it was.

    If a service runs on the store, or ran there last, the newest ``keep`` of the versions that it served are kept too,
    because its model may be unable to serve later ones. Everything else in the folder (a folder or FIFO with a
    version's name, other names) is ignored.

    Args:
        path: the folder, on a local disk; created by the first :meth:`publish`.
        keep: number of versions that :meth:`publish` keeps, at least 1.

    Example:
        >>> store = rx.CatalogueStore("catalogue")
        >>> store.publish(rx.TrieIndex.build([[0, 1], [0, 2]]))
        1
        >>> store.publish(rx.TrieIndex.build([[0, 1], [0, 2], [1, 0]]))
        2
        >>> store.current().index.num_items
        3
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 2) -> None:
        self.path = Path(path)
        self.keep = _check.integer(keep, "keep", 1)
        #: The versions on disk that could not be loaded or that ``accept`` refused, each with the reason.
        self.refused: dict[int, str] = {}
        self._current: CatalogueVersion | None = None
        self._loading = threading.Lock()

    @property
    def version(self) -> int:
        """The number of the newest version on disk; 0 for an empty store."""
        return max(self._versions(), default=0)

    def publish(
        self,
        index: TrieIndex | str | os.PathLike[str],
        *,
        names: IdMap | None = None,
        unless_newest: bool = False,
        force: bool = False,
    ) -> int:
        """Publish an index, or a file that :meth:`TrieIndex.save` wrote, as the newest version.

        The copy in the store gets its name after it is flushed to the disk and its checksum is verified.

        Args:
            index: the index, or its file.
            names: ids and titles of its items. Default: for a file, the map beside it (:meth:`IdMap.save`); else none.
            unless_newest: change nothing if the newest version has the same bytes already.
            force: publish the index even if the model of the running service lacks some of its tokens.

        Returns:
            The number of the version: one more than the newest, or the newest if nothing changed.

        Raises:
            ValueError: the file is not an index, is truncated or is altered, or the model of the service that runs on
                this store lacks a token of the index. Nothing has changed.
            OSError: the file cannot be read, or the store cannot be written.
        """
        if not isinstance(index, TrieIndex):
            names = IdMap.load(index) if names is None else names
            index = TrieIndex.load(index)
        self.path.mkdir(exist_ok=True)
        with self._publishing():
            staged = self.path / f"{_STAGED}{secrets.token_hex(8)}"
            try:
                # The files under a staged name, verified before they count.
                index.save(staged)
                TrieIndex.load(staged)
                if names is not None:
                    names.save(staged)
                # Reasons to publish nothing.
                if not force:
                    self._check_tokens(max(index.max_tokens))
                version = self.version
                if unless_newest and self._is_same(staged, version):
                    return version
                # The map gets its name before the index does, so an index is never without its map.
                version = self._next(version)
                move_map(staged, self._file(version))
                os.replace(staged, self._file(version))
            finally:
                staged.unlink(missing_ok=True)
                map_path(staged).unlink(missing_ok=True)
            self._prune()
        return version

    def _check_tokens(self, largest: int) -> None:
        """Raise ValueError for an index that the model of the running service could not serve."""
        served = last_served(self.path)
        if served is not None and largest >= served.vocab_size and is_running(self.path):
            raise ValueError(
                f"index has token id {largest}, but the model of the service that runs on {self.path} has a vocab_size "
                f"of {served.vocab_size}: it could not serve this version; force=True (--force) publishes it anyway"
            )

    def _is_same(self, staged: Path, version: int) -> bool:
        """Whether the newest version has the same bytes, its id map included."""
        with suppress(OSError):  # there is no newest version, or it cannot be read
            newest = self._file(version)
            ours, theirs = map_path(staged), map_path(newest)
            same = ours.exists() == theirs.exists() and (not ours.exists() or filecmp.cmp(ours, theirs, shallow=False))
            return same and filecmp.cmp(staged, newest, shallow=False)
        return False

    def _next(self, version: int) -> int:
        """The first number after ``version`` whose file name is free."""
        version += 1
        while os.path.lexists(self._file(version)):
            version += 1
        if version > _LAST:
            raise ValueError(f"{self.path}: no version number is left after {_LAST}")
        return version

    def _prune(self) -> None:
        """Remove all versions but the newest ``keep``, and the newest ``keep`` of those that a service has served."""
        versions = sorted(self._versions())
        kept = set(versions[-self.keep :])
        if (served := last_served(self.path)) is not None:
            kept |= set([v for v in versions if v <= served.version and v not in served.refused][-self.keep :])
        for old in set(versions) - kept:
            self._file(old).unlink(missing_ok=True)
            map_path(self._file(old)).unlink(missing_ok=True)

    def current(self, accept: Callable[[CatalogueVersion], object] | None = None) -> CatalogueVersion:
        """The newest version that loads and is accepted. Lists the folder, and loads only newer versions than before.

        A newer version that is damaged or not accepted is refused: logged, entered in :attr:`refused` and never tried
        again. The result is then the version of the last call or, before there is one, the next older version on disk.
        It is never an older version than that of the last call.

        Args:
            accept: called with each newer version, the newest first; raises an exception to refuse it. A MemoryError
                does not refuse the version but passes through, as does the OSError of a load that lacks file
                descriptors or memory.

        Raises:
            FileNotFoundError: the store has no version, or every version was refused.
        """
        with self._loading:
            self._current = self._newest(accept)
            return self._current

    def _newest(self, accept: Callable[[CatalogueVersion], object] | None) -> CatalogueVersion:
        """The newest version that loads and is accepted; else the one at hand."""
        # The newest version first; refused ones are never tried again.
        at_hand = self._current
        for version in sorted(self._versions() - self.refused.keys(), reverse=True):
            if at_hand is not None and version <= at_hand.version:
                break
            try:
                names = IdMap.load(self._file(version))  # removed after its index, so it is there if the index is
                found = CatalogueVersion(version, TrieIndex.load(self._file(version)), names)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and version not in self._versions():
                    return self._newest(accept)  # pruned after the folder was listed: there are newer versions
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
            except Exception as error:  # accept may run a model, which can raise any type
                self._refuse(version, error)
                continue
            return found
        # No newer version serves: keep the one at hand.
        if at_hand is None:
            why = "".join(f"; {version} is refused: {self.refused[version]}" for version in sorted(self.refused)[-1:])
            raise FileNotFoundError(2, f"the store holds no catalogue version{why}", str(self.path))
        return at_hand

    def _refuse(self, version: int, error: Exception) -> None:
        """Log why a version is refused, and remember it."""
        self.refused[version] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        _LOG.error("catalogue version %d is refused: %s", version, self.refused[version])

    def _versions(self) -> set[int]:
        """The numbers of the versions in the folder."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return set()
        return {int(match[1]) for match in map(_NAME.fullmatch, names) if match and self._may_be_file(match[0])}

    def _may_be_file(self, name: str) -> bool:
        """False for a folder, FIFO or the like. True if this cannot be determined: loading then refuses the version."""
        try:
            return stat.S_ISREG((self.path / name).stat().st_mode)
        except OSError:
            return True

    def _file(self, version: int) -> Path:
        return self.path / f"{version:06}.trie"

    @contextmanager
    def _publishing(self) -> Iterator[None]:
        """Lock out other publishers. The kernel releases the lock of a publisher that is killed."""
        # Opened for reading and writing, because that does not block even if the name is that of a FIFO.
        with os.fdopen(os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666), "rb+", 0) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for name in filter(_LEFT.fullmatch, os.listdir(self.path)):
                with suppress(OSError):  # a folder
                    (self.path / name).unlink()
            yield
