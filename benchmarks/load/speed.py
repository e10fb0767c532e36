"""How fast the service is: latency against the offered rate, with batches and without, and the search by itself."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import raddpo_ext as rx
from benchmarks.load.client import Client, Lost, arrivals, closed_loop, drive, percentile
from benchmarks.load.requests import post
from benchmarks.load.service import BEAMS, SHAPES, Catalogue, Service, cpu_seconds, make_model, prompts, serve_command

SHARES = (0.3, 0.5, 0.7, 0.8, 0.9)  # of the closed-loop throughput, offered
CLIENTS = (1, 4, 16, 64)  # of the closed loop
BOUND_MS = {"small": 100.0, "large": 1000.0}  # on p99: a rate is held below it
SECONDS = {"small": (2.0, 5.0), "large": (4.0, 10.0)}  # of each closed loop, of each rate
BATCH = 16
MOST_CONNECTIONS, MOST_ALIVE = 256, 1000
_PROMPTS = 64
TOP_K = 10


@dataclass(frozen=True)
class Case:
    model: str
    max_batch: int
    workers: int

    @property
    def name(self) -> str:
        return f"{self.model}, {self.workers} worker{'s' * (self.workers > 1)}, max-batch {self.max_batch}"


CASES = [Case(model, batch, workers) for model in SHAPES for batch in (1, BATCH) for workers in (1, 2)]


class Meter:
    """Requests to one service, and what came of them."""

    def __init__(self, service: Service, asked: Sequence[list[int]]) -> None:
        self.client = Client("127.0.0.1", service.port, MOST_CONNECTIONS)
        self.workers = service.workers()
        self.front = service.pid
        bodies = [json.dumps({"input_ids": prompt, "top_k": TOP_K}).encode() for prompt in asked]
        self._requests = [post(body) for body in bodies]
        self.latencies, self.late = array("d"), array("d")
        self.others = 0  # than 200

    async def ask(self, number: int) -> None:
        await self.fire(number, time.perf_counter())

    async def fire(self, number: int, due: float) -> None:
        self.late.append(time.perf_counter() - due)
        try:
            reply = await self.client.request(self._requests[number % len(self._requests)])
        except (Lost, OSError):
            self.others += 1
            return
        if reply.status == 200:
            self.latencies.append(time.perf_counter() - due)
        else:
            self.others += 1

    async def closed(self, clients: int, seconds: float) -> dict[str, Any]:
        """As fast as so many clients can who wait for each answer."""
        return await self._measured(closed_loop(clients, seconds, self.ask)) | {"clients": clients}

    async def offered(self, rate: float, seconds: float, bound_ms: float) -> dict[str, Any]:
        """Poisson arrivals at ``rate`` a second."""
        found = await self._measured(drive(arrivals(rate, seconds, seed=int(rate)), self.fire, MOST_ALIVE))
        held = not found["others"] and not found["left_out"] and found.get("p99", math.inf) <= bound_ms
        return found | {"rate": rate, "held": held}

    async def _measured(self, load: Any) -> dict[str, Any]:
        self.latencies, self.late, self.others = array("d"), array("d"), 0
        groups = {"front": [self.front], "workers": self.workers, "generator": [os.getpid()]}
        before = {name: cpu_seconds(pids) for name, pids in groups.items()}
        start = time.perf_counter()
        left_out = await load
        seconds, answers = time.perf_counter() - start, max(1, len(self.latencies))
        found: dict[str, Any] = {"throughput": len(self.latencies) / seconds}
        found |= {"answers": len(self.latencies), "others": self.others, "left_out": left_out or 0}
        for share in (50, 99, 99.9):
            if self.latencies:
                found[f"p{share}"] = 1000 * percentile(self.latencies, share)
        if self.late:
            found["late_p99"] = 1000 * percentile(self.late, 99)
        found["cpu_ms"] = {name: 1000 * (cpu_seconds(pids) - before[name]) / answers for name, pids in groups.items()}
        return found


def measure(case: Case, folder: Path, quick: bool) -> dict[str, Any]:
    """One service, ``folder`` holding its ``model`` and ``store``, from start to stop."""
    options = ["--workers", str(case.workers), "--max-batch", str(case.max_batch), "--beam-width", str(BEAMS)]
    service = Service(serve_command(folder / case.model, folder / "store", *options), folder)
    try:
        return {"case": case.name, **asdict(case), **asyncio.run(_measure(case, service, quick))}
    finally:
        service.stop()


async def _measure(case: Case, service: Service, quick: bool) -> dict[str, Any]:
    meter = Meter(service, prompts(_PROMPTS, seed=0))
    closed_seconds, open_seconds = (0.5, 1.0) if quick else SECONDS[case.model]
    await meter.closed(CLIENTS[-1], closed_seconds / 2)
    closed = [await meter.closed(clients, closed_seconds) for clients in CLIENTS]
    most = max(run["throughput"] for run in closed)
    offered = [await meter.offered(share * most, open_seconds, BOUND_MS[case.model]) for share in SHARES]
    meter.client.close()
    highest = max((run["rate"] for run in offered if run["held"]), default=0.0)
    return {"closed": closed, "offered": offered, "bound_ms": BOUND_MS[case.model], "highest_rate": highest}


def floor(model: str, catalogue: Catalogue, seconds: float) -> dict[str, float]:
    """Milliseconds of ``retrieve`` by itself on one thread, by its batch's size: the same prompts, padded alike."""
    retriever = rx.SIDRetriever(make_model(SHAPES[model]), catalogue.index, beam_width=BEAMS)
    rows = [torch.tensor(prompt) for prompt in prompts(_PROMPTS, seed=0)]
    found = {}
    for size in (1, BATCH):
        batches = []
        for begin in range(0, _PROMPTS, size):
            lengths = torch.tensor([len(row) for row in rows[begin : begin + size]])
            ids = torch.nn.utils.rnn.pad_sequence(rows[begin : begin + size], batch_first=True)
            batches.append((ids, torch.arange(ids.shape[1]) < lengths[:, None]))
        times, end, number = [], time.perf_counter() + seconds, 0
        retriever.retrieve(*batches[0], top_k=TOP_K)
        while time.perf_counter() < end or number < 3:
            start = time.perf_counter()
            retriever.retrieve(*batches[number % len(batches)], top_k=TOP_K)
            times.append(time.perf_counter() - start)
            number += 1
        found[str(size)] = 1000 * median(times)
    return found
