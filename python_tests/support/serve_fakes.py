"""For the service's tests: a clock that jumps, workers without a process, and an index whose items tell its version."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np

import raddpo_ext as rx
from raddpo_ext.serve.config import ServeConfig
from raddpo_ext.serve.process import WorkerDied
from raddpo_ext.serve.protocol import Answer, Answers, Hello, Limits, Query

LIMITS = Limits(vocab_size=40, longest_prompt=20)


class _JumpingLoop(asyncio.SelectorEventLoop):
    """Its time stands still while there is something to do and then jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        select = self._selector.select

        def jump(timeout: float | None) -> Any:
            assert timeout is not None, "everybody waits, and for nothing"
            self.now += timeout
            return select(0)

        self._selector.select = jump

    def time(self) -> float:
        return self.now


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine on a clock that jumps: seconds cost nothing, and timers fire in their exact order."""
    loop = _JumpingLoop()
    try:
        return loop.run_until_complete(main)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def now() -> float:
    return asyncio.get_running_loop().time()


def echo(queries: list[Query], version: int = 1) -> Answers:
    """Answers that repeat the prompts."""
    return Answers(version, [Answer(200, json.dumps(query.input_ids).encode()) for query in queries])


Script = Callable[[list[Query]], Awaitable[Answers]]


class FakeWorkers:
    """Starts workers that answer by ``script``, and keeps what each of them was sent and when it was started."""

    def __init__(self, script: Script, hello: Callable[[int], Hello] = lambda number: Hello(1, LIMITS)) -> None:
        self.script, self.hello = script, hello
        self.sent: list[list[list[Query]]] = []
        self.started: list[float] = []
        self.stopped = 0

    async def start(self, config: ServeConfig) -> _FakeWorker:
        self.sent.append([])
        self.started.append(now())
        return _FakeWorker(self, len(self.sent) - 1)

    @property
    def batches(self) -> list[list[list[int] | None]]:
        """The prompts of every batch that was not empty, worker by worker."""
        return [[query.input_ids for query in batch] for worker in self.sent for batch in worker if batch]


class _FakeWorker:
    def __init__(self, workers: FakeWorkers, number: int) -> None:
        self.workers, self.number = workers, number

    async def hello(self) -> Hello:
        return self.workers.hello(self.number)

    async def ask(self, queries: list[Query], timeout: float) -> Answers:
        self.workers.sent[self.number].append(queries)
        try:
            return await asyncio.wait_for(self.workers.script(queries), timeout)
        except asyncio.TimeoutError:
            raise WorkerDied from None

    async def stop(self) -> None:
        self.workers.stopped += 1


def make_config(tmp_path: Path, **options: Any) -> ServeConfig:
    (tmp_path / "config.json").write_text("{}")
    return ServeConfig(model=tmp_path, **options)


def make_index(number: int, items: int = 60) -> rx.TrieIndex:
    """Items ``1000 * number + i``; the same SIDs for every number, some of them of two items. Tokens from 10 up."""
    sids = np.random.default_rng(0).integers(0, 8, (items, 3))
    sids[1] = sids[0]
    vocab = rx.SIDVocab([8, 8, 8], offset=10)
    return rx.TrieIndex.build(sids, item_ids=1000 * number + np.arange(items), vocab=vocab)
