"""The parts of the load test that could be wrong without anybody seeing it: its checks, its clock and its client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
from benchmarks.load.check import Checker, Expected
from benchmarks.load.client import Client, Lost, Reply, arrivals, closed_loop, drive, percentile
from benchmarks.load.peer import agree, cell
from benchmarks.load.soak import by_minute, growth

SIDS = {"even": {0: [1, 2], 2: [1, 3], 4: [2, 2]}, "odd": {1: [1, 2], 3: [3, 3]}}
REFERENCE = {"even": {2: -1.0, 0: -1.5, 4: -3.0}, "odd": {3: -0.5, 1: -2.0}}
RIGHT = {"items": [2, 0], "sids": [[1, 3], [1, 2]], "scores": [-1.0, -1.5], "catalogue_version": 2}
EXPECTED = Expected("prompt", references=REFERENCE)


def checked(expected: Expected = EXPECTED, status: int = 200, **changes: Any) -> dict[str, int]:
    """What is found wrong with an answer; versions 2 (even) and 3 (odd) are published, 4 (even) is being."""
    checker = Checker(SIDS)
    for version, name in ((2, "even"), (3, "odd"), (4, "even")):
        checker.announce(version, name)
    checker.published(3)
    body = RIGHT | changes if status == 200 else {"error": {"code": "x", "message": "y"}} | changes
    checker.answered(expected, 2, Reply(status, json.dumps(body).encode()))
    assert checker.counts == {(expected.kind, "503 x" if status == 503 else str(status)): 1}
    assert len(checker.examples) == sum(checker.problems.values())
    return dict(checker.problems)


def test_right_answers_pass() -> None:
    assert checked() == {}
    assert checked(items=[3, 1], sids=[[3, 3], [1, 2]], scores=[-0.5, -2.0], catalogue_version=3) == {}
    assert checked(scores=[-1.0004, -1.5004]) == {}
    assert checked(status=429) == checked(status=503) == checked(status=504) == {}
    assert checked(Expected("filter", only=frozenset((7,))), items=[], sids=[], scores=[]) == {}
    assert checked(Expected("wrong", frozenset((422,))), status=422) == {}
    assert checked(Expected("history", of="even"), status=422) == {}


@pytest.mark.parametrize(
    ("problem", "changes"),
    [
        ("foreign item", {"items": [2, 1]}),
        ("foreign item", {"catalogue_version": 3}),  # the other catalogue's items
        ("wrong SID", {"sids": [[1, 2], [1, 3]]}),
        ("scores not sorted", {"scores": [-1.5, -1.0]}),
        ("another query's answer", {"scores": [-1.1, -1.5]}),
        ("another query's answer", {"items": [2, 4], "sids": [[1, 3], [2, 2]], "scores": [-1.0, -3.0]}),
        ("item twice", {"items": [2, 2], "sids": [[1, 3], [1, 3]]}),
        ("unknown version", {"catalogue_version": 9}),
        ("wrong length", {"scores": [-1.0]}),
        ("empty", {"items": [], "sids": [], "scores": []}),
        ("impossible score", {"scores": [0.5, -1.5]}),
    ],
)
def test_wrong_answers_are_found(problem: str, changes: dict[str, Any]) -> None:
    assert problem in checked(**changes)


def test_a_version_older_than_the_request_is_found() -> None:
    checker = Checker(SIDS)
    checker.announce(2, "even")
    checker.announce(3, "odd")
    checker.answered(EXPECTED, 3, Reply(200, json.dumps(RIGHT).encode()))
    assert checker.problems == {"stale version": 1}


def test_wrong_statuses_are_found() -> None:
    assert checked(status=500) == {"status 500": 1}
    assert checked(Expected("wrong", frozenset((422,)))) == {"status 200": 1}
    assert checked(Expected("filter", only=frozenset((2,)))) == {"filtered item": 1}
    assert checked(Expected("few", top_k=1)) == {"wrong length": 1}
    assert checked(status=429, error="no") == {"error without code and message": 1}
    inside = {"code": "x", "message": "/tmp/model: KeyError"}
    assert checked(Expected("wrong", frozenset((422,))), 422, error=inside) == {"error tells the inside": 1}


def test_a_history_may_be_refused_only_while_the_other_catalogue_is_served() -> None:
    checker = Checker(SIDS)
    checker.announce(1, "odd")
    checker.announce(2, "even")
    refusal = Reply(422, b'{"error": {"code": "bad_field", "message": "history[0]"}}')
    checker.answered(Expected("history", of="even"), 1, refusal)
    assert not checker.problems
    checker.answered(Expected("history", of="even"), 2, refusal)
    assert checker.problems == {"refused a history of the catalogue served": 1}


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.sampled_from([0.1, 50, 90, 99, 99.9, 100]))
def test_percentile_is_the_least_value_that_enough_do_not_exceed(values: list[float], share: float) -> None:
    enough = [value for value in values if 1000 * sum(other <= value for other in values) >= 10 * share * len(values)]
    assert percentile(values, share) == min(enough)


def test_arrivals_are_poisson() -> None:
    times = arrivals(200.0, 100.0, seed=0)
    assert np.array_equal(times, arrivals(200.0, 100.0, seed=0))
    assert times.min() >= 0
    assert times.max() < 100
    assert (np.diff(times) >= 0).all()
    assert abs(len(times) - 20_000) < 5 * 20_000**0.5
    gaps = np.diff(times) * 200
    assert abs(gaps.std() - 1) < 0.05  # of exponential gaps the deviation is the mean
    counts = np.histogram(times, bins=1000, range=(0, 100))[0]
    assert 0.8 < counts.var() / counts.mean() < 1.2


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def with_server(handler: Handler, use: Callable[[int], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        async with server:
            return await use(server.sockets[0].getsockname()[1])

    return asyncio.run(run())


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\ncontent-length: 4\r\n\r\nnull"
ASK = b"GET / HTTP/1.1\r\n\r\n"


def test_client_reads_answers_in_pieces_and_keeps_connections() -> None:
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while await reader.readuntil(b"\r\n\r\n"):
            for begin in range(0, len(OK), 7):
                writer.write(OK[begin : begin + 7])
                await asyncio.sleep(0.001)

    async def use(port: int) -> list[Reply]:
        client = Client("127.0.0.1", port, 4)
        replies = [await client.request(ASK) for _ in range(3)]
        client.close()
        return replies

    assert with_server(handler, use) == [Reply(200, b"null")] * 3
    assert connections == 1


@pytest.mark.parametrize("part", [b"", OK[:10], OK[:-1], b"HTTP/1.1 200 OK\r\n\r\n"])
def test_half_an_answer_is_a_lost_request(part: bytes) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(part)
        writer.close()

    async def use(port: int) -> None:
        with pytest.raises(Lost):
            await Client("127.0.0.1", port, 1).request(ASK)

    with_server(handler, use)


def test_latency_counts_from_the_arrival() -> None:
    """A server that answers one request after another, slower than they come: each is later than the one before."""
    latencies: list[float] = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await asyncio.sleep(0.05)
            writer.write(OK)

    async def use(port: int) -> None:
        client = Client("127.0.0.1", port, 1)

        async def fire(number: int, due: float) -> None:
            await client.request(ASK)
            latencies.append(time.perf_counter() - due)

        assert await drive(np.arange(10) * 0.01, fire, 100) == 0
        client.close()

    with_server(handler, use)
    assert all(latency >= 0.05 * (1 + i) - 0.01 * i - 0.005 for i, latency in enumerate(latencies))


def test_drive_leaves_out_what_is_over_its_bound_and_raises_what_is_raised() -> None:
    async def hang(number: int, due: float) -> None:
        await asyncio.sleep(0.1)

    async def fail(number: int, due: float) -> None:
        raise ZeroDivisionError

    assert asyncio.run(drive([0.0] * 5, hang, most=2)) == 3
    with pytest.raises(ZeroDivisionError):
        asyncio.run(drive([0.0], fail, most=2))


def test_closed_loop_has_as_many_under_way_as_clients() -> None:
    alive, most, numbers = 0, 0, []

    async def ask(number: int) -> None:
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        numbers.append(number)
        await asyncio.sleep(0.01)
        alive -= 1

    asyncio.run(closed_loop(3, 0.05, ask))
    assert most == 3
    assert numbers == list(range(len(numbers)))


def test_growth_compares_the_last_two_minutes_with_minutes_five_to_seven() -> None:
    samples = [(5.0 * i, 100.0 if 5 * i < 420 else 110.0) for i in range(1, 361)]
    samples[:59] = [(seconds, 1e9) for seconds, _ in samples[:59]]  # before minute 5
    assert growth(samples) == pytest.approx(0.1)
    assert growth(samples[:83]) is None
    assert growth([]) is None


def test_by_minute() -> None:
    samples = [
        {"seconds": 30.0, "front": 1.0},
        {"seconds": 60.0, "front": 2.0},
        {"seconds": 90.0, "front": 4.0, "x": 8.0},
    ]
    assert by_minute(samples) == {"seconds": [30.0, 75.0], "front": [1.0, 3.0], "x": [8.0]}


def test_the_service_beside_a_peer_counts_only_equal_answers_and_whole_runs() -> None:
    agree(RIGHT, RIGHT | {"scores": [-1.0004, -1.5]})
    for wrong in ({"scores": [-1.0, -1.6]}, {"items": [0, 2]}):
        with pytest.raises(SystemExit, match="other answers"):
            agree(RIGHT, RIGHT | wrong)
    fast, slow = ({"throughput": rate, "others": 0} for rate in (12.0, 3.0))
    found = cell(16, {"ours": [fast, slow], "peer": [slow, slow]})
    assert found["ratios"] == {"ours / peer": {"median": 2.5, "least": 1.0, "most": 4.0}}
    with pytest.raises(SystemExit, match="1 requests of 1 clients"):
        cell(1, {"ours": [fast], "peer": [slow | {"others": 1}]})
