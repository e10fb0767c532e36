"""The routes of the front process: requests, access and errors."""

from __future__ import annotations

import asyncio
import hmac
import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from raddpo_ext.serve.batcher import Batcher
from raddpo_ext.serve.body import HUNG_UP, Body, read_body
from raddpo_ext.serve.config import ServeConfig
from raddpo_ext.serve.hosts import is_own_host
from raddpo_ext.serve.pool import Pool, StartWorker
from raddpo_ext.serve.process import WorkerProcess
from raddpo_ext.serve.protocol import Answer, Limits, Query, ServiceError
from raddpo_ext.serve.telemetry import Telemetry

_PAGE = Path(__file__).with_name("page.html")
# The page loads nothing from elsewhere and connects only to this service.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'"
)
_SHOWN = 60  # characters of a bad value in an error's message
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}


class Service:
    """The front process: its queue, workers and metrics. While ``closing`` is true, it refuses new requests."""

    def __init__(self, config: ServeConfig, start: StartWorker = WorkerProcess.start) -> None:
        self.config = config
        self.telemetry = Telemetry()
        self.batcher = Batcher(config.max_batch, config.max_wait_ms / 1000, config.max_queue)
        self.pool = Pool(config, self.batcher, self.telemetry, start)
        self.closing = False
        #: Number of requests to /retrieve that are read but not answered yet.
        self.open = 0
        self.telemetry.queued.set_function(lambda: self.batcher.queued)
        self.telemetry.in_flight.set_function(lambda: self.pool.in_flight)
        self.telemetry.workers.set_function(lambda: self.pool.ready)
        self.telemetry.version.set_function(lambda: self.pool.version)

    async def retrieve(self, request: Request) -> Response:
        """``POST /retrieve``: answer one query."""
        clock = asyncio.get_running_loop().time
        status = 500
        try:
            self.check_access(request)
            content = await read_body(request, self.config.max_body)
            # Time and deadline count from here: how fast a client sends is not the service's latency.
            read = clock()
            self.open += 1
            try:
                answer = await self._answer(request, content, read)
            finally:
                self.open -= 1
                self.telemetry.latency.observe(clock() - read)
            if answer.status != 200:
                raise ServiceError(answer.status, answer.code, answer.message)
            status = 200
            return _json(answer.body, 200)
        except ServiceError as error:
            status = error.status
            raise
        finally:
            self.telemetry.requests.labels(status).inc()

    async def example(self, request: Request) -> Response:
        """A history of items of the catalogue, which the page shows at first."""
        self.check_access(request)
        self._limits()
        answer = await self._ask(
            request, Query(example=True), asyncio.get_running_loop().time(), self.config.timeout_ms
        )
        if answer.status != 200:
            raise ServiceError(answer.status, answer.code, answer.message)
        return _json(answer.body, 200)

    def _limits(self) -> Limits:
        """What the workers' model accepts; raises :class:`ServiceError` while no worker is ready."""
        if self.closing:
            raise ServiceError(503, "shutting_down", "the service is shutting down")
        if self.pool.limits is None or not self.pool.ready:
            raise ServiceError(503, "no_worker", "no worker is ready")
        return self.pool.limits

    async def _answer(self, request: Request, content: bytes, read: float) -> Answer:
        limits = self._limits()
        body = Body.parse(content)
        query = body.query(limits, self.config.beam_width)
        return await self._ask(
            request, query, read, min(body.timeout_ms or self.config.timeout_ms, self.config.timeout_ms)
        )

    async def _ask(self, request: Request, query: Query, read: float, timeout_ms: int) -> Answer:
        """Queue a query, and wait for its answer until its deadline."""
        seconds = timeout_ms / 1000
        # Wait for the answer, the deadline or the end of the connection, whichever is first.
        ticket = self.batcher.submit(query)
        hung_up = asyncio.ensure_future(_disconnect(request))
        try:
            left = read + seconds - asyncio.get_running_loop().time()
            either: set[asyncio.Future[Any]] = {ticket.answer, hung_up}
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if ticket.answer.done():
                return ticket.answer.result()
            if hung_up.done():
                self.telemetry.abandoned.inc()
                raise ServiceError(HUNG_UP, "hung_up", "the client hung up")
            raise ServiceError(504, "deadline", f"no answer within {seconds * 1000:.0f} ms")
        finally:
            hung_up.cancel()
            self.batcher.drop(ticket)

    def check_access(self, request: Request) -> None:
        """Refuse a request without the token or, if none is set, a page of another site."""
        if self.config.token is None:
            self.check_host(request)
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), self.config.token.encode()):
            raise ServiceError(401, "unauthorized", "a bearer token is needed")

    def check_host(self, request: Request) -> None:
        """Refuse a page of another site whose name leads to this address (DNS rebinding), unless a token is set."""
        host = request.headers.get("host")  # HTTP/1.0 may have none, but no browser uses that
        if self.config.token is None and host is not None and not is_own_host(host, self.config.host):
            raise ServiceError(
                421,
                "bad_host",
                f"the Host header names {host[:_SHOWN]!r}; a service without a token accepts only localhost, loopback "
                f"addresses and {self.config.host}: set a token, or set --host",
            )

    async def health(self, request: Request) -> Response:
        """Status 200 while the service answers requests, else 503. Needs no token."""
        self.check_host(request)
        status = "shutting_down" if self.closing else "ok" if self.pool.ready else "no_worker"
        content = {"status": status, "catalogue_version": self.pool.version, "workers": self.pool.ready}
        for name, problems in (("cannot_start", self.pool.failures), ("refused", self.pool.refused)):
            if problems:  # that of the lowest slot
                content[name] = problems[min(problems)]
        return _json(json.dumps(content).encode(), 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``, in the format of Prometheus."""
        self.check_access(request)
        return Response(self.telemetry.page(), media_type=CONTENT_TYPE_LATEST)

    async def page(self, request: Request) -> Response:
        """The page. Needs no token: it has no data, and asks its user for a token."""
        self.check_host(request)
        headers = {"Content-Security-Policy": _PAGE_POLICY}
        return Response(_PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)


def make_app(service: Service) -> FastAPI:
    """The routes as an ASGI application, without FastAPI's documentation pages."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_api_route("/retrieve", service.retrieve, methods=["POST"])
    app.add_api_route("/example", service.example, methods=["GET"])
    app.add_api_route("/healthz", service.health, methods=["GET"])
    app.add_api_route("/metrics", service.metrics, methods=["GET"])
    if _PAGE.is_file():
        app.add_api_route("/", service.page, methods=["GET"])
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


async def _disconnect(request: Request) -> None:
    """Return when the client disconnects. After a request's body no other message comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _json(error.body, error.status, _HEADERS.get(error.status))


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's errors: an unknown path, or a method that the path does not allow."""
    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code == 404 else "bad_request"
    return _json(ServiceError(error.status_code, code, error.detail).body, error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    return _json(ServiceError(500, "internal", "internal error").body, 500)


def _json(content: bytes, status: int, headers: Any = None) -> Response:
    return Response(content, status, headers, media_type="application/json")
