"""The front's queue of queries, from which workers take batches."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from raddpo_ext.serve.protocol import Answer, Query, ServiceError


@dataclass(eq=False)
class Ticket:
    """A query in the front process. ``answer`` is cancelled when its request no longer waits."""

    query: Query
    arrived: float
    answer: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    resent: bool = False


class Batcher:
    """A first-in, first-out queue from which idle workers take batches.

    A batch is taken when it is full, or ``max_wait`` seconds after its first query arrived. A query with ``trace`` is a
    batch of its own. The batch of a dead worker is sent again before others and is not mixed with other queries: a
    query that kills its worker affects only the first batch that it was in.
    """

    def __init__(self, max_batch: int, max_wait: float, max_queue: int) -> None:
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self._waiting: dict[Ticket, None] = {}  # in order of arrival
        self._again: deque[list[Ticket]] = deque()
        self._collecting = asyncio.Lock()
        self._filled, self._full = asyncio.Event(), asyncio.Event()

    @property
    def queued(self) -> int:
        return len(self._waiting) + sum(map(len, self._again))

    def submit(self, query: Query) -> Ticket:
        """Add a query to the queue. Raises :class:`ServiceError` if the queue is full."""
        if self.queued >= self.max_queue:
            raise ServiceError(429, "overloaded", f"{self.max_queue} requests are waiting already")
        ticket = Ticket(query, asyncio.get_running_loop().time())
        self._waiting[ticket] = None
        self._signal()
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """Remove a ticket whose request no longer waits. If no worker has it yet, none will get it."""
        ticket.answer.cancel()
        self._waiting.pop(ticket, None)
        again = ([other for other in batch if other is not ticket] for batch in self._again)
        self._again = deque(batch for batch in again if batch)
        self._signal()

    async def take(self, patience: float) -> list[Ticket]:
        """The next batch, or an empty list if none comes within ``patience`` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + patience
        while await _within(self._filled, end - loop.time()):
            async with self._collecting:  # one worker at a time, so that batches fill up
                # Wait for a full batch, but not longer than the first query may wait.
                if not self._again and self._waiting:
                    first = next(iter(self._waiting))
                    await _within(self._full, first.arrived + self.max_wait - loop.time())
                batch = self._pop()
            if batch:
                return batch
        return []

    def send_again(self, batch: list[Ticket]) -> int:
        """Queue the batch of a dead worker again. Queries whose second worker died get an error instead.

        Returns:
            The number of queries that will be sent again.
        """
        lost = ServiceError(503, "worker_lost", "the request's workers died twice")
        for ticket in batch:
            if ticket.resent and not ticket.answer.done():
                ticket.answer.set_exception(lost)
            ticket.resent = True
        again = [ticket for ticket in batch if not ticket.answer.done()]
        if again:
            self._again.append(again)
        self._signal()
        return len(again)

    def _pop(self) -> list[Ticket]:
        """Remove the next batch from the queue; empty if there is none."""
        batch: list[Ticket] = []
        if self._again:
            batch = self._again.popleft()
        else:
            for ticket in list(self._waiting):
                # A traced query neither joins a batch nor is joined.
                if len(batch) == self.max_batch or (batch and ticket.query.trace):
                    break
                batch.append(ticket)
                del self._waiting[ticket]
                if ticket.query.trace:
                    break
        self._signal()
        return batch

    def _signal(self) -> None:
        """Set the events to what the queue holds."""
        for event, there in (
            (self._filled, bool(self._waiting or self._again)),
            (self._full, len(self._waiting) >= self.max_batch or bool(self._again)),
        ):
            if there:
                event.set()
            else:
                event.clear()


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event is set now or within ``seconds``."""
    if not event.is_set() and seconds > 0:
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except asyncio.TimeoutError:
            return event.is_set()
    return event.is_set()
