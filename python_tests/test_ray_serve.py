"""The Ray Serve deployment on a local Ray: answers, batches, a catalogue that changes and a replica that dies."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("fastapi", reason="needs fastapi: pip install raddpo_ext[serve]")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"  # a busy machine takes more than the 5 s that Ray waits
pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install raddpo_ext[ray]")
import ray
from ray import serve
from support.tiny_models import qwen3, seeded

import raddpo_ext as rx
from raddpo_ext.serve.protocol import Answer, Query
from raddpo_ext.serve.ray import deployment
from raddpo_ext.serve.search import Search

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ITEMS, WIDTH = 60, 10


def catalogue(version: int) -> rx.TrieIndex:
    """The items ``1000 * version + i``, whose SIDs the version shifts."""
    codes = torch.arange(ITEMS)
    sids = torch.stack([(codes + version) % 8, codes // 8, (codes * 5 + version) % 8], 1)
    return rx.TrieIndex.build(sids, item_ids=1000 * version + codes, vocab=rx.SIDVocab([8, 8, 8], offset=3))


class Running:
    """The deployment, and what tests ask of it."""

    def __init__(self, handle: Any, port: int, folder: Path) -> None:
        self.handle, self.url = handle, f"http://127.0.0.1:{port}/"
        self.model, self.store = folder / "model", rx.CatalogueStore(folder / "store")

    def ask(self, **request: Any) -> dict[str, Any]:
        return self.handle.retrieve.remote(request).result(timeout_s=20)

    def post(self, body: bytes, method: str = "POST") -> tuple[int, Any]:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("ray")
    model = seeded(qwen3)
    model.save_pretrained(folder / "model")
    rx.CatalogueStore(folder / "store").publish(catalogue(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # of the replicas
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 << 20,
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            port = _free_port()
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            application = deployment(
                folder / "model",
                folder / "store",
                beam_width=WIDTH,
                num_replicas=2,
                max_batch_size=4,
                batch_wait_timeout_s=0.02,
                ray_actor_options={"num_cpus": 0.5},
                health_check_period_s=1,
            )
            yield Running(serve.run(application), port, folder)
        finally:
            ray.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def histories(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(3, 27, (length,), generator=generator).tolist() for length in lengths]


def expected(running: Running, prompt: list[int], version: int, top_k: int) -> tuple[list[int], list[float]]:
    """By the retriever alone."""
    model = seeded(qwen3)
    found = rx.SIDRetriever(model, catalogue(version), beam_width=WIDTH).retrieve(torch.tensor([prompt]), top_k=top_k)
    return found.items[0].tolist(), found.scores[0].tolist()


def replicas() -> set[str]:
    return {
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if "SERVE_REPLICA" in actor["name"]
    }


def test_answers_are_the_retrievers(running: Running) -> None:
    prompts = histories(24)
    with ThreadPoolExecutor(24) as threads:  # together, so that they are batched
        answers = list(threads.map(lambda prompt: running.ask(input_ids=prompt, top_k=5), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        items, scores = expected(running, prompt, 1, 5)
        assert answer["items"] == items
        assert answer["scores"] == pytest.approx(scores, abs=1e-5)
        assert answer["catalogue_version"] == 1
    status, posted = running.post(json.dumps({"input_ids": prompts[0], "top_k": 5}).encode())
    assert (status, posted["items"]) == (200, answers[0]["items"])
    history = running.ask(history=[1003, 1041])
    codes = catalogue(1)
    assert history["items"] == running.ask(input_ids=[1, *_tokens(codes, 3), *_tokens(codes, 41)])["items"]


def _tokens(index: rx.TrieIndex, code: int) -> list[int]:
    """Token ids of the item ``1000 + code``."""
    sid = [(code + 1) % 8, code // 8, (code * 5 + 1) % 8]
    assert 1000 + code in index.lookup([sid]).items.tolist()
    return [3 + 8 * level + part for level, part in enumerate(sid)]


def test_bad_requests(running: Running) -> None:
    with pytest.raises(ValueError, match=r"top_k must be at most 10, the beam width, got 11"):
        running.ask(input_ids=[3], top_k=11)
    with pytest.raises(ValueError, match=r"history\[0\] must be an item of the catalogue, got 5"):
        running.ask(history=[5])
    assert running.post(b"{")[0] == 400
    status, body = running.post(b'{"input_ids": [3, 99]}')
    assert (status, body["error"]["code"]) == (422, "bad_field")
    assert body["error"]["message"] == "input_ids[1] must be in [0, 40), got 99"
    assert running.post(b'{"input_ids": [3]}', "PUT")[0] == 405
    assert running.post(b" " * (1 << 21))[0] == 413


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's batches look up the replica that they are in, which its local testing mode does not have."""
    limits = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=16))
    monkeypatch.setattr(serve, "get_replica_context", lambda: limits)


def test_strings_in_strings_and_titles_out(running: Running, tmp_path: Path, in_this_process: None) -> None:
    """By the handle and as the service gives them: the answer with strings is the answer with numbers, renamed."""
    index = catalogue(1)
    items = index.items.tolist()
    names = rx.IdMap([f"SKU-{item}" for item in items], [f"Thing {item}" for item in items], items)
    rx.CatalogueStore(tmp_path).publish(index, names=names)
    numbers = serve.run(deployment(running.model, running.store.path, beam_width=WIDTH), _local_testing_mode=True)
    plain = numbers.retrieve.remote({"history": [1003, 1041], "top_k": 5}).result()
    strings = serve.run(deployment(running.model, tmp_path, beam_width=WIDTH), _local_testing_mode=True)
    found = strings.retrieve.remote({"history": ["SKU-1003", "SKU-1041"], "top_k": 5}).result()
    assert found["items"] == [f"SKU-{item}" for item in plain["items"]]
    assert found["titles"] == [f"Thing {item}" for item in plain["items"]]
    assert found["scores"] == plain["scores"]
    with pytest.raises(ValueError, match=r"history\[0\] must be an item of the catalogue, got 'SKU-5'"):
        strings.retrieve.remote({"history": ["SKU-5"]}).result()


def test_requests_are_batched(running: Running, monkeypatch: pytest.MonkeyPatch, in_this_process: None) -> None:
    """In this process, where the searches can be counted: full batches, one of what is left, a trace by itself."""
    sizes: list[int] = []
    answer = Search.answer

    def counted(search: Search, queries: list[Query]) -> list[Answer]:
        sizes.append(len(queries))
        return answer(search, queries)

    monkeypatch.setattr(Search, "answer", counted)
    application = deployment(running.model, running.store.path, beam_width=WIDTH, max_batch_size=4)
    handle = serve.run(application, _local_testing_mode=True)
    asked = [handle.retrieve.remote({"input_ids": prompt}) for prompt in histories(10)]
    assert all(one.result()["items"] for one in asked)
    assert sum(sizes) == 10
    assert max(sizes) == 4
    sizes.clear()
    traced = [handle.retrieve.remote({"input_ids": prompt, "trace": True}) for prompt in histories(3)]
    assert all(len(one.result()["beams"]) == 3 for one in traced)
    assert set(sizes) <= {0, 1}  # a search by itself each


def test_catalogue_changes_under_requests(running: Running) -> None:
    """Every answer's items are of the version that it names, and later searches have the new one."""
    seen: list[tuple[int, list[int]]] = []
    stop = threading.Event()

    def ask(prompt: list[int]) -> None:
        while not stop.is_set():
            answer = running.ask(input_ids=prompt, top_k=WIDTH)
            seen.append((answer["catalogue_version"], answer["items"]))

    first = running.store.version
    with ThreadPoolExecutor(6) as threads:
        asking = [threads.submit(ask, prompt) for prompt in histories(6)]
        for version in range(first + 1, first + 6):
            assert running.store.publish(catalogue(version)) == version
            time.sleep(0.3)
        stop.set()
        for one in asking:
            one.result()
    assert {version for version, _ in seen} >= {first + 1, first + 5}
    assert all(items and {item // 1000 for item in items} == {version} for version, items in seen)
    assert {running.ask(input_ids=[4])["catalogue_version"] for _ in range(12)} == {first + 5}


def test_killed_replica_is_replaced(running: Running) -> None:
    before = replicas()
    assert len(before) == 2
    ray.kill(ray.get_actor(min(before), "serve"))
    answers, until = 0, time.monotonic() + 30
    while time.monotonic() < until and (answers < 20 or len(replicas() - {min(before)}) < 2):
        try:
            running.ask(input_ids=[4, 5])
            answers += 1
        except Exception:  # of a request that the dead one had
            time.sleep(0.1)
    assert answers >= 20
    assert len(replicas() - {min(before)}) == 2
    items, _ = expected(running, [4, 5], running.store.version, WIDTH)
    assert {tuple(running.ask(input_ids=[4, 5], top_k=WIDTH)["items"]) for _ in range(8)} == {tuple(items)}
