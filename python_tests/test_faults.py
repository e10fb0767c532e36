"""Processes killed while they write, full disks, read-only folders and too little memory: an error that says so, old
files or new ones but no parts, and a process that goes on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raddpo_ext as rx
from benchmarks.harness.report import write_json
from raddpo_ext._files import replacing
from raddpo_ext.data.session_log import write_sessions

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]),
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # or the memory of a thread, 64 MB, is at hand beyond a limit
    "MALLOC_MMAP_THRESHOLD_": "65536",  # or what was freed is
}


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def output_of(script: str, *arguments: object) -> str:
    process = start(script, *arguments)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, (process.returncode, output, errors)
    return output


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Killed while writing. A process that has everything imported forks a writer, lets it write over and over, and kills it
# after some milliseconds.

WRITE_AND_DIE = """
import os, random, signal, sys, time
import numpy as np
import raddpo_ext as rx
from benchmarks.harness.report import write_json
path, kind, seed, kills = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
indexes = [rx.TrieIndex.build(np.random.default_rng(i).integers(0, 200, (60_000, 4))) for i in (0, 1)]

def write(number):
    if kind == "save":
        indexes[number % 2].save(path)
    elif kind == "publish":
        rx.CatalogueStore(path).publish(indexes[number % 2])
    else:
        write_json(__import__("pathlib").Path(path), {"rows": [number % 2] * 100_000})

random.seed(seed)
write(0)
for _ in range(kills):
    child = os.fork()
    if not child:
        for number in range(1_000_000):
            write(number)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(*sorted(os.listdir(path if kind == "publish" else os.path.dirname(path))), flush=True)
"""
KILLS = 25


@pytest.mark.parametrize("kind", ["save", "publish", "result"])
def test_killed_writers_leave_whole_files(tmp_path: Path, kind: str) -> None:
    """Any time: the file is the old one or the new one, and what the killed ones left is gone after the next."""
    path = tmp_path / "written"
    listings = [line.split() for line in output_of(WRITE_AND_DIE, path, kind, 0, KILLS).splitlines()]
    assert len(listings) == KILLS
    known = [rx.TrieIndex.build(np.random.default_rng(i).integers(0, 200, (60_000, 4))).data for i in (0, 1)]

    def check() -> None:
        if kind == "save":
            data = rx.TrieIndex.load(path).data
            assert any(torch.equal(data, index) for index in known)
        elif kind == "publish":
            for file in path.glob("*.trie"):
                data = rx.TrieIndex.load(file).data
                assert any(torch.equal(data, index) for index in known)
            assert rx.CatalogueStore(path).current().version == rx.CatalogueStore(path).version
        else:
            rows = json.loads(path.read_text())["rows"]
            assert rows in ([0] * 100_000, [1] * 100_000)

    check()
    left = [[name for name in listing if name.startswith(".") and name != ".lock"] for listing in listings]
    assert any(left), "no kill fell into the writing: the test has shown nothing"
    assert max(map(len, left)) == 1, "the next writer is to remove what the last one left"
    if kind == "save":
        rx.TrieIndex.build([[1, 2]]).save(path)
    elif kind == "publish":
        rx.CatalogueStore(path, keep=1).publish(rx.TrieIndex.build([[1, 2]]))
        assert len(names(path)) == 2
        return
    else:
        write_json(path, {})
    assert names(tmp_path) == ["written"]


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    """Two that write one path at once: both end, and the last one's file is there."""
    path = tmp_path / "shop.trie"
    with replacing(path) as slow:
        slow.write(b"slow")
        slow.flush()
        with replacing(path) as fast:
            fast.write(b"fast")
        assert path.read_bytes() == b"fast"
        assert len(names(tmp_path)) == 2
    assert path.read_bytes() == b"slow"
    (tmp_path / ".shop.trie.0123456789abcdef").write_bytes(b"left by a dead one")
    (tmp_path / ".shop.trie.backup").write_bytes(b"somebody's own")
    (tmp_path / ".other.trie.0123456789abcdef").write_bytes(b"another file's")
    with replacing(path) as file:
        file.write(b"new")
    assert names(tmp_path) == [".other.trie.0123456789abcdef", ".shop.trie.backup", "shop.trie"]


def test_many_writers_of_one_path(tmp_path: Path) -> None:
    path = tmp_path / "result"

    def write(number: int) -> None:
        for _ in range(50):
            with replacing(path) as file:
                file.write(bytes([number]) * 1000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = path.read_bytes()
    assert len(content) == 1000
    assert content == content[:1] * 1000
    assert names(tmp_path) == ["result"]


# Disks that are full or may not be written.


def writers(folder: Path) -> dict[str, Any]:
    index = rx.TrieIndex.build(np.random.default_rng(0).integers(0, 200, (60_000, 4)))
    rows = [{"prompt_ids": [1] * 100, "positives": [[1, 2]], "negatives": [[3, 4]]}] * 5000
    return {
        "index": lambda: index.save(folder / "index"),
        "catalogue": lambda: rx.CatalogueStore(folder / "store").publish(index),
        "sessions": lambda: write_sessions(folder / "sessions.jsonl", rows),
        "result": lambda: write_json(folder / "result", {"rows": [0] * 200_000}),
    }


def test_full_disk(small_disk: Callable[[int], Path]) -> None:
    """With room for a part of each file: an error that names it, the old one as it was and nothing beside it."""
    disk = small_disk(400_000)
    rx.CatalogueStore(disk / "store").publish(rx.TrieIndex.build([[1, 2]]))
    for name in ("index", "sessions.jsonl", "result"):
        (disk / name).write_bytes(b"old")
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    for name, write in writers(disk).items():
        with pytest.raises(OSError, match=f"No space left on device: '{disk}/(store/.publishing|{name})"):
            write()
        assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    for write in writers(disk).values():
        write()
    assert rx.CatalogueStore(disk / "store").current().version == 2


def test_file_size_limit(tmp_path: Path) -> None:
    """The same without a disk of one's own: a process may write files of so many bytes."""
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from test_faults import writers\n"
        "folder = Path(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "def attempt(name, write):\n"
        "    try: write()\n"
        "    except OSError as error: print(name, error)\n"
        "for name, write in writers(folder).items(): attempt(name, write)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "print(sorted(path.name for path in folder.rglob('*') if path.is_file()))\n"
        "for write in writers(folder).values(): write()\n"
    )
    *lines, left = output_of(script, tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["index", "catalogue", "sessions", "result"]
    assert all(f"File too large: '{tmp_path}/" in line for line in lines), lines
    assert left == "['.lock']"
    assert names(tmp_path) == ["index", "result", "sessions.jsonl", "store"]


def test_read_only_disk(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(20_000_000)
    for write in writers(disk).values():
        write()
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for name, write in writers(disk).items():
        with pytest.raises(OSError, match=f"Read-only file system: '{disk}/(store/.lock|{name})"):
            write()
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
    assert rx.TrieIndex.load(disk / "index").num_items == 60_000
    assert rx.CatalogueStore(disk / "store").current().version == 1
    with pytest.raises(OSError, match=r"Read-only file system: '.*/other'"):
        rx.CatalogueStore(disk / "other").publish(rx.TrieIndex.build([[1, 2]]))


def test_errors_of_the_rows_are_not_of_the_file(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"prompt_ids": [1], "positives": [[1, 2]], "negatives": []}
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(ConnectionResetError) as error:
        write_sessions(tmp_path / "sessions.jsonl", rows())
    assert error.value.filename is None
    assert names(tmp_path) == []


def test_a_folder_that_takes_no_files() -> None:
    """Nobody may make a file in /proc, root no more than others."""
    folder = Path("/proc/self")
    if not folder.is_dir():
        pytest.skip("needs /proc")
    for path, write in (
        ("index", lambda path: rx.TrieIndex.build([[1, 2]]).save(path)),
        ("result", lambda path: write_json(path, {})),
    ):
        with pytest.raises(OSError, match=f"'{folder}/{path}'"):
            write(folder / path)
