"""Files that are there whole or not at all, and files that are files."""

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
    """A new file that takes the place of ``path`` once it is written: a reader sees the old file or the whole new one.

    It is on the disk before it has the name. If writing fails, nothing of it is left, and an OSError names ``path``. A
    writer that is killed leaves ``.<name>.<16 hex digits>`` beside it, which the next writer of ``path`` removes.
    """
    _remove_abandoned(path)
    temporary = None
    try:
        while True:
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            with open(temporary, "xb") as file:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # tells that its writer lives
                if not temporary.exists():
                    continue  # another writer found it before it was locked
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
                return
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):  # not there, or the folder may not be changed
                temporary.unlink()
        if isinstance(error, OSError) and (error.filename == str(temporary) or _is_of_a_disk(error)):
            error.filename = str(path)
        raise


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file to be read; never waits, as opening a FIFO would.

    Raises:
        ValueError: it is a FIFO, a device or the like.
        OSError: it is a folder, or cannot be opened.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115  returned
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{os.fspath(path)}: is no regular file")
    return file


def mapped_by(path: str | os.PathLike[str]) -> list[int]:
    """Ids of the other processes that have a file mapped into memory, as far as this one may see them."""
    found = os.stat(path)
    device, inode = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}", str(found.st_ino)
    processes = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{entry}/maps") as maps:
            if int(entry) != os.getpid() and any(line.split(None, 5)[3:5] == [device, inode] for line in maps):
                processes.append(int(entry))
    return sorted(processes)


def _is_of_a_disk(error: OSError) -> bool:
    """Whether a write that names no file failed so; what else the caller meets while it writes is not about ours."""
    return error.filename is None and error.errno in _OF_DISKS


def _remove_abandoned(path: Path) -> None:
    """Removes what killed writers of ``path`` left: files that no process has locked."""
    name = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{16}")
    with suppress(OSError):  # no such folder, or none that may be changed: the writing will tell
        for entry in filter(name.fullmatch, os.listdir(path.parent)):
            with suppress(OSError), open(path.with_name(entry), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # on NFS only of a file that may be written
                path.with_name(entry).unlink()
