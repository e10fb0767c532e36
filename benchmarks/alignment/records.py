"""Cells of an experiment: each is computed once and kept, a line of one file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import results
from benchmarks.harness.report import environment
from raddpo_ext._files import replacing


class Cell(NamedTuple):
    """What is computed: ``kind`` is a method of the lab, ``args`` its arguments."""

    name: str
    kind: str
    args: dict[str, Any]


class Records:
    """Runs cells and keeps their records; a lab adds a method per kind of cell.

    Args:
        cache: for what is computed on the way, such as checkpoints.
        results: a jsonl file.
        run: the name of the run in it.
        module: the command's module.
    """

    def __init__(self, cache: Path, results: Path, run: str, module: str) -> None:
        self.cache, self.results, self._run, self._module = cache, results, run, module
        self._read: tuple[Any, dict[str, dict[str, Any]]] = (None, {})

    def config(self, cell: Cell) -> dict[str, Any]:
        """Everything that the cell's result depends on."""
        raise NotImplementedError

    def run(self, cell: Cell) -> dict[str, Any]:
        """The cell's record: read where it is there and of the same configuration, else computed and written."""
        config = json.loads(json.dumps(self.config(cell)))
        known = self.read(cell)
        if known is not None and known["config"] == config:
            return known
        _reset_peak_memory()
        begin, cpu = time.perf_counter(), time.process_time()
        result = getattr(self, cell.kind)(**cell.args)
        record = {
            "cell": cell.name,
            "config": config,
            "result": result,
            "seconds": round(time.perf_counter() - begin, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "peak_mib": _peak_memory(),
        }
        self.write(record)
        return record

    def read(self, cell: Cell) -> dict[str, Any] | None:
        return self._records().get(cell.name)

    def write(self, record: dict[str, Any]) -> None:
        """Puts it in its former's place, or at the end; one process at a time."""
        self.cache.mkdir(parents=True, exist_ok=True)
        with (self.cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = self._records() | {record["cell"]: record}
            run = environment(self._module) | {"results": list(records.values())}
            results.write(self.results, {self._run: run})

    def _records(self) -> dict[str, dict[str, Any]]:
        """Read again only when the file is another one: every write replaces it."""
        stat = self.results.stat() if self.results.exists() else None
        version = stat and (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if version is None or version != self._read[0]:
            known = results.read(self.results).get(self._run, {"results": []})
            self._read = version, {record["cell"]: record for record in known["results"]}
        return self._read[1]

    def file(self, kind: str, config: dict[str, Any]) -> Path:
        """Of the cache."""
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        return self.cache / f"{kind}-{digest}.pt"

    def cached(self, kind: str, config: dict[str, Any], make: Callable[[], Any]) -> Any:
        path = self.file(kind, config)
        if not path.exists():
            save(path, make())
        return torch.load(path, weights_only=True)


def compute(lab: Records, cells: list[Cell], jobs: int) -> None:
    """Runs the cells in order, or in ``jobs`` processes of one thread each."""
    begin = time.perf_counter()
    if jobs == 1:
        _follow(map(lab.run, cells), len(cells), begin)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker, initargs=(lab,)) as pool:
        futures = [pool.submit(_in_worker, cell) for cell in cells]
        _follow((future.result() for future in as_completed(futures)), len(cells), begin)


def _follow(records: Iterator[dict[str, Any]], count: int, begin: float) -> None:
    for number, record in enumerate(records, 1):
        result, seconds = record["result"], time.perf_counter() - begin
        score = f"NDCG@10 {result['ndcg@10']:.5f}, " if "ndcg@10" in result else ""
        print(f"{seconds:6.0f} s  {number}/{count}  {record['cell']}: {score}{record['seconds']:.0f} s", flush=True)


_lab: Records  # of a worker process; it keeps its data from one cell to the next


def _start_worker(lab: Records) -> None:
    global _lab
    torch.set_num_threads(1)
    _lab = lab


def _in_worker(cell: Cell) -> dict[str, Any]:
    return _lab.run(cell)


def save(path: Path, state: Any) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(state, file)


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):  # where it cannot be set back, the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """MiB that the process held at most."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))
