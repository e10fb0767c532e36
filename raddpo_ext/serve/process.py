"""The front's end of one worker process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from typing import Any

from raddpo_ext.serve.config import ServeConfig
from raddpo_ext.serve.protocol import LENGTH, Answers, Hello, Query, pack, unpack

_LAST_SECONDS = 5.0  # for a worker to exit after its socket is closed


class WorkerDied(Exception):
    """The process has ended, or was killed because it did not answer in time."""


class WorkerProcess:
    """A fresh interpreter that runs ``raddpo_ext.serve.worker``; it ends when this end of its socket is closed."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self._reader, self._writer = reader, writer

    @classmethod
    async def start(cls, config: ServeConfig) -> WorkerProcess:
        """Start the process and send it the configuration."""
        # The worker inherits one end of the socket pair. The other end is closed when this process ends.
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "raddpo_ext.serve.worker",
                str(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr,  # standard output is the front's
                start_new_session=True,  # Ctrl-C is for the front alone
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = cls(process, reader, writer)
        worker._send(config)
        return worker

    async def hello(self) -> Hello:
        """The worker's first message, sent when its model is loaded."""
        hello: Hello = await self._receive()
        return hello

    async def ask(self, queries: list[Query], timeout: float) -> Answers:
        """The answers to a batch, which may be empty.

        Raises:
            WorkerDied: the worker died, or was killed because it did not answer within ``timeout`` seconds.
        """
        self._send(queries)
        try:
            answers: Answers = await asyncio.wait_for(self._receive(), timeout)
        except asyncio.TimeoutError:
            self._kill()
            raise WorkerDied from None
        return answers

    async def stop(self) -> None:
        """End the process, by force if it does not exit by itself, and wait for its end."""
        self._writer.close()
        try:
            await asyncio.wait_for(self.process.wait(), _LAST_SECONDS)
        except asyncio.TimeoutError:
            self._kill()
            await self.process.wait()

    def _kill(self) -> None:
        """Kill the process, unless it has ended already."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def _send(self, message: Any) -> None:
        self._writer.write(pack(message))

    async def _receive(self) -> Any:
        """The worker's next message; raises :class:`WorkerDied` if it has ended."""
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return unpack(await self._reader.readexactly(length))
        except (EOFError, ConnectionError):
            raise WorkerDied from None
