"""The front process from its start to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from raddpo_ext.serve.app import Service, make_app
from raddpo_ext.serve.config import ServeConfig
from raddpo_ext.serve.connection import Connection
from raddpo_ext.serve.pool import StartError

_HEAD_BYTES = 16 << 10  # maximum size of a request's line and headers
_IDLE_SECONDS = 5  # for which an idle connection is kept open
_FLUSH_SECONDS = 5  # for answers that are being written when the service stops
_LOG = logging.getLogger(__name__)


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT, then answer the accepted requests and return.

    Prints ``serving on http://HOST:PORT`` to standard output once every worker is ready.

    Raises:
        OSError: the address is taken.
        ValueError: a worker cannot serve the model or the catalogue; says why.
    """
    with listen(config.host, config.port) as listener:
        if config.token is None and not _is_loopback(listener):
            _LOG.warning("%s is reachable from other machines, and no token is set", config.host)
        try:
            asyncio.run(_serve(config, listener))
        except StartError as error:
            raise ValueError(str(error)) from None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=1024)
    # Connections inherit this option, which asyncio sets only for its own listeners. Without it an answer's body, which
    # is written after its head, waits up to 40 ms until the client acknowledges the head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def _serve(config: ServeConfig, listener: socket.socket) -> None:
    """Run the front and its workers until a signal stops them."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    service = Service(config)
    server = make_server(service)
    # The front listens while the workers load, so that /healthz answers from the start.
    front = asyncio.create_task(server.serve([listener]))
    stopped, ready = asyncio.create_task(stop.wait()), asyncio.create_task(service.pool.start())
    try:
        await asyncio.wait({stopped, ready}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
            host = f"[{config.host}]" if ":" in config.host else config.host
            print(f"serving on http://{host}:{listener.getsockname()[1]}", flush=True)
        # Serve until a signal comes, or the front fails.
        await asyncio.wait({stopped, front}, return_when=asyncio.FIRST_COMPLETED)
        service.closing = True  # /healthz reports it, and new requests get 503
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drained(service), config.shutdown_timeout_s)
    finally:
        service.closing = True
        # End the front before the workers, which it needs for its last answers.
        for task in (stopped, ready):
            task.cancel()
        server.should_exit = True
        await front
        await service.pool.stop()


def make_server(service: Service) -> uvicorn.Server:
    """The uvicorn server of the service, with its limits, which logs only errors."""
    return _Server(
        uvicorn.Config(
            make_app(service),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
    )


async def _drained(service: Service) -> None:
    """Return when every accepted request is answered."""
    while service.open:
        await asyncio.sleep(0.02)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to :func:`_serve`."""
        yield


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback
