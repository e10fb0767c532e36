"""The front's sockets: heads that do not end and bodies that it does not want, with workers that are no processes."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

from support.serve_fakes import FakeWorkers, echo, make_config

from raddpo_ext.serve import connection
from raddpo_ext.serve.app import Service
from raddpo_ext.serve.protocol import Answers, Query
from raddpo_ext.serve.server import listen, make_server

GOOD = b'POST /retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-length: 20\r\n\r\n{"input_ids": [3,4]}'
PATIENCE = 60.0  # seconds, for a busy machine


async def answer(queries: list[Query]) -> Answers:
    return echo(queries)


def exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *parts: bytes, pause: float = 0.0) -> bytes:
    """What a client of a real socket hears that says ``parts``, the last one again and again until it is cut off."""
    monkeypatch.setattr(connection, "_HEAD_SECONDS", 0.5)

    async def main() -> bytes:
        service = Service(make_config(tmp_path, max_wait_ms=0), FakeWorkers(answer).start)
        await service.pool.start()
        listener = listen("127.0.0.1", 0)
        server = make_server(service)
        serving = asyncio.create_task(server.serve([listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname())

        async def talk() -> None:
            for part in parts[:-1]:
                writer.write(part)
                await asyncio.sleep(pause)
            while True:
                writer.write(parts[-1])
                await asyncio.sleep(0.05)

        talking, heard = asyncio.create_task(talk()), b""
        try:
            while more := await asyncio.wait_for(reader.read(10_000), PATIENCE):
                heard += more
        except ConnectionError:
            pass
        finally:
            talking.cancel()
            writer.close()
            server.should_exit = True
            await serving
            await service.pool.stop()
        return heard

    return asyncio.run(main())


def test_nothing_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exchange(tmp_path, monkeypatch, b"") == b""


def test_a_head_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exchange(tmp_path, monkeypatch, b"GET /healthz HTTP/1.1\r\n", b"x") == b""


def test_a_second_head_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = exchange(tmp_path, monkeypatch, GOOD, GOOD, b"GET /healthz HTTP/1.1\r\n", b"x", pause=0.2)
    assert heard.count(b"HTTP/1.1 200 OK") == 2
    assert heard.count(b"[3, 4]") == 2


def test_a_long_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = exchange(tmp_path, monkeypatch, b"GET /healthz HTTP/1.1\r\nx: " + b"y" * 50_000, b"")
    head, _, body = heard.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert f"content-length: {len(body)}" in head.decode().lower()
    assert json.loads(body)["error"]["code"] == "bad_request"


def long_head(size: int) -> bytes:
    """A whole request whose head has so many bytes."""
    start, end = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: ", b"\r\n\r\n"
    return start + b"y" * (size - len(start) - len(end)) + end


@pytest.mark.parametrize("before", [b"", GOOD])
@pytest.mark.parametrize(("size", "fits"), [(16 << 10, True), ((16 << 10) + 1, False), (60_000, False)])
def test_a_long_head_that_is_there_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes, size: int, fits: bool
) -> None:
    """Alone in one read, or behind another request in the same one."""
    heard = exchange(tmp_path, monkeypatch, before + long_head(size), b"", pause=0.2)
    last = heard[heard.rindex(b"HTTP/1.1 ") :]
    assert last.startswith(b"HTTP/1.1 200 " if fits else b"HTTP/1.1 400 ")
    assert heard.count(b"HTTP/1.1 ") == 1 + bool(before)
    assert json.loads(last.partition(b"\r\n\r\n")[2]).get("error", {}).get("code") == (None if fits else "bad_request")


def test_garbage_behind_a_refused_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /retrieve HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b"200000\r\n" + b" " * 0x200000 + b"\r\n"
    heard = exchange(tmp_path, monkeypatch, head + body, b"no chunk\r\n", pause=0.5)
    assert heard.startswith(b"HTTP/1.1 413 ")
    assert not caplog.records  # asyncio's of an exception in data_received


def test_garbage_together_with_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The head's own answer, 404, comes too late: the connection has had one."""
    both = b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nno chunk\r\n"
    heard = exchange(tmp_path, monkeypatch, both, b"", pause=0.2)
    assert heard.startswith(b"HTTP/1.1 400 ")
    assert heard.count(b"HTTP/1.1") == 1
    assert not caplog.records


def test_a_long_body_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = b"POST /retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1048577\r\n\r\n"
    assert exchange(tmp_path, monkeypatch, head, b"").startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("length", [b"content-length: 99999999999", b"transfer-encoding: chunked"])
def test_an_endless_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: bytes) -> None:
    """413 comes at once, and what is refused is not listened to for ever."""
    head = b"POST /retrieve HTTP/1.1\r\nhost: localhost\r\n" + length + b"\r\n\r\n"
    chunk = b" " * 40_000 if b"content" in length else b"9c40\r\n" + b" " * 40_000 + b"\r\n"
    heard = exchange(tmp_path, monkeypatch, head, chunk)
    assert heard.startswith(b"HTTP/1.1 413 ")
    assert b"at most 1048576 bytes" in heard


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_do_not_wait_for_acknowledgements(host: str) -> None:
    try:
        listener = listen(host, 0)
    except OSError as error:
        pytest.skip(f"no address {host} here: {error}")
    with listener, socket.create_connection(listener.getsockname()[:2]):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
