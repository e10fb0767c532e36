"""Files that are replaced atomically, and files that are regular ones."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a new file that replaces ``path`` atomically: a reader sees the old file or the whole new one.

    The new file is flushed to the disk before it is renamed. If writing fails, the new file is removed, and an OSError
    names ``path``. A writer that is killed leaves ``.<name>.<16 hex digits>`` beside ``path``, which the next writer of
    ``path`` removes.
    """
    _remove_abandoned(path)
    temporary = None
    try:
        # Try names until this writer holds the lock of its own file.
        while True:
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            with open(temporary, "xb") as file:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # shows that its writer is alive
                if not temporary.exists():
                    continue  # another writer removed it before it was locked
                yield file
                # The content must be on the disk before the name points to it.
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
                return
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):  # it does not exist, or the folder is read-only
                temporary.unlink()
        if isinstance(error, OSError) and (error.filename == str(temporary) or _is_of_a_disk(error)):
            error.filename = str(path)
        raise


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading. Does not block on a FIFO.

    Raises:
        ValueError: the path is a FIFO, a device or the like.
        OSError: the path is a folder, or cannot be opened.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115  returned
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{os.fspath(path)}: is not a regular file")
    return file


def mapped_by(path: str | os.PathLike[str]) -> list[int]:
    """Ids of the other processes that have a file mapped into memory, if this process may see that."""
    found = os.stat(path)
    device, inode = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}", str(found.st_ino)
    processes = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{entry}/maps") as maps:
            if int(entry) != os.getpid() and any(line.split(None, 5)[3:5] == [device, inode] for line in maps):
                processes.append(int(entry))
    return sorted(processes)


def _is_of_a_disk(error: OSError) -> bool:
    """Whether the disk made a write fail. Errors that name a file are about another one, which the caller uses."""
    return error.filename is None and error.errno in _OF_DISKS


def _remove_abandoned(path: Path) -> None:
    """Remove the files that killed writers of ``path`` left: those that no process has locked."""
    name = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{16}")
    with suppress(OSError):  # no such folder, or a read-only one: writing will fail
        for entry in filter(name.fullmatch, os.listdir(path.parent)):
            with suppress(OSError), open(path.with_name(entry), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # NFS locks only files opened for writing
                path.with_name(entry).unlink()
