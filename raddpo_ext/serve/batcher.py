"""The front's queue: what waits for a worker, and how it becomes batches."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from raddpo_ext.serve.protocol import Answer, Query, ServiceError


@dataclass(eq=False)
class Ticket:
    """A query on its way through the front. ``answer`` is cancelled when nobody waits for it any more."""

    query: Query
    arrived: float
    answer: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    resent: bool = False


class Batcher:
    """First come, first served, in batches that idle workers take.

    A batch leaves when it is full, or ``max_wait`` seconds after its first query came. A query with ``trace`` is a
    batch by itself. What a dead worker left behind goes first, and never together with other queries: one that kills
    its worker takes no more than its first batch along.
    """

    def __init__(self, max_batch: int, max_wait: float, max_queue: int) -> None:
        self.max_batch, self.max_wait, self.max_queue = max_batch, max_wait, max_queue
        self._waiting: dict[Ticket, None] = {}  # in the order of arrival
        self._again: deque[list[Ticket]] = deque()
        self._collecting = asyncio.Lock()
        self._filled, self._full = asyncio.Event(), asyncio.Event()

    @property
    def queued(self) -> int:
        return len(self._waiting) + sum(map(len, self._again))

    def submit(self, query: Query) -> Ticket:
        """Puts a query into the queue; raises :class:`ServiceError` when that is full."""
        if self.queued >= self.max_queue:
            raise ServiceError(429, "overloaded", f"{self.max_queue} requests are waiting already")
        ticket = Ticket(query, asyncio.get_running_loop().time())
        self._waiting[ticket] = None
        self._signal()
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """Forgets a ticket that nobody waits for: no worker is sent it if none was yet."""
        ticket.answer.cancel()
        self._waiting.pop(ticket, None)
        again = ([other for other in batch if other is not ticket] for batch in self._again)
        self._again = deque(batch for batch in again if batch)
        self._signal()

    async def take(self, patience: float) -> list[Ticket]:
        """The next batch, or nothing after ``patience`` seconds in which none came."""
        loop = asyncio.get_running_loop()
        end = loop.time() + patience
        while await _within(self._filled, end - loop.time()):
            async with self._collecting:  # one worker at a time, so that batches fill up
                if not self._again and self._waiting:
                    first = next(iter(self._waiting))
                    await _within(self._full, first.arrived + self.max_wait - loop.time())
                batch = self._pop()
            if batch:
                return batch
        return []

    def send_again(self, batch: list[Ticket]) -> int:
        """Takes back a dead worker's batch; a second time answers its queries with an error.

        Returns:
            How many of its queries will be sent again.
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
        batch: list[Ticket] = []
        if self._again:
            batch = self._again.popleft()
        else:
            for ticket in list(self._waiting):
                if len(batch) == self.max_batch or (batch and ticket.query.trace):
                    break
                batch.append(ticket)
                del self._waiting[ticket]
                if ticket.query.trace:
                    break
        self._signal()
        return batch

    def _signal(self) -> None:
        for event, there in (
            (self._filled, bool(self._waiting or self._again)),
            (self._full, len(self._waiting) >= self.max_batch or bool(self._again)),
        ):
            if there:
                event.set()
            else:
                event.clear()


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event is set, now or within that time."""
    if not event.is_set() and seconds > 0:
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except asyncio.TimeoutError:
            return event.is_set()
    return event.is_set()
