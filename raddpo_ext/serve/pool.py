"""The front's workers. Each takes batches from the queue, and is replaced when it dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from raddpo_ext.serve.batcher import Batcher, Ticket
from raddpo_ext.serve.config import ServeConfig
from raddpo_ext.serve.process import WorkerDied, WorkerProcess
from raddpo_ext.serve.protocol import Answers, Hello, Limits
from raddpo_ext.serve.telemetry import Telemetry

_PATIENCE = 1.0  # seconds without a query before a worker gets an empty batch, so that it looks for a new catalogue
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0  # seconds before a worker that failed to start is restarted
StartWorker = Callable[[ServeConfig], Awaitable[WorkerProcess]]
_LOG = logging.getLogger(__name__)


class StartError(Exception):
    """The service cannot start, for the reason that a worker gave."""


class Pool:
    """``config.workers`` processes and their batches.

    The batch of a dead worker goes back to the queue, and the worker is restarted: at once, or after a growing delay
    while it keeps dying before it is ready.
    """

    def __init__(
        self,
        config: ServeConfig,
        batcher: Batcher,
        telemetry: Telemetry,
        start: StartWorker = WorkerProcess.start,
    ) -> None:
        self.config, self.batcher, self.telemetry = config, batcher, telemetry
        self.limits: Limits | None = None
        self.in_flight = 0
        #: The catalogue version of each ready worker, by slot.
        self.versions: dict[int, int] = {}
        #: Why a worker could not start, by slot, until a worker is ready there.
        self.failures: dict[int, str] = {}
        #: The newer catalogue version that a ready worker refused, and why, by slot.
        self.refused: dict[int, str] = {}
        self._start = start
        self._keepers: list[asyncio.Task[None]] = []
        self._change = asyncio.Event()
        self._failure: str | None = None
        self._stopping = False  # because wait_for can swallow a cancellation before Python 3.12

    @property
    def ready(self) -> int:
        """Number of workers that take queries."""
        return len(self.versions)

    @property
    def version(self) -> int:
        """The newest version that every ready worker has reached; 0 if no worker is ready."""
        return min(self.versions.values(), default=0)

    async def start(self) -> None:
        """Start the workers, and wait until all of them are ready.

        Raises:
            StartError: one of them cannot serve what the options name.
        """
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in range(self.config.workers)]
        while self.ready < self.config.workers:
            await self._change.wait()
            self._change.clear()
            if self._failure is not None:
                raise StartError(self._failure)

    async def stop(self) -> None:
        """End all workers, even busy ones."""
        self._stopping = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _keep(self, slot: int) -> None:
        """Keep a worker running in this slot until the pool stops."""
        failures = 0
        while not self._stopping:
            worker = None
            try:
                worker = await self._start(self.config)
                await self._use(slot, worker)
            except Exception as error:
                # A worker that dies before it is ready delays its next start, longer each time.
                was_ready = slot in self.versions
                if not was_ready:
                    self.failures.setdefault(slot, "it died before it was ready")
                failures = 0 if was_ready else failures + 1
                unexpected = None if isinstance(error, WorkerDied) else error
                _LOG.error("worker %d died%s", slot, "" if was_ready else " before it was ready", exc_info=unexpected)
            finally:
                self.versions.pop(slot, None)
                self.refused.pop(slot, None)
                if worker is not None:
                    await worker.stop()
            self.telemetry.restarts.inc()
            if failures and not self._stopping:
                await asyncio.sleep(min(_FIRST_DELAY * 2 ** (failures - 1), _LONGEST_DELAY))

    async def _use(self, slot: int, worker: WorkerProcess) -> None:
        """Feed one worker until it dies or the pool stops."""
        # Wait until it has loaded the model, or says why it cannot.
        hello = await worker.hello()
        if hello.failure is not None:
            self._failure = self.failures[slot] = hello.failure
            self._change.set()
            raise WorkerDied
        self.limits = hello.limits
        self.failures.pop(slot, None)
        self._report(slot, hello)
        self._change.set()
        while not self._stopping:
            # An empty batch is asked too: the worker then looks for a newer catalogue.
            batch = await self.batcher.take(_PATIENCE)
            self.in_flight += len(batch)
            try:
                answers = await worker.ask([ticket.query for ticket in batch], self.config.worker_timeout_s)
                self._report(slot, answers)
                self._deliver(batch, answers)
            except Exception:
                self.telemetry.resent.inc(self.batcher.send_again(batch))
                raise
            finally:
                self.in_flight -= len(batch)

    def _report(self, slot: int, words: Hello | Answers) -> None:
        """Note the version that a worker serves, and the one that it refused."""
        self.versions[slot] = words.version
        self.telemetry.saw_version(words.version)
        if words.refused is None:
            self.refused.pop(slot, None)
        else:
            self.refused[slot] = words.refused

    def _deliver(self, batch: list[Ticket], answers: Answers) -> None:
        """Hand out the answers of a batch, except to requests that no longer wait."""
        if batch:
            self.telemetry.batch_size.observe(len(batch))
        for ticket, answer in zip(batch, answers.answers, strict=True):
            if not ticket.answer.done():
                ticket.answer.set_result(answer)
