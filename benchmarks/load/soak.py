"""The service under steady load while everything goes wrong around it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import raddpo_ext as rx
from benchmarks.harness.catalogues import ROOT
from benchmarks.load import service as load_service
from benchmarks.load.check import Checker
from benchmarks.load.client import Client, Lost, arrivals, closed_loop, drive, percentile
from benchmarks.load.requests import MAX_BODY, Request, Requests, get, perform
from benchmarks.load.service import BEAMS, SHAPES, Service, serve_command

MODEL, WORKERS, MAX_BATCH = "small", 2, 16
SWAPS, FEW_SWAPS, DAMAGED = 50, 10, 5  # catalogues published, in a short run, damaged ones offered
SHORT = 600.0  # seconds
KILL_SECONDS, SAMPLE_SECONDS = 10.0, 5.0
WRONG_SHARE = 0.1  # of the arrivals
MOST_CONNECTIONS, MOST_ALIVE = 256, 2000
FOLLOWED_FROM = 240.0  # seconds; from here on the oldest worker is spared, so that its memory can be followed
EARLY, LATE = (300.0, 420.0), 120.0  # growth: the mean of the last seconds over that of these
MOST_GROWTH = 0.02
_CAPACITY_SECONDS, _CAPACITY_CLIENTS = 5.0, 32
_SHUTDOWN_SECONDS = 3.0  # of arrivals, the service being told to stop in their middle
_MIB = 2**20


class Soak:
    """One run in ``folder``. Times are seconds from its start."""

    def __init__(self, folder: Path, seconds: float, load: float) -> None:
        self.folder, self.seconds, self.load = folder, seconds, load
        self.planned_swaps = FEW_SWAPS if seconds < SHORT else SWAPS
        self.source, self.catalogues = load_service.make_catalogues()
        self.checker = Checker({name: catalogue.sids for name, catalogue in self.catalogues.items()})
        self.requests = Requests(SHAPES[MODEL], self.catalogues, seed=0)
        self.latencies = array("d")  # of the right requests with an answer
        self.samples: list[dict[str, float]] = []
        self.kills = self.swaps = self.refused = 0
        self.followed: int | None = None
        self.stopped = False  # the service was told to
        self.random = Random(1)
        self.store = rx.CatalogueStore(folder / "store")

    def run(self) -> dict[str, Any]:
        load_service.make_model(SHAPES[MODEL]).save_pretrained(self.folder / "model")
        for name, catalogue in self.catalogues.items():
            catalogue.index.save(self.folder / f"{name}.trie")
        asyncio.run(self._publish_next())
        shared = set(os.listdir("/dev/shm"))
        options = ["--workers", str(WORKERS), "--max-batch", str(MAX_BATCH), "--max-body", str(MAX_BODY)]
        options += ["--beam-width", str(BEAMS)]
        self.service = Service(serve_command(self.folder / "model", self.store.path, *options), self.folder)
        try:
            result = asyncio.run(self._under_load())
        finally:
            if self.service.process.poll() is None:
                self.service.kill()
        result["left_behind"] = sorted(set(os.listdir("/dev/shm")) - shared) + os.listdir(self.service.temporary)
        result["tracebacks"] = tracebacks(self.service.log.read_text())
        return result | {"failures": failures(result)}

    async def _under_load(self) -> dict[str, Any]:
        self.client = Client("127.0.0.1", self.service.port, MOST_CONNECTIONS)
        capacity = await self._capacity()
        rate = self.load * capacity
        print(f"capacity {capacity:.0f}/s, load {rate:.0f}/s for {self.seconds:.0f} s", flush=True)
        self.start = time.perf_counter()
        around = [asyncio.ensure_future(task) for task in (self._publish(), self._kill(), self._sample())]
        own = time.process_time()
        left_out = await drive(arrivals(rate, self.seconds, seed=2), self._fire, MOST_ALIVE)
        own = (time.process_time() - own) / self.seconds
        await asyncio.gather(*around)
        metrics = await self._metrics()
        exit_code, left = await self._shutdown(rate)
        self.client.close()
        return {
            "catalogue": self.source,
            "model": MODEL,
            "workers": WORKERS,
            "max_batch": MAX_BATCH,
            "seconds": self.seconds,
            "capacity": capacity,
            "rate": rate,
            "left_out": left_out,
            "generator_cores": own,
            "kills": self.kills,
            "planned_swaps": self.planned_swaps,
            "swaps": self.swaps,
            "damaged_refused": self.refused,
            "answers": self.checker.by_kind(),
            "problems": dict(self.checker.problems),
            "examples": self.checker.examples,
            "latency_ms": {f"p{share}": 1000 * percentile(self.latencies, share) for share in (50, 99, 99.9, 100)},
            "metrics": metrics,
            "growth": {
                name: growth([(sample["seconds"], sample[name]) for sample in self.samples if name in sample])
                for name in ("front", "all", "followed")
            },
            "most_mapped_versions": max(sample["mapped_versions"] for sample in self.samples),
            "minutes": by_minute(self.samples),
            "exit_code": exit_code,
            "processes_left": left,
        }

    async def _capacity(self) -> float:
        answered = 0

        async def ask(number: int) -> None:
            nonlocal answered
            await self._send(self.requests.right())
            answered += 1

        await closed_loop(_CAPACITY_CLIENTS, 1.0, ask)
        answered, start = 0, time.perf_counter()
        await closed_loop(_CAPACITY_CLIENTS, _CAPACITY_SECONDS, ask)
        return answered / (time.perf_counter() - start)

    async def _fire(self, number: int, due: float) -> None:
        wrong = self.random.random() < WRONG_SHARE
        answered = await self._send(self.requests.wrong() if wrong else self.requests.right())
        if answered and not wrong:
            self.latencies.append(time.perf_counter() - due)

    async def _send(self, request: Request) -> bool:
        """Whether it was answered with 200. Every request ends here, and is checked."""
        oldest, stopped = 0, True

        def sent() -> None:
            nonlocal oldest, stopped
            oldest, stopped = self.checker.newest, self.stopped

        try:
            reply = await perform(self.client, request, sent)
        except (Lost, OSError) as error:
            if stopped and self.stopped:
                self.checker.unanswered("after SIGTERM")
            else:
                self.checker.lost(request.expected.kind, f"{type(error).__name__}: {error}")
            return False
        if reply is None:
            self.checker.unanswered(request.expected.kind)
            return False
        self.checker.answered(request.expected, oldest, reply)
        return reply.status == 200

    async def _publish(self) -> None:
        """The two catalogues in turn, and between them damaged files, which must change nothing."""
        between = self.planned_swaps // DAMAGED
        for number in range(self.planned_swaps):
            await self._until(self.seconds * (number + 0.5) / self.planned_swaps)
            if number % between == 0:
                await self._offer_damaged(number // between)
            await self._publish_next(by_command=number % 5 == 0)
            self.swaps += 1

    async def _publish_next(self, by_command: bool = False) -> None:
        version = self.store.version + 1
        name = ("even", "odd")[version % 2]
        self.checker.announce(version, name)
        file = self.folder / f"{name}.trie"
        if by_command:
            assert await self._command(file) == 0
        else:
            assert await asyncio.to_thread(self.store.publish, file) == version
        self.checker.published(version)

    async def _offer_damaged(self, number: int) -> None:
        good, bad = (self.folder / "even.trie").read_bytes(), self.folder / "damaged.trie"
        middle = len(good) // 2
        flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
        bad.write_bytes((good[:-1], flipped, b"", good[8:], good + b"\0")[number % 5])
        before = sorted(os.listdir(self.store.path))
        refused = await self._command(bad) == 2
        try:
            await asyncio.to_thread(self.store.publish, bad)
            refused = False
        except ValueError:
            self.refused += refused and sorted(os.listdir(self.store.path)) == before

    async def _command(self, file: Path) -> int:
        command = ["-m", "raddpo_ext", "index", "publish", str(file), "--store", str(self.store.path)]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return await process.wait()

    async def _kill(self) -> None:
        """A worker every ten seconds, whatever it is at; none when there is only the followed one."""
        await self._every(KILL_SECONDS, self._kill_one)

    def _kill_one(self, seconds: float) -> None:
        workers = self.service.workers()
        if seconds >= FOLLOWED_FROM and self.followed is None:
            self.followed = workers[0]
        victims = [pid for pid in workers if pid != self.followed]
        if victims:
            os.kill(self.random.choice(victims), signal.SIGKILL)
            self.kills += 1

    async def _sample(self) -> None:
        await self._every(SAMPLE_SECONDS, self._sample_now)

    def _sample_now(self, seconds: float) -> None:
        front, workers = self.service.pid, self.service.workers()
        sizes = {pid: size for pid in (front, *workers) if (size := load_service.memory(pid))}
        sample = {
            "seconds": seconds,
            "front": sizes[front]["Rss"] / _MIB,
            "all": sum(size["Rss"] for size in sizes.values()) / _MIB,
            "all_pss": sum(size["Pss"] for size in sizes.values()) / _MIB,
            "front_open_files": load_service.open_files(front),
            "mapped_versions": max((load_service.mapped_versions(pid) for pid in workers), default=0),
        }
        if self.followed in sizes:
            sample["followed"] = sizes[self.followed]["Rss"] / _MIB
        self.samples.append(sample)

    async def _every(self, period: float, act: Callable[[float], None]) -> None:
        moment = period
        while moment <= self.seconds:
            await self._until(moment)
            act(moment)
            moment += period

    async def _until(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, self.start + seconds - time.perf_counter()))

    async def _metrics(self) -> dict[str, float]:
        reply = await self.client.request(get("/metrics"))
        pattern = r"^raddpo_(\w+?)(?:_total)? ([0-9.e+]+)$"
        return {name: float(value) for name, value in re.findall(pattern, reply.body.decode(), re.MULTILINE)}

    async def _shutdown(self, rate: float) -> tuple[int | None, list[int]]:
        """SIGTERM in the middle of requests: its exit code, and processes that are still there."""
        pids = [self.service.pid, *self.service.workers()]

        async def fire(number: int, due: float) -> None:
            await self._send(self.requests.right())

        async def stop() -> int:
            await asyncio.sleep(_SHUTDOWN_SECONDS / 2)
            self.stopped = True
            return await asyncio.to_thread(self.service.stop)

        stopping = asyncio.ensure_future(stop())
        await drive(arrivals(rate, _SHUTDOWN_SECONDS, seed=3), fire, MOST_ALIVE)
        code = await stopping
        return code, [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def tracebacks(log: str) -> list[str]:
    """Their last frame and the error."""
    found = re.findall(r"^Traceback .*\n(?:[ \t].*\n)*  File (.*\n(?:    .*\n)+\S.*)$", log, re.MULTILINE)
    return [" ".join(text.split()) for text in found]


def growth(samples: list[tuple[float, float]]) -> float | None:
    """Of ``(seconds, size)``: the mean of the last two minutes over that of minutes 5 to 7, less one."""
    if not samples or samples[-1][0] < EARLY[1] + LATE:
        return None
    early = mean(size for seconds, size in samples if EARLY[0] <= seconds < EARLY[1])
    late = mean(size for seconds, size in samples if seconds > samples[-1][0] - LATE)
    return late / early - 1


def by_minute(samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """The mean of each minute's samples, by what was sampled."""
    names = list(samples[-1]) if samples else []
    minutes = range(int(samples[-1]["seconds"] // 60) + 1) if samples else range(0)
    table: dict[str, list[float]] = {}
    for name in names:
        groups = [[s[name] for s in samples if s["seconds"] // 60 == minute and name in s] for minute in minutes]
        table[name] = [round(mean(group), 2) for group in groups if group]
    return table


def failures(result: dict[str, Any]) -> list[str]:
    """What was required and is not so."""
    found = [f"{count} times: {name}" for name, count in result["problems"].items()]
    required = {"exit_code": 0, "processes_left": [], "swaps": result["planned_swaps"], "damaged_refused": DAMAGED}
    found += [f"{name} is {result[name]}, not {right}" for name, right in required.items() if result[name] != right]
    for name in ("left_behind", "tracebacks", "left_out"):
        if result[name]:
            found.append(f"{name}: {result[name]}")
    for name in ("front", "followed"):
        if (result["growth"][name] or 0) >= MOST_GROWTH:
            found.append(f"growth of {name} is {result['growth'][name]:.2%}")
    return found
