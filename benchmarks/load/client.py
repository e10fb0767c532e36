"""Open-loop load over HTTP/1.1: Poisson arrivals, kept connections, latency from a request's arrival."""

from __future__ import annotations

import asyncio
import itertools
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import numpy as np

_LENGTH = re.compile(rb"content-length: *([0-9]+)\r\n", re.IGNORECASE)
_CLOSE = re.compile(rb"connection: *close\r\n", re.IGNORECASE)
_IDLE_SECONDS = 2.0  # a kept connection is used again for: well below what the service keeps it
ANSWER_SECONDS = 60.0  # after which a request is lost


class Lost(Exception):
    """The connection ended without a whole answer."""


class Reply(NamedTuple):
    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """One exchange at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._reply: asyncio.Future[Reply] | None = None
        self._status, self._body, self._end = 0, 0, -1  # of the answer that arrives, its positions in the buffer
        self.usable = True
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def expect(self) -> asyncio.Future[Reply]:
        """The answer to what is sent from now on; raises :class:`Lost`."""
        self._reply = asyncio.get_running_loop().create_future()
        if self.transport.is_closing():
            self.connection_lost(None)
        return self._reply

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._end < 0:
            head = self._buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            lines = bytes(self._buffer[: head + 2])
            length = _LENGTH.search(lines)
            if length is None:
                self.connection_lost(ValueError("an answer without Content-Length"))
                return
            self._status, self._body = int(lines[9:12]), head + 4
            self._end = self._body + int(length[1])
            self.usable = not _CLOSE.search(lines)
        if len(self._buffer) >= self._end and self._reply is not None and not self._reply.done():
            body = bytes(self._buffer[self._body : self._end])
            del self._buffer[: self._end]
            self._end = -1
            self._reply.set_result(Reply(self._status, body))

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(Lost(str(exc or "closed")))
            self._reply.exception()  # a client that has hung up does not look


class Client:
    """At most ``most`` connections to one address; who comes later waits for one, and its latency counts the wait."""

    def __init__(self, host: str, port: int, most: int) -> None:
        self._address = (host, port)
        self._free = asyncio.Semaphore(most)
        self._kept: list[Connection] = []

    async def open(self) -> Connection:
        """A connection of its own, outside the bound."""
        _, connection = await asyncio.get_running_loop().create_connection(Connection, *self._address)
        return connection

    async def request(self, raw: bytes, sent: Callable[[], None] = lambda: None) -> Reply:
        """Sends a whole request and returns its answer; calls ``sent`` when it has a connection.

        Raises:
            Lost: there is none.
            ConnectionRefusedError: nobody listens.
        """
        async with self._free:
            connection = self._pop() or await self.open()
            try:
                sent()
                answer = connection.expect()
                connection.transport.write(raw)
                reply = await asyncio.wait_for(answer, ANSWER_SECONDS)
            except BaseException as error:
                connection.transport.abort()
                if isinstance(error, asyncio.TimeoutError):
                    raise Lost(f"no answer in {ANSWER_SECONDS:.0f} s") from None
                raise
            if connection.usable:
                connection.idle_since = time.perf_counter()
                self._kept.append(connection)
            else:
                connection.transport.close()
            return reply

    def _pop(self) -> Connection | None:
        oldest = time.perf_counter() - _IDLE_SECONDS
        while self._kept:
            connection = self._kept.pop()
            if connection.usable and connection.idle_since > oldest:
                return connection
            connection.transport.close()
        return None

    def close(self) -> None:
        while self._kept:
            self._kept.pop().transport.close()


def arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """float64 ``[N]`` times in ``[0, seconds)`` of a Poisson process of ``rate`` a second, ascending."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.random(rng.poisson(rate * seconds))) * seconds


async def closed_loop(clients: int, seconds: float, ask: Callable[[int], Awaitable[None]]) -> None:
    """``clients`` of them, each calling ``ask(number)`` again as soon as it has returned."""
    end, numbers = time.perf_counter() + seconds, itertools.count()

    async def one() -> None:
        while time.perf_counter() < end:
            await ask(next(numbers))

    await asyncio.gather(*(one() for _ in range(clients)))


async def drive(times: Sequence[float] | np.ndarray, fire: Callable[[int, float], Awaitable[None]], most: int) -> int:
    """Calls ``fire(number, due)`` at every time (seconds from now) in a task of its own, whatever the others are at.

    ``due`` is the arrival by ``time.perf_counter``. With ``most`` tasks alive an arrival is left out.

    Returns:
        How many arrivals were left out, after the last task's end.
    """
    start, left_out = time.perf_counter(), 0
    alive: set[asyncio.Future[None]] = set()
    failures: list[BaseException] = []

    def done(task: asyncio.Future[None]) -> None:
        alive.discard(task)
        error = task.exception()
        if error is not None:
            failures.append(error)

    for number, offset in enumerate(times):
        due = start + float(offset)
        early = due - time.perf_counter()
        if early > 0:
            await asyncio.sleep(early)
        if len(alive) >= most:
            left_out += 1
            await asyncio.sleep(0)
            continue
        task = asyncio.ensure_future(fire(number, due))
        alive.add(task)
        task.add_done_callback(done)
    while alive:
        await asyncio.wait(set(alive))
    if failures:
        raise failures[0]
    return left_out


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that ``share`` percent of them do not exceed: a measured one, never between two."""
    ordered = sorted(values)
    return ordered[max(1, math.ceil(share / 100 * len(ordered) - 1e-9)) - 1]
