"""The service's queue and pool, with workers that are no processes and a clock that jumps."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

from support.serve_fakes import LIMITS, FakeWorkers, echo, make_config, now, run

from raddpo_ext.serve.batcher import Batcher, Ticket
from raddpo_ext.serve.pool import Pool, StartError
from raddpo_ext.serve.process import WorkerDied
from raddpo_ext.serve.protocol import Answers, Hello, Query, ServiceError
from raddpo_ext.serve.telemetry import Telemetry


def submit(batcher: Batcher, *prompts: int, **options: Any) -> list[Ticket]:
    return [batcher.submit(Query([prompt], **options)) for prompt in prompts]


def prompts(batch: list[Ticket]) -> list[int]:
    return [ticket.query.input_ids[0] for ticket in batch]


def test_a_full_batch_leaves_at_once() -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=3, max_wait=5.0, max_queue=10)
        submit(batcher, 1, 2, 3, 4)
        assert prompts(await batcher.take(60)) == [1, 2, 3]
        assert now() == 0
        assert prompts(await batcher.take(60)) == [4]
        assert now() == 5
        assert batcher.queued == 0

    run(main())


def test_the_wait_is_the_first_ones() -> None:
    """A later query does not make the first wait longer, and one that waited for a worker has waited."""

    async def main() -> None:
        batcher = Batcher(max_batch=8, max_wait=5.0, max_queue=10)
        submit(batcher, 1)
        asyncio.get_running_loop().call_later(3, submit, batcher, 2)
        assert prompts(await batcher.take(60)) == [1, 2]
        assert now() == 5
        submit(batcher, 3)
        await asyncio.sleep(20)
        assert prompts(await batcher.take(60)) == [3]
        assert now() == 25

    run(main())


def test_no_batching() -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=1, max_wait=5.0, max_queue=10)
        submit(batcher, 1, 2)
        assert [prompts(await batcher.take(60)) for _ in range(2)] == [[1], [2]]
        assert now() == 0

    run(main())


def test_idle_workers_do_not_split_a_batch() -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=8, max_wait=5.0, max_queue=10)
        takers = [asyncio.create_task(batcher.take(60)) for _ in range(3)]
        await asyncio.sleep(1)
        for prompt in range(4):
            submit(batcher, prompt)
            await asyncio.sleep(1)
        batches = await asyncio.gather(*takers)
        assert sorted(map(prompts, batches)) == [[], [], [0, 1, 2, 3]]
        assert now() == 60

    run(main())


def test_the_rest_of_a_full_batch_waits_for_others() -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=3, max_wait=5.0, max_queue=10)
        takers = [asyncio.create_task(batcher.take(60)) for _ in range(2)]
        await asyncio.sleep(0)
        submit(batcher, 1, 2, 3, 4)
        asyncio.get_running_loop().call_later(4, submit, batcher, 5)
        assert list(map(prompts, await asyncio.gather(*takers))) == [[1, 2, 3], [4, 5]]

    run(main())


def test_nothing_comes() -> None:
    async def main() -> None:
        assert await Batcher(8, 5.0, 10).take(7) == []
        assert now() == 7

    run(main())


def test_a_full_queue_refuses() -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=2, max_wait=0.0, max_queue=3)
        tickets = submit(batcher, 1, 2, 3)
        with pytest.raises(ServiceError, match="3 requests are waiting") as error:
            submit(batcher, 4)
        assert error.value.status == 429
        batcher.drop(tickets[1])
        submit(batcher, 5)
        assert prompts(await batcher.take(1)) == [1, 3]
        assert prompts(await batcher.take(1)) == [5]

    run(main())


def test_dropped_queries_are_not_sent() -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=8, max_wait=5.0, max_queue=10)
        one, two = submit(batcher, 1, 2)
        asyncio.get_running_loop().call_later(1, batcher.drop, one)
        assert prompts(await batcher.take(60)) == [2]
        submit(batcher, 3)
        taking = asyncio.create_task(batcher.take(60))
        await asyncio.sleep(1)
        for ticket in list(batcher._waiting):
            batcher.drop(ticket)
        assert await taking == []
        assert two.answer.cancelled() is False

    run(main())


def test_a_traced_query_is_a_batch_by_itself() -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=8, max_wait=0.0, max_queue=10)
        submit(batcher, 1, 2)
        submit(batcher, 3, 4, trace=True)
        submit(batcher, 5)
        batches = [prompts(await batcher.take(1)) for _ in range(4)]
        assert batches == [[1, 2], [3], [4], [5]]

    run(main())


def test_a_dead_workers_batch_goes_first_alone_and_once() -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=8, max_wait=5.0, max_queue=10)
        submit(batcher, 1, 2, 3)
        batch = await batcher.take(60)
        submit(batcher, 4)
        batcher.drop(batch[1])
        assert batcher.send_again(batch) == 2
        again = await batcher.take(60)
        assert now() == 5  # it does not wait for others
        assert prompts(again) == [1, 3]
        batcher.drop(again[0])
        assert batcher.send_again(again) == 0
        assert prompts(await batcher.take(60)) == [4]
        with pytest.raises(ServiceError, match="died twice") as error:
            again[1].answer.result()
        assert error.value.status == 503
        assert batcher.queued == 0

    run(main())


def test_a_batch_dropped_while_it_waits_to_be_sent_again() -> None:
    async def main() -> None:
        batcher = Batcher(max_batch=8, max_wait=0.0, max_queue=10)
        submit(batcher, 1)
        batch = await batcher.take(60)
        batcher.send_again(batch)
        batcher.drop(batch[0])
        assert await batcher.take(3) == []
        assert batcher.queued == 0

    run(main())


def make_pool(tmp_path: Path, fakes: FakeWorkers, **options: Any) -> Pool:
    config = make_config(tmp_path, **{"max_wait_ms": 0, **options})
    return Pool(config, Batcher(config.max_batch, config.max_wait_ms / 1000, 100), Telemetry(), fakes.start)


def value(pool: Pool, name: str) -> float:
    return pool.telemetry.registry.get_sample_value(name)


def test_queries_are_answered(tmp_path: Path) -> None:
    async def script(queries: list[Query]) -> Answers:
        await asyncio.sleep(1)
        return echo(queries, version=7)

    async def main() -> None:
        workers = FakeWorkers(script)
        pool = make_pool(tmp_path, workers, workers=2, max_batch=2)
        await pool.start()
        assert (pool.ready, pool.version, pool.limits) == (2, 1, LIMITS)
        tickets = submit(pool.batcher, 1, 2, 3, 4, 5)
        await asyncio.sleep(0.5)
        assert (pool.in_flight, pool.batcher.queued) == (4, 1)
        answers = await asyncio.gather(*(ticket.answer for ticket in tickets))
        assert [answer.body for answer in answers] == [b"[1]", b"[2]", b"[3]", b"[4]", b"[5]"]
        assert pool.in_flight == 0
        assert value(pool, "raddpo_batch_size_sum") == 5
        assert value(pool, "raddpo_batch_size_count") == 3
        await pool.stop()
        assert workers.stopped == 2

    run(main())


def test_idle_workers_hear_of_new_catalogues(tmp_path: Path) -> None:
    versions = itertools.count(1)

    async def script(queries: list[Query]) -> Answers:
        return echo(queries, (next(versions) + 1) // 2)

    async def main() -> None:
        pool = make_pool(tmp_path, FakeWorkers(script), workers=2)
        await pool.start()
        await asyncio.sleep(10.5)
        assert pool.version == 10
        assert value(pool, "raddpo_catalogue_swaps_total") == 9
        await pool.stop()

    run(main())


def test_a_dead_workers_queries_are_answered_by_another(tmp_path: Path) -> None:
    deaths = iter([True])

    async def script(queries: list[Query]) -> Answers:
        await asyncio.sleep(1)
        if queries and next(deaths, False):
            raise WorkerDied
        return echo(queries)

    async def main() -> None:
        workers = FakeWorkers(script)
        pool = make_pool(tmp_path, workers, workers=2)
        await pool.start()
        answers = await asyncio.gather(*(ticket.answer for ticket in submit(pool.batcher, 1, 2)))
        assert [answer.body for answer in answers] == [b"[1]", b"[2]"]
        assert sorted(map(len, workers.batches)) == [2, 2]
        assert len(workers.sent) == 3  # the dead one was replaced
        assert pool.ready == 2
        assert value(pool, "raddpo_resent_total") == 2
        assert value(pool, "raddpo_worker_restarts_total") == 1
        await pool.stop()

    run(main())


def test_dead_twice(tmp_path: Path) -> None:
    """The query that kills its workers is told so after the second; the others live on."""

    async def script(queries: list[Query]) -> Answers:
        if any(query.input_ids == [13] for query in queries):
            raise WorkerDied
        return echo(queries)

    async def main() -> None:
        workers = FakeWorkers(script)
        pool = make_pool(tmp_path, workers, max_batch=1)
        await pool.start()
        tickets = submit(pool.batcher, 1, 13, 2)
        answers = await asyncio.gather(*(ticket.answer for ticket in tickets), return_exceptions=True)
        assert (answers[0].status, answers[1].status, answers[2].status) == (200, 503, 200)
        assert workers.batches.count([[13]]) == 2
        assert len(workers.sent) == 3
        assert now() == 0  # they had been ready, so their successors come at once
        await pool.stop()

    run(main())


def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    hangs = iter([1000.0])

    async def script(queries: list[Query]) -> Answers:
        if queries:
            await asyncio.sleep(next(hangs, 0.0))
        return echo(queries)

    async def main() -> None:
        pool = make_pool(tmp_path, FakeWorkers(script), worker_timeout_s=9)
        await pool.start()
        (ticket,) = submit(pool.batcher, 1)
        assert (await ticket.answer).status == 200
        assert now() == 9
        await pool.stop()

    run(main())


def test_back_off_of_workers_that_die_before_they_are_ready(tmp_path: Path) -> None:
    def hello(number: int) -> Hello:
        if 0 < number < 10:
            raise WorkerDied
        return Hello(1, LIMITS)

    async def script(queries: list[Query]) -> Answers:
        if queries:
            raise WorkerDied
        return echo(queries)

    async def main() -> None:
        workers = FakeWorkers(script, hello)
        pool = make_pool(tmp_path, workers)
        await pool.start()
        (ticket,) = submit(pool.batcher, 1)
        await asyncio.sleep(0.1)
        assert (pool.ready, pool.version) == (0, 0)
        with pytest.raises(ServiceError, match="died twice"):
            await ticket.answer
        assert workers.started[:11] == [0, 0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 61.5, 91.5, 121.5]
        await asyncio.sleep(1)
        assert pool.ready == 1
        assert workers.started[11] == 121.5  # at once, since the one before had been ready
        await pool.stop()

    run(main())


def test_the_version_is_the_one_that_all_workers_have(tmp_path: Path) -> None:
    async def main() -> None:
        pool = make_pool(tmp_path, FakeWorkers(echo, lambda number: Hello(number + 1, LIMITS)), workers=3)
        await pool.start()
        assert pool.version == 1
        await pool.stop()

    run(main())


def test_a_worker_that_cannot_serve_stops_the_start(tmp_path: Path) -> None:
    async def main() -> None:
        workers = FakeWorkers(echo, lambda number: Hello(0, None, "no model here") if number else Hello(1, LIMITS))
        pool = make_pool(tmp_path, workers, workers=2)
        with pytest.raises(StartError, match="no model here"):
            await pool.start()
        await pool.stop()
        assert workers.stopped == len(workers.sent)

    run(main())


def test_an_unexpected_error_costs_one_worker(tmp_path: Path) -> None:
    """Such as an answer too few: the worker is replaced, and the slot goes on."""
    bad = iter([True])

    async def script(queries: list[Query]) -> Answers:
        return Answers(1, []) if queries and next(bad, False) else echo(queries)

    async def main() -> None:
        pool = make_pool(tmp_path, FakeWorkers(script))
        await pool.start()
        (ticket,) = submit(pool.batcher, 1)
        assert (await ticket.answer).status == 200
        assert (pool.ready, value(pool, "raddpo_worker_restarts_total")) == (1, 1)
        await pool.stop()

    run(main())
