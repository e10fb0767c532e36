"""One client's connection, with a bound on how long it may hold the front without a whole request's head."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from raddpo_ext.serve.protocol import ServiceError

_HEAD_SECONDS = 10.0


class Connection(H11Protocol):
    """uvicorn's, which itself waits for ever for the rest of a head, and for the end of a body it has refused."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request()

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP; in the form of every other error, where uvicorn's is plain text of no stated length."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # what follows a body that was refused
            self.transport.close()
            return
        if self.cycle is not None:  # a head that came before: whatever its answer would be, it is dropped
            self.cycle.disconnected = True
        body = ServiceError(400, "bad_request", msg).body
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _expect_request(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(_HEAD_SECONDS, self._close_unless_serving)

    def _close_unless_serving(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
