"""A client's connection, with limits on the size and time of a request's head."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from raddpo_ext.serve.protocol import ServiceError

_HEAD_SECONDS = 10.0


class _Parser(h11.Connection):
    """h11's parser, which by itself applies the size limit only to a head that arrives in pieces."""

    def __init__(self, head_bytes: int) -> None:
        super().__init__(h11.SERVER, head_bytes)
        self._head_bytes = head_bytes

    def next_event(self) -> Any:
        if self.their_state is not h11.IDLE:
            return super().next_event()
        # A head that arrives in one piece is measured by what the parser consumes.
        before = len(self.trailing_data[0])
        event = super().next_event()
        if isinstance(event, h11.Request) and before - len(self.trailing_data[0]) > self._head_bytes:
            raise h11.RemoteProtocolError("Receive buffer too long", error_status_hint=431)
        return event


class Connection(H11Protocol):
    """uvicorn's protocol, which by itself waits forever for the rest of a head, and for the end of a refused body."""

    _timer: asyncio.TimerHandle | None = None

    def __init__(self, config: uvicorn.Config, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        if config.h11_max_incomplete_event_size is not None:
            self.conn = _Parser(config.h11_max_incomplete_event_size)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect_request()

    def send_400_response(self, msg: str) -> None:
        """Answer input that is not HTTP, in the form of all other errors. uvicorn sends text without a length."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # input after a refused body
            self.transport.close()
            return
        if self.cycle is not None:  # drops the answer to the head before this one
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
        """Give the client a limited time to send the next head."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(_HEAD_SECONDS, self._close_unless_serving)

    def _close_unless_serving(self) -> None:
        """Close a connection whose time is over, unless its request is being answered."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
