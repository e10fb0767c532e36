"""CatalogueStore: atomic versions, hot swaps under running searches, and what is freed when."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import raddpo_ext as rx
from raddpo_ext.index.store_service import StoreService

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def catalogue(number: int, items: int = 40) -> rx.TrieIndex:
    """Items ``1000 * number + i`` under SIDs of three codes, the same ones whatever the number."""
    sids = [[i % 5, i // 5 % 5, i % 7] for i in range(items)]
    return rx.TrieIndex.build(sids, item_ids=[1000 * number + i for i in range(items)])


@pytest.fixture
def store(tmp_path: Path) -> rx.CatalogueStore:
    return rx.CatalogueStore(tmp_path / "catalogue")


def names(store: rx.CatalogueStore) -> list[str]:
    return sorted(os.listdir(store.path))


def mapped(store: rx.CatalogueStore) -> set[str]:
    """Names of the store's files that this process has mapped."""
    return set(re.findall(rf"{re.escape(str(store.path))}/(\S+)", Path("/proc/self/maps").read_text()))


def damage(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.unlink()  # the mapping of a reader keeps the file that it has
    path.write_bytes(content)


def python(script: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, **options)


def test_publish_and_read(store: rx.CatalogueStore, tmp_path: Path) -> None:
    assert store.version == 0
    with pytest.raises(FileNotFoundError, match="the store holds no catalogue version"):
        store.current()
    assert store.publish(catalogue(1)) == 1
    first = store.current()
    assert (first.version, store.version) == (1, 1)
    assert torch.equal(first.index.data, catalogue(1).data)
    assert store.current() is first
    catalogue(2).save(tmp_path / "two.trie")
    assert store.publish(tmp_path / "two.trie") == 2
    assert store.current().version == 2
    assert store.current().index.items.min() == 2000
    assert first.index.items.min() == 1000
    assert (tmp_path / "two.trie").exists()
    assert rx.CatalogueStore(store.path).current().version == 2


def test_the_newest_is_not_published_again(store: rx.CatalogueStore, tmp_path: Path) -> None:
    both = rx.TrieIndex.build([[0, 1], [2, 3]])
    for index, version in ((both, 1), (both, 1), (both.discard([0]), 2), (both, 3)):  # an older one is published
        index.save(tmp_path / "one.trie")
        for given in (index, tmp_path / "one.trie"):
            assert store.publish(given, unless_newest=True) == version
    assert names(store) == [".lock", "000002.trie", "000003.trie"]
    changed = rx.TrieIndex.build([[0, 1], [2, 3]], item_ids=[0, 5])
    assert changed.nbytes == both.nbytes
    assert store.publish(changed, unless_newest=True) == 4
    damage(store.path / "000004.trie")
    assert store.publish(changed, unless_newest=True) == 5
    assert store.publish(changed) == 6


def test_only_the_newest_are_kept(store: rx.CatalogueStore) -> None:
    for number in range(1, 5):
        assert store.publish(catalogue(number)) == number
    assert names(store) == [".lock", "000003.trie", "000004.trie"]
    rx.CatalogueStore(store.path, keep=1).publish(catalogue(5))
    assert names(store) == [".lock", "000005.trie"]
    rx.CatalogueStore(store.path, keep=9).publish(catalogue(6))
    assert names(store) == [".lock", "000005.trie", "000006.trie"]


def test_numbers_beyond_six_digits_are_numbers(store: rx.CatalogueStore) -> None:
    store.publish(catalogue(1))
    os.rename(store.path / "000001.trie", store.path / "999999.trie")
    assert store.publish(catalogue(2)) == 1_000_000
    assert store.publish(catalogue(3)) == 1_000_001
    assert store.current().version == 1_000_001
    assert names(store) == [".lock", "1000000.trie", "1000001.trie"]


def test_bad_arguments(store: rx.CatalogueStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        rx.CatalogueStore(tmp_path, keep=0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        store.publish(tmp_path / "nowhere")
    assert not store.path.exists()


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_file_is_not_published(store: rx.CatalogueStore, tmp_path: Path, cut: bool) -> None:
    store.publish(catalogue(1))
    file = tmp_path / "two.trie"
    catalogue(2).save(file)
    if cut:
        file.write_bytes(file.read_bytes()[:-1])
    else:
        damage(file)
    with pytest.raises(ValueError, match=r"two\.trie: .*altered"):
        store.publish(file)
    broken = catalogue(2)
    broken.data[-5] ^= 1
    with pytest.raises(ValueError, match="altered"):
        store.publish(broken)
    assert names(store) == [".lock", "000001.trie"]
    assert store.current().version == 1


def test_a_version_damaged_on_disk_is_refused(store: rx.CatalogueStore, caplog: pytest.LogCaptureFixture) -> None:
    store.publish(catalogue(1))
    reader = rx.CatalogueStore(store.path)
    at_hand = reader.current()
    store.publish(catalogue(2))
    damage(store.path / "000002.trie")
    for _ in range(3):
        assert reader.current() is at_hand
    assert list(reader.refused) == [2]
    assert "altered" in reader.refused[2]
    assert [record.getMessage()[:30] for record in caplog.records] == ["catalogue version 2 is refused"]
    fresh = rx.CatalogueStore(store.path)
    assert fresh.current().version == 1
    store.publish(catalogue(3))
    assert (reader.current().version, fresh.current().version) == (3, 3)


def test_nothing_but_damage(store: rx.CatalogueStore) -> None:
    store.publish(catalogue(1))
    damage(store.path / "000001.trie")
    os.symlink("nowhere", store.path / "000002.trie")
    with pytest.raises(FileNotFoundError, match="the store holds no catalogue version"):
        store.current()
    assert sorted(store.refused) == [1, 2]


def test_never_back_to_an_older_version(store: rx.CatalogueStore) -> None:
    store.publish(catalogue(1))
    store.publish(catalogue(2))
    newest = store.current()
    (store.path / "000002.trie").unlink()
    assert store.current() is newest


def test_pruned_between_the_look_and_the_opening(store: rx.CatalogueStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = rx.CatalogueStore(store.path, keep=1)
    publisher.publish(catalogue(1))
    load, opened = rx.TrieIndex.load, []

    def late(path: Path) -> rx.TrieIndex:
        opened.append(path.name)
        if len(opened) == 1:
            monkeypatch.setattr(rx.TrieIndex, "load", load)
            publisher.publish(catalogue(2))
            monkeypatch.setattr(rx.TrieIndex, "load", late)
        return load(path)

    monkeypatch.setattr(rx.TrieIndex, "load", late)
    assert store.current().version == 2
    assert opened == ["000001.trie", "000002.trie"]
    assert store.refused == {}


def test_a_version_goes_with_its_last_search(store: rx.CatalogueStore) -> None:
    publisher = rx.CatalogueStore(store.path, keep=1)
    publisher.publish(catalogue(1))
    search = store.current()
    old = weakref.ref(search.index)
    publisher.publish(catalogue(2))
    assert store.current().version == 2
    assert names(store) == [".lock", "000002.trie"]
    assert mapped(store) == {"000001.trie", "000002.trie"}  # the first is deleted, but mapped
    assert search.index.lookup([[0, 0, 0]]).items.tolist() == [1000]
    del search
    gc.collect()
    assert old() is None
    assert mapped(store) == {"000002.trie"}


def test_memory_does_not_grow_with_swaps(store: rx.CatalogueStore) -> None:
    for number in range(1, 30):
        store.publish(catalogue(number))
        assert store.current().version == number
    gc.collect()
    assert mapped(store) == {"000029.trie"}


def test_searches_see_one_version(store: rx.CatalogueStore) -> None:
    """Threads that search while versions are published: every item of an answer is of the version that answered."""
    store.publish(catalogue(1))
    stop = threading.Event()

    def search() -> int:
        seen = set()
        while not stop.is_set():
            version = store.current()
            generator = torch.Generator().manual_seed(version.version)
            found = rx.beam_search(
                lambda tokens, parents, level, g=generator: torch.randn(*tokens.shape, 8, generator=g),
                version.index,
                batch_size=2,
                beam_width=50,
            ).items
            assert found.max() < 1000 * (version.version + 1)
            assert found[found >= 0].min() >= 1000 * version.version
            assert not seen or version.version >= max(seen)
            seen.add(version.version)
        return len(seen)

    with ThreadPoolExecutor(3) as pool:
        searches = [pool.submit(search) for _ in range(3)]
        try:
            for number in range(2, 25):
                rx.CatalogueStore(store.path, keep=1).publish(catalogue(number))
        finally:
            stop.set()
        assert all(search.result() > 1 for search in searches)
    assert store.current().version == 24


def test_concurrent_publishers(store: rx.CatalogueStore) -> None:
    """Threads and processes at once: each publication gets a number of its own, and none is lost."""
    script = (
        "import sys, raddpo_ext as rx\n"
        "store = rx.CatalogueStore(sys.argv[1], keep=100)\n"
        "index = rx.TrieIndex.build([[1, 2]], item_ids=[int(sys.argv[2])])\n"
        "for _ in range(10): print(store.publish(index))\n"
    )
    processes = [python(script, store.path, item) for item in (1, 2)]

    def publish() -> list[int]:
        mine = rx.CatalogueStore(store.path, keep=100)
        return [mine.publish(catalogue(3)) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        numbers = [number for threads in [pool.submit(publish) for _ in range(2)] for number in threads.result()]
    owners = {}
    for item, process in enumerate(processes, 1):
        mine = [int(line) for line in process.communicate()[0].split()]
        assert mine == sorted(mine)
        owners |= dict.fromkeys(mine, item)
    assert sorted([*numbers, *owners]) == list(range(1, 41))
    for number, item in owners.items():
        assert rx.TrieIndex.load(store.path / f"{number:06}.trie").items.tolist() == [item]
    assert len(names(store)) == 41


@pytest.mark.parametrize("moment", ["os.fsync", "os.replace", "os.unlink"])
def test_killed_while_publishing(store: rx.CatalogueStore, moment: str) -> None:
    """A kill before the name, while renaming and while pruning: a whole version or none, and the next one goes on."""
    store.publish(catalogue(1))
    script = (
        "import os, signal, sys, raddpo_ext as rx\n"
        "store = rx.CatalogueStore(sys.argv[1], keep=1)\n"
        "index = rx.TrieIndex.build([[1, 2]])\n"
        "def kill(*_, **__): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{moment} = kill\n"
        "store.publish(index)\n"
    )
    process = python(script, store.path)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert store.current().version == (2 if moment == "os.unlink" else 1)
    for file in store.path.glob("*.trie"):
        rx.TrieIndex.load(file)
    before = store.version
    assert store.publish(catalogue(5)) == before + 1
    assert store.current().index.items.min() == 5000
    assert len(names(store)) == 3  # the lock and two versions, nothing of the one that was killed


def test_processes_share_the_pages(store: rx.CatalogueStore) -> None:
    """The file's pages are once in memory: each of two readers that touched all of them is charged for half."""
    torch.manual_seed(0)
    store.publish(rx.TrieIndex.build(torch.randint(0, 200, (300_000, 4))))
    script = (
        "import sys, raddpo_ext as rx\n"
        "index = rx.CatalogueStore(sys.argv[1]).current().index\n"
        "int(index.data.sum())\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "blocks = open('/proc/self/smaps').read().split('VmFlags')\n"
        "mine = next(block for block in blocks if '000001.trie' in block)\n"
        "fields = {line.split(':')[0]: line.split()[1] for line in mine.splitlines() if line.endswith(' kB')}\n"
        "print(fields['Rss'], fields['Pss'], fields['Private_Dirty'], flush=True)\n"
        "sys.stdin.readline()\n"
    )
    readers = [python(script, store.path, stdin=subprocess.PIPE) for _ in range(2)]
    try:
        for reader in readers:
            assert reader.stdout.readline() == "ready\n"
        for reader in readers:
            reader.stdin.write("\n")
            reader.stdin.flush()
            resident, proportional, dirty = map(int, reader.stdout.readline().split())
            assert resident >= 1000
            assert proportional <= 0.55 * resident
            assert dirty == 0
    finally:
        for reader in readers:
            reader.communicate("\n")


ODD = (
    "²²²²²².trie",
    "\u0660\u0660\u0660\u0660\u0660\u0667.trie",
    "000000.trie",
    "0000009.trie",
    "1" * 250 + ".trie",
    "1" * 19 + ".trie",
    "9.trie",
    "000009.trie.bak",
    "000009.TRIE",
    "-00009.trie",
    "x" * 255,
)


@pytest.mark.parametrize("kind", ["file", "folder", "fifo"])
def test_odd_names_are_passed_over(store: rx.CatalogueStore, kind: str) -> None:
    store.publish(catalogue(1))
    odd = [*ODD, "my.publishing.notes", ".publishing.abc"]
    if kind != "file":
        odd += ["000002.trie", "000005.trie", ".publishing." + "0" * 16]
    for name in odd:
        {"file": Path.touch, "folder": Path.mkdir, "fifo": os.mkfifo}[kind](store.path / name)
    if kind == "fifo":
        odd.remove(".publishing." + "0" * 16)  # as if a publisher had left it
    assert store.version == store.current().version == 1
    numbers = [store.publish(catalogue(number)) for number in range(2, 6)]
    assert numbers == ([2, 3, 4, 5] if kind == "file" else [3, 4, 6, 7])
    assert store.version == store.current().version == numbers[-1]
    assert store.refused == {}
    assert set(names(store)) == {".lock", *odd, *(f"{number:06}.trie" for number in numbers[-2:])}


def test_a_lock_that_is_a_fifo(store: rx.CatalogueStore) -> None:
    store.path.mkdir()
    os.mkfifo(store.path / ".lock")
    assert store.publish(catalogue(1)) == 1


def test_the_last_number(store: rx.CatalogueStore) -> None:
    store.publish(catalogue(1))
    os.rename(store.path / "000001.trie", store.path / f"{10**18 - 2}.trie")
    assert store.publish(catalogue(2)) == 10**18 - 1
    with pytest.raises(ValueError, match="no version number is left after 999999999999999999"):
        store.publish(catalogue(3))
    assert store.current().version == 10**18 - 1


def test_unreadable_versions_are_refused(store: rx.CatalogueStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.publish(catalogue(1))
    os.symlink("000002.trie", store.path / "000002.trie")  # a loop
    assert store.current().version == 1
    assert list(store.refused) == [2]
    store.publish(catalogue(3))

    def load(path: Path) -> rx.TrieIndex:
        raise OSError(24, "Too many open files", str(path))

    with monkeypatch.context() as short:
        short.setattr(rx.TrieIndex, "load", load)
        with pytest.raises(OSError, match="Too many open files"):
            store.current()
    assert store.current().version == 3
    assert list(store.refused) == [2]


def test_versions_that_are_not_accepted(store: rx.CatalogueStore) -> None:
    """The newest that is accepted, tried from the newest on and each once; never back to an older one."""
    keeping = rx.CatalogueStore(store.path, keep=9)
    for number in range(1, 5):
        keeping.publish(catalogue(number))
    tried, bad = [], {3, 4}

    def accept(found: rx.CatalogueVersion) -> None:
        assert found.index.items.min() == 1000 * found.version
        tried.append(found.version)
        if found.version in bad:
            raise ValueError("too deep")

    for _ in range(3):
        assert store.current(accept).version == 2
    assert tried == [4, 3, 2]
    assert store.refused == {3: "too deep", 4: "too deep"}
    for number in (5, 6):
        keeping.publish(catalogue(number))
    bad.add(6)
    for _ in range(3):
        assert store.current(accept).version == 5
    assert tried == [4, 3, 2, 6, 5]

    fresh, shortage = rx.CatalogueStore(store.path), [True]

    def short(found: rx.CatalogueVersion) -> None:
        if shortage:
            raise MemoryError

    with pytest.raises(MemoryError):
        fresh.current(short)
    shortage.clear()
    assert fresh.current(short).version == 6

    def refuse(found: rx.CatalogueVersion) -> None:
        raise RuntimeError(f"not {found.version}")

    with pytest.raises(
        FileNotFoundError, match=r"the store holds no catalogue version.*6 is refused: RuntimeError: not 6"
    ):
        rx.CatalogueStore(store.path).current(refuse)


def kept(store: rx.CatalogueStore) -> list[int]:
    return [int(path.stem) for path in sorted(store.path.glob("*.trie"))]


def test_what_a_service_refuses_is_never_pruned_for(store: rx.CatalogueStore) -> None:
    for number in (1, 2):
        store.publish(catalogue(number))
    service = StoreService(store.path, 100)
    service.tell(2, [])
    for number in (3, 4, 5):
        store.publish(catalogue(number))
        service.tell(2, list(range(3, number + 1)))
        assert kept(store) == {3: [1, 2, 3], 4: [1, 2, 3, 4], 5: [1, 2, 4, 5]}[number]
    store.publish(catalogue(6))
    assert kept(store) == [1, 2, 5, 6]
    service.tell(6, [3, 4, 5])
    store.publish(catalogue(7))
    assert kept(store) == [2, 6, 7]
    service.tell(7, [3, 4, 5])
    store.publish(catalogue(8))
    assert kept(store) == [6, 7, 8]


@pytest.mark.parametrize("stopped", [False, True])
def test_tokens_that_the_services_model_lacks(store: rx.CatalogueStore, stopped: bool) -> None:
    """Refused while a service runs, or forced; counted as refused before a worker has seen them, and after it ended."""
    foreign = rx.TrieIndex.build([[99, 7]])
    store.publish(catalogue(1))
    service = StoreService(store.path, 99)
    service.tell(1, [])
    with pytest.raises(ValueError, match=r"token id 99, .* has a vocab_size of 99: .*force"):
        store.publish(foreign)
    with pytest.raises(ValueError, match="token id 99"):
        store.publish(foreign, unless_newest=True)
    assert kept(store) == [1]
    assert store.publish(rx.TrieIndex.build([[98, 7]])) == 2
    service.tell(2, [])
    if stopped:
        del service
        gc.collect()
    for number in (3, 4, 5):
        assert store.publish(foreign, force=not stopped) == number
    assert kept(store) == [1, 2, 4, 5]
    assert [name for name in names(store) if name.startswith(".")] == [".lock", ".service.json", ".service.lock"]


@pytest.mark.parametrize("record", ["damaged", "list", "fields", "folder", "fifo", "lock"])
def test_odd_records_of_a_service(store: rx.CatalogueStore, record: str, caplog: pytest.LogCaptureFixture) -> None:
    """They tell a publisher nothing, and neither he nor the service waits or fails."""
    store.publish(catalogue(1))
    path = store.path / (".service.lock" if record == "lock" else ".service.json")
    content = {"damaged": '{"vocab', "list": "[1]", "fields": '{"vocab_size": "a", "version": 1, "refused": [1]}'}
    if record in content:
        path.write_text(content[record])
    elif record == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    for number in (2, 3):
        assert store.publish(catalogue(number)) == number
    StoreService(store.path, 99).tell(3, [])
    assert len(caplog.records) == (record in ("folder", "lock"))
    assert kept(store) == [2, 3]


def test_names_are_published_with_their_index(tmp_path):
    """Together, found by the file, pruned together; other titles are another version; none leave none behind."""
    store, file = rx.CatalogueStore(tmp_path / "store"), tmp_path / "shop.trie"
    index = rx.TrieIndex.build([[1, 2], [0, 7]])
    index.save(file)
    rx.IdMap(["A-1", "007"]).save(file)
    assert store.publish(file) == store.publish(file, unless_newest=True) == 1
    assert store.current().names.ids == ["A-1", "007"]
    assert store.publish(index, names=rx.IdMap(["A-1", "007"], ["Hat", "Cap"]), unless_newest=True) == 2
    assert store.current().names.titles == ["Hat", "Cap"]
    (store.path / "000003.trie.idmap").write_text("left by a publisher that was killed")
    assert store.publish(index, unless_newest=True) == 3
    assert store.current().names is None
    assert sorted(path.name for path in store.path.glob("0*")) == ["000002.trie", "000002.trie.idmap", "000003.trie"]
    assert not list(store.path.glob("*publishing*"))
    with pytest.raises(ValueError, match="the id map lacks the item 1"):
        store.publish(index, names=rx.IdMap(["A-1"]))
    assert not list(store.path.glob("*publishing*"))


def test_a_damaged_or_foreign_map_is_refused(tmp_path):
    store, file = rx.CatalogueStore(tmp_path / "store"), tmp_path / "shop.trie"
    index = rx.TrieIndex.build([[1, 2], [0, 7]])
    store.publish(index)
    store.publish(index, names=rx.IdMap(["A-1", "007"]))
    whole = (store.path / "000002.trie.idmap").read_bytes()
    (store.path / "000002.trie.idmap").write_bytes(whole[:-1])
    found = rx.CatalogueStore(store.path)
    assert found.current().version == 1
    assert "000002.trie.idmap: not an id map, truncated or altered" in found.refused[2]
    index.save(file)
    rx.IdMap(["A-1", "007"]).save(file)
    rx.TrieIndex.build([[1, 2], [0, 6]]).save(file)
    with pytest.raises(ValueError, match="the id map belongs to another index"):
        store.publish(file)
    assert store.version == 2
