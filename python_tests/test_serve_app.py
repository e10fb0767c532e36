"""The service's routes: bodies, limits, tokens, deadlines and errors, with workers that are no processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

import httpx
from support.serve_fakes import LIMITS, FakeWorkers, echo, make_config, now, run

from raddpo_ext.serve.app import Service, make_app
from raddpo_ext.serve.process import WorkerDied
from raddpo_ext.serve.protocol import Answer, Answers, Hello, Query

GOOD = b'{"input_ids": [3, 4]}'


async def at_once(queries: list[Query]) -> Answers:
    return echo(queries)


async def after_a_second(queries: list[Query]) -> Answers:
    await asyncio.sleep(1 if queries else 0)
    return echo(queries)


Test = Callable[[Service, Any, FakeWorkers], Awaitable[None]]


def served(tmp_path: Path, test: Test, script: Any = at_once, **options: Any) -> None:
    """Runs a test against a service, its HTTP client and its workers."""

    async def main() -> None:
        fakes = FakeWorkers(script)
        service = Service(make_config(tmp_path, **{"max_wait_ms": 0, **options}), fakes.start)
        await service.pool.start()
        transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await test(service, client, fakes)
        assert service.open == 0
        assert service.batcher.queued == 0
        await service.pool.stop()

    run(main())


def error_of(response: Any) -> tuple[int, str, str]:
    error = response.json()
    assert list(error) == ["error"]
    assert list(error["error"]) == ["code", "message"]
    return response.status_code, error["error"]["code"], error["error"]["message"]


def value(service: Service, name: str, **labels: str) -> float | None:
    return service.telemetry.registry.get_sample_value(name, labels)


def test_a_query_reaches_a_worker_whole(tmp_path: Path) -> None:
    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        response = await client.post("/retrieve", content=GOOD)
        assert (response.status_code, response.json()) == (200, [3, 4])
        assert response.headers["content-type"] == "application/json"
        await client.post(
            "/retrieve", json={"text": "ä", "top_k": 50, "allowed_items": [7, 2**62, 7, 1], "trace": True}
        )
        await client.post("/retrieve", json={"history": [2**63 - 1], "timeout_ms": 5})
        first, second, third = (batch[0] for worker in fakes.sent for batch in worker if batch)
        assert first == Query([3, 4], None, None, 10, None, False)
        assert second == Query(None, "ä", None, 50, (1, 7, 2**62), True)
        assert third == Query(None, None, [2**63 - 1], 10, None, False)
        assert value(service, "raddpo_requests_total", code="200") == 3
        assert value(service, "raddpo_latency_seconds_count") == 3

    served(tmp_path, test)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b'{"input_ids": [1,]}', 400, "not valid JSON"),
        (b'{"text": "\xff"}', 400, "not valid JSON"),
        (b'{"text": "\\ud800"}', 400, "not valid JSON"),
        (b"[" * 100_000, 400, "not valid JSON"),
        (b'{"input_ids": [' + b"9" * 5000 + b"]}", 400, "not valid JSON"),
        (b'{"input_ids": [1' + b"0" * 4000 + b"]}", 422, "input_ids[0] is wrong"),
        (b"[1]", 422, "body is wrong"),
        (b"{}", 422, "one of input_ids, text and history, got none"),
        (b'{"input_ids": [1], "text": "a"}', 422, "got input_ids and text"),
        (b'{"input_ids": []}', 422, "input_ids must give at least one token"),
        (b'{"input_ids": [0, 40]}', 422, "input_ids[1] must be in [0, 40), got 40"),
        (b'{"input_ids": [-1]}', 422, "input_ids[0] is wrong: Input should be greater than or equal to 0, got -1"),
        (b'{"input_ids": [1.0]}', 422, "input_ids[0] is wrong"),
        (b'{"input_ids": [true]}', 422, "input_ids[0] is wrong"),
        (b'{"input_ids": "12"}', 422, "input_ids is wrong"),
        (b'{"input_ids": [' + b"1," * 20 + b"1]}", 422, "input_ids must give at most 20 tokens, got 21"),
        (b'{"history": [1, -2]}', 422, "history[1] is wrong: Input should be a string or an integer from 0 to"),
        (b'{"history": [9223372036854775808]}', 422, "history[0] is wrong"),
        (b'{"input_ids": [1], "top_k": 0}', 422, "top_k is wrong"),
        (b'{"input_ids": [1], "top_k": 51}', 422, "top_k must be at most 50, the beam width, got 51"),
        (b'{"input_ids": [1], "top_k": null}', 422, "top_k is wrong"),
        (b'{"input_ids": [1], "timeout_ms": 0}', 422, "timeout_ms is wrong"),
        (b'{"input_ids": [1], "trace": "yes"}', 422, "trace is wrong"),
        (b'{"input_ids": [1], "topk": 3}', 422, "topk is wrong: Extra inputs are not permitted, got 3"),
        (b'{"input_ids": [1], "allowed_items": [0, ["' + b"x" * 9999 + b'"]]}', 422, "allowed_items[1] is wrong"),
    ],
)
def test_bad_bodies(tmp_path: Path, body: bytes, status: int, message: str) -> None:
    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        response = await client.post("/retrieve", content=body)
        got, code, text = error_of(response)
        assert (got, code) == (status, "bad_json" if status == 400 else "bad_field")
        assert message in text
        assert len(text) < 300
        assert fakes.batches == []

    served(tmp_path, test)


def test_long_bodies(tmp_path: Path) -> None:
    """A body beyond the limit is not read on: whether its length is declared or not."""
    read = []

    async def chunks() -> AsyncIterator[bytes]:
        for number in range(1000):
            read.append(number)
            yield b" " * 40

    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        fits = b" " * (100 - len(GOOD)) + GOOD
        assert (await client.post("/retrieve", content=fits)).status_code == 200
        for body in (b" " + fits, chunks()):
            response = await client.post("/retrieve", content=body)
            assert error_of(response) == (413, "too_large", "the body must have at most 100 bytes")
        assert len(read) == 3

    served(tmp_path, test, max_body=100)


def test_a_body_that_does_not_arrive(tmp_path: Path) -> None:
    async def drip() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(3)

    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        response = await client.post("/retrieve", content=drip())
        assert error_of(response)[:2] == (408, "timeout")
        assert response.headers["connection"] == "close"
        assert now() == 10

    served(tmp_path, test)


def test_tokens(tmp_path: Path) -> None:
    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        wrong = (
            None,
            "",
            "open sesame",
            "Basic sesame",
            "Bearer sesam",
            "Bearer sesame2",
            "Bearer s\xe9same",
            "Bearer",
        )
        for header in wrong:
            headers = {} if header is None else {"Authorization": header.encode("latin-1")}
            for response in (
                await client.post("/retrieve", content=GOOD, headers=headers),
                await client.get("/metrics", headers=headers),
            ):
                assert error_of(response) == (401, "unauthorized", "a bearer token is needed")
                assert response.headers["www-authenticate"] == "Bearer"
        assert fakes.batches == []
        for header in ("Bearer sesame", "bearer sesame"):
            headers = {"Authorization": header}
            assert (await client.post("/retrieve", content=GOOD, headers=headers)).status_code == 200
            assert (await client.get("/metrics", headers=headers)).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/")).status_code == 200

    served(tmp_path, test, token="sesame")


def test_no_such_page(tmp_path: Path) -> None:
    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        for path in ("/docs", "/openapi.json", "/redoc", "/../config.json", "/retrieve/", "/healthz/"):
            assert error_of(await client.get(path)) == (404, "not_found", "Not Found")
        response = await client.get("/retrieve")
        assert error_of(response) == (405, "bad_request", "Method Not Allowed")
        assert response.headers["allow"] == "POST"

    served(tmp_path, test)


def test_deadlines(tmp_path: Path) -> None:
    """A query that is late in the queue is not sent; one that is late at a worker is answered all the same."""

    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        first = asyncio.create_task(client.post("/retrieve", json={"input_ids": [1]}))
        await asyncio.sleep(0.1)
        response = await client.post("/retrieve", json={"input_ids": [2], "timeout_ms": 500})
        assert error_of(response) == (504, "deadline", "no answer within 500 ms")
        assert now() == pytest.approx(0.6)
        assert (await first).status_code == 200
        response = await client.post("/retrieve", json={"input_ids": [3], "timeout_ms": 700})
        assert response.status_code == 504
        assert now() == pytest.approx(1.7)
        response = await client.post("/retrieve", json={"input_ids": [4], "timeout_ms": 10**9})
        assert error_of(response) == (504, "deadline", "no answer within 1250 ms")  # a request may only ask for less
        assert now() == pytest.approx(2.95)
        assert fakes.batches == [[[1]], [[3]], [[4]]]
        assert value(service, "raddpo_requests_total", code="504") == 3

    served(tmp_path, test, after_a_second, timeout_ms=1250)


def test_overload(tmp_path: Path) -> None:
    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        sent = [asyncio.create_task(client.post("/retrieve", content=GOOD)) for _ in range(6)]
        responses = await asyncio.gather(*sent)
        assert sorted(response.status_code for response in responses) == [200] * 2 + [429] * 4
        refused = next(response for response in responses if response.status_code == 429)
        assert error_of(refused) == (429, "overloaded", "2 requests are waiting already")
        assert refused.headers["retry-after"] == "1"
        assert (await client.post("/retrieve", content=GOOD)).status_code == 200

    served(tmp_path, test, after_a_second, max_queue=2)


def test_no_worker(tmp_path: Path) -> None:
    async def dies_at_once(queries: list[Query]) -> Answers:
        raise WorkerDied

    def dies_at_start(number: int) -> Hello:
        raise WorkerDied

    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        fakes.hello = dies_at_start
        # The first waits for another worker as long as it may, the second finds none.
        assert error_of(await client.post("/retrieve", content=GOOD))[:2] == (504, "deadline")
        assert now() == 10
        response = await client.post("/retrieve", content=GOOD)
        assert error_of(response) == (503, "no_worker", "no worker is ready")
        assert response.headers["retry-after"] == "1"
        health = await client.get("/healthz")
        assert health.status_code == 503
        why = "it died before it was ready"
        expected = {"status": "no_worker", "catalogue_version": 0, "workers": 0, "cannot_start": why}
        assert health.json() == expected

    served(tmp_path, test, dies_at_once)


def test_health_and_metrics(tmp_path: Path) -> None:
    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        health = await client.get("/healthz")
        assert (health.status_code, health.json()) == (200, {"status": "ok", "catalogue_version": 1, "workers": 3})
        sent = asyncio.create_task(client.post("/retrieve", content=GOOD))
        await asyncio.sleep(0.5)
        metrics = await client.get("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        lines = metrics.text.splitlines()
        for line in ("raddpo_workers 3.0", "raddpo_in_flight 1.0", "raddpo_queued 0.0", "raddpo_catalogue_version 1.0"):
            assert line in lines
        await sent
        assert "raddpo_in_flight 0.0" in (await client.get("/metrics")).text

    served(tmp_path, test, after_a_second, workers=3)


def test_closing(tmp_path: Path) -> None:
    """What was accepted is answered, what comes later is told."""

    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        sent = asyncio.create_task(client.post("/retrieve", content=GOOD))
        await asyncio.sleep(0.5)
        service.closing = True
        assert error_of(await client.post("/retrieve", content=GOOD))[:2] == (503, "shutting_down")
        health = await client.get("/healthz")
        assert (health.status_code, health.json()["status"]) == (503, "shutting_down")
        assert service.open == 1
        assert (await sent).status_code == 200

    served(tmp_path, test, after_a_second)


def test_errors_of_workers(tmp_path: Path) -> None:
    async def fail(queries: list[Query]) -> Answers:
        return Answers(1, [Answer(422, code="bad_field", message="history[0] ...") for _ in queries])

    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        response = await client.post("/retrieve", content=GOOD)
        assert error_of(response) == (422, "bad_field", "history[0] ...")

    served(tmp_path, test, fail)


def test_nothing_of_the_inside_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        def broken(query: Query) -> None:
            raise RuntimeError(f"secret {tmp_path}")

        monkeypatch.setattr(service.batcher, "submit", broken)
        response = await client.post("/retrieve", content=GOOD)
        assert error_of(response) == (500, "internal", "internal error")
        assert "secret" not in str(response.headers)
        assert value(service, "raddpo_requests_total", code="500") == 1

    served(tmp_path, test)


async def request(service: Service, events: list[Any]) -> list[dict[str, Any]]:
    """Sends a client's raw events to the application: messages, and numbers of seconds to wait before the next."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        while events and isinstance(events[0], (int, float)):
            await asyncio.sleep(events.pop(0))
        if not events:
            await asyncio.Event().wait()
        return events.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/retrieve", "headers": [], "query_string": b"", "root_path": ""}
    await make_app(service)(scope, receive, send)
    return sent


def test_clients_that_hang_up(tmp_path: Path) -> None:
    whole = {"type": "http.request", "body": GOOD, "more_body": False}
    part = {"type": "http.request", "body": GOOD[:4], "more_body": True}
    gone = {"type": "http.disconnect"}

    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        busy = asyncio.create_task(client.post("/retrieve", json={"input_ids": [9]}))
        await asyncio.sleep(0.1)
        await request(service, [whole, 0.2, gone])
        assert now() == pytest.approx(0.3)
        assert service.batcher.queued == 0
        await request(service, [part, 0.2, gone])
        assert (await busy).status_code == 200
        await request(service, [whole, 0.2, gone])  # while a worker has it
        await asyncio.sleep(5)
        assert fakes.batches == [[[9]], [[3, 4]]]
        assert value(service, "raddpo_abandoned_total") == 2
        assert value(service, "raddpo_requests_total", code="499") == 3
        assert json.loads((await request(service, [whole]))[1]["body"]) == [3, 4]

    served(tmp_path, test, after_a_second)


def test_health_tells_what_keeps_a_worker_from_its_start(tmp_path: Path) -> None:
    refused = ["catalogue version 3: too deep"]

    async def dies_at_13(queries: list[Query]) -> Answers:
        if any(query.input_ids == [13] for query in queries):
            raise WorkerDied
        return echo(queries, 2)._replace(refused=refused[0] if refused else None)

    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        fakes.hello = lambda number: Hello(0, None, "ValueError: no norm")
        await client.post("/retrieve", json={"input_ids": [13]})  # both workers die of it, and none starts again
        health = await client.get("/healthz")
        assert health.status_code == 503
        assert health.json() == {
            "status": "no_worker", "catalogue_version": 0, "workers": 0, "cannot_start": "ValueError: no norm"
        }  # fmt: skip
        fakes.hello = lambda number: Hello(2, LIMITS)
        await asyncio.sleep(31)
        health = await client.get("/healthz")
        assert health.status_code == 200
        assert health.json() == {
            "status": "ok", "catalogue_version": 2, "workers": 2, "refused": "catalogue version 3: too deep"
        }  # fmt: skip
        refused.clear()
        await asyncio.sleep(2)
        assert (await client.get("/healthz")).json() == {"status": "ok", "catalogue_version": 2, "workers": 2}

    served(tmp_path, test, dies_at_13, workers=2)


ROUTES = (("GET", "/"), ("GET", "/healthz"), ("GET", "/metrics"), ("POST", "/retrieve"))


@pytest.mark.parametrize(
    ("configured", "own", "foreign"),
    [
        (
            "127.0.0.1",
            ("localhost", "LOCALHOST:80", "localhost.", "a.localhost", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000"),
            ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.7",
             "[::2]", "localhost:80.evil.example:80", "2130706433", "evil.example#localhost"),
        ),
        ("shop.example", ("shop.example", "Shop.Example:8000", "localhost"), ("evil.example", "10.0.0.7")),
        ("10.0.0.7", ("10.0.0.7:8000", "127.0.0.1"), ("evil.example", "10.0.0.8")),
        ("0.0.0.0", ("10.0.0.7:8000", "localhost", "[2001:db8::1]"), ("evil.example", "10.0.0.7.evil.example")),
        ("::", ("10.0.0.7:8000", "[2001:db8::1]:8000", "localhost"), ("evil.example",)),
    ],
)  # fmt: skip
def test_hosts(tmp_path: Path, configured: str, own: tuple[str, ...], foreign: tuple[str, ...]) -> None:
    """While no token is set, a page of another site whose name leads here (DNS rebinding) gets nothing."""

    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        for host in own:
            for method, path in ROUTES:
                content = GOOD if method == "POST" else None
                response = await client.request(method, path, content=content, headers={"Host": host})
                assert response.status_code == 200, host
        searched = len(fakes.batches)
        for host in foreign:
            for method, path in ROUTES:
                content = GOOD if method == "POST" else None
                response = await client.request(method, path, content=content, headers={"Host": host})
                status, code, message = error_of(response)
                assert (status, code) == (421, "bad_host"), host
                assert repr(host) in message
                assert configured in message
        assert len(fakes.batches) == searched
        assert value(service, "raddpo_requests_total", code="421") == len(foreign)

    served(tmp_path, test, host=configured)


def test_any_host_with_a_token(tmp_path: Path) -> None:
    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        headers = {"Host": "proxy.example", "Authorization": "Bearer sesame"}
        for method, path in ROUTES:
            content = GOOD if method == "POST" else None
            assert (await client.request(method, path, content=content, headers=headers)).status_code == 200

    served(tmp_path, test, token="sesame")


def test_the_page_is_in_no_frame(tmp_path: Path) -> None:
    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        policy = (await client.get("/")).headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy.split("; ")

    served(tmp_path, test)


def test_an_example_is_asked_of_a_worker_and_needs_the_token(tmp_path: Path) -> None:
    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        assert (await client.get("/example")).status_code == 401
        response = await client.get("/example", headers={"Authorization": "Bearer secret"})
        assert response.status_code == 200
        assert [query for worker in fakes.sent for batch in worker for query in batch] == [Query(example=True)]

    served(tmp_path, test, token="secret")


@pytest.mark.parametrize("field", ["history", "allowed_items"])
def test_items_are_strings_or_integers(tmp_path: Path, field: str) -> None:
    async def test(service: Service, client: Any, fakes: FakeWorkers) -> None:
        prompt = {} if field == "history" else {"input_ids": [3]}
        response = await client.post("/retrieve", json={**prompt, field: ["A-1", 2**63 - 1]})
        assert response.status_code == 200
        (query,) = (query for worker in fakes.sent for batch in worker for query in batch)
        assert sorted(getattr(query, field), key=str) == [2**63 - 1, "A-1"]
        for bad in (2**63, -1, 1.0, True, None, [1]):
            status, code, message = error_of(await client.post("/retrieve", json={**prompt, field: [1, bad]}))
            assert (status, code) == (422, "bad_field")
            assert message.startswith(
                f"{field}[1] is wrong: Input should be a string or an integer from 0 to {2**63 - 1}"
            )

    served(tmp_path, test)
