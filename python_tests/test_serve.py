"""The service as it is started: a front, workers, real sockets, swaps, kills and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

import httpx
from support import tiny_models
from support.serve_fakes import make_index

import raddpo_ext as rx
from raddpo_ext.__main__ import main

pytestmark = pytest.mark.slow

ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
ENVIRONMENT.pop("RADDPO_TOKEN", None)
PATIENCE = 120.0  # seconds, for a busy machine


class Running:
    """A service of ``python -m raddpo_ext serve`` on a model of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.store = folder, rx.CatalogueStore(folder / "store", keep=1)
        tiny_models.seeded(tiny_models.qwen3).save_pretrained(folder / "model")
        make_index(1).save(folder / "first.trie")
        self.errors = open(folder / "stderr", "w+")  # noqa: SIM115  closed in stop
        named = ["--model", folder / "model", "--store", folder / "store", "--index", folder / "first.trie"]
        command = [sys.executable, "-m", "raddpo_ext", "serve", *map(str, named), "--port", "0", *options]
        self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("serving on http://127.0.0.1:"), self.log()
        self.port = int(line.rsplit(":", 1)[1])
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE)

    def log(self) -> str:
        return (self.folder / "stderr").read_text()

    def workers(self) -> list[int]:
        """The workers' process ids."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children if b"serve.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def retrieve(self, prompt: list[int], **options: Any) -> Any:
        response = self.client.post("/retrieve", json={"input_ids": prompt, **options})
        assert response.status_code == 200, response.text
        return response.json()

    def health(self) -> dict[str, Any]:
        return self.client.get("/healthz").json()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        self.client.close()
        self.process.stdout.close()
        self.errors.close()
        return code


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = ("--workers", "2", "--beam-width", "12", "--max-body", "5000", "--timeout-ms", "60000", "--threads", "1")
    running = Running(tmp_path_factory.mktemp("service"), *options)
    yield running
    assert running.stop() == 0
    log = running.log()
    assert set(log.splitlines()) <= {"worker 0 died", "worker 1 died"}, log


def test_answers(service: Running) -> None:
    got = service.retrieve([3, 4], top_k=3)
    assert list(got) == ["items", "sids", "scores", "catalogue_version"]
    assert [len(got[name]) for name in ("items", "sids", "scores")] == [3, 3, 3]
    index = rx.TrieIndex.load(service.store.path / f"{got['catalogue_version']:06}.trie")
    for item, sid in zip(got["items"], got["sids"], strict=True):
        assert item in index.lookup([sid]).items
    history = service.client.post("/retrieve", json={"history": got["items"], "trace": True}).json()
    assert len(history["beams"]) == 3
    allowed = got["items"][1:]
    assert service.retrieve([3, 4], allowed_items=allowed)["items"] == allowed
    assert service.health() == {"status": "ok", "catalogue_version": got["catalogue_version"], "workers": 2}
    assert "raddpo_workers 2.0" in service.client.get("/metrics").text.splitlines()


def test_many_clients_at_once(service: Running) -> None:
    """Batched or not, a prompt's answer is the same."""
    prompts = [[3 + i % 7] * (1 + i % 5) for i in range(60)]
    alone = {tuple(prompt): service.retrieve(prompt) for prompt in prompts[:35]}
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(service.retrieve, prompts))
    for prompt, got in zip(prompts, together, strict=True):
        assert got["items"] == alone[tuple(prompt)]["items"]
        assert got["scores"] == pytest.approx(alone[tuple(prompt)]["scores"], abs=1e-4)
    batches = [line for line in service.client.get("/metrics").text.splitlines() if line.startswith("raddpo_batch")]
    count, total = (float(line.split()[1]) for line in batches if line.split()[0].endswith(("_count", "_sum")))
    assert total > count


def test_swaps_kills_and_noise(service: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Clients ask on and on while catalogues are published, workers killed, connections dropped and junk sent."""
    stop, damaged = threading.Event(), tmp_path / "damaged.trie"
    make_index(9).save(damaged)
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)

    def ask(number: int) -> tuple[int, set[int]]:
        answers, versions = 0, set()
        with httpx.Client(base_url=service.client.base_url, timeout=PATIENCE) as client:
            while not stop.is_set():
                response = client.post("/retrieve", json={"input_ids": [3 + number, 4], "top_k": 12})
                if response.status_code == 503:  # a batch lost its worker twice, or none was ready
                    assert response.json()["error"]["code"] in ("worker_lost", "no_worker")
                    time.sleep(0.1)
                    continue
                assert response.status_code == 200, response.text
                got = response.json()
                assert {item // 1000 for item in got["items"]} == {got["catalogue_version"]}
                versions.add(got["catalogue_version"])
                answers += 1
        return answers, versions

    def junk() -> None:
        for _ in range(10):
            for body in (b"{", b" " * 9000, b'{"input_ids": [99]}'):
                assert service.client.post("/retrieve", content=body).status_code in (400, 413, 422)
            with socket.create_connection(("127.0.0.1", service.port)) as gone:
                gone.sendall(
                    b"POST /retrieve HTTP/1.1\r\nhost: localhost\r\ncontent-length: 20\r\n\r\n"
                    + b'{"input_ids": [3,4]}'
                )
            with socket.create_connection(("127.0.0.1", service.port)) as gone:
                gone.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
                assert gone.recv(100).startswith(b"HTTP/1.1 400 ")

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, number) for number in range(4)]
        try:
            pool.submit(junk).result()
            for number in range(2, 8):
                if number in (3, 5):
                    os.kill(service.workers()[0], signal.SIGKILL)
                assert service.store.publish(make_index(number)) == number
                arguments = ["index", "publish", str(damaged), "--store", str(service.store.path)]
                assert main(arguments) == 2
                time.sleep(0.5)
            eventually(lambda: service.health() == {"status": "ok", "catalogue_version": 7, "workers": 2})
        finally:
            stop.set()
        for answers, versions in (one.result() for one in asking):
            assert answers > 0
            assert versions <= set(range(1, 8))
            assert len(versions) > 1
    assert "altered" in capsys.readouterr().err
    assert service.retrieve([3])["catalogue_version"] == 7
    left = sorted(os.listdir(service.store.path))
    # What was served when the last version came is kept: on a busy machine not the one before it.
    kept = [[], *([f"{version:06d}.trie"] for version in range(1, 7))]
    assert left in ([".lock", ".service.json", ".service.lock", *served, "000007.trie"] for served in kept)
    metrics = dict(line.rsplit(" ", 1) for line in service.client.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(metrics["raddpo_worker_restarts_total"]) == 2
    assert float(metrics["raddpo_queued"]) == float(metrics["raddpo_in_flight"]) == 0


def test_the_end(service: Running) -> None:
    """SIGTERM: what was accepted is answered, what comes later is told, then the service ends with code 0."""
    workers = service.workers()
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # so that what is asked stays open until the service is told to end
    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(service.retrieve, [3 + number % 9]) for number in range(40)]
        eventually(lambda: waiting(service) == 40)
        for process in (service.process.pid, *workers):
            os.kill(process, signal.SIGTERM)  # as an init system may do; a worker leaves that to the front
        eventually(lambda: service.health()["status"] == "shutting_down")
        late = service.client.post("/retrieve", json={"input_ids": [3]})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        assert all(len(answer.result()["items"]) == 10 for answer in asked)
    assert service.process.wait(PATIENCE) == 0
    assert not any(map(alive, workers))


def waiting(service: Running) -> float:
    """Requests that the front has and has not answered."""
    lines = service.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(("raddpo_queued ", "raddpo_in_flight ")))


def test_a_front_that_is_killed_takes_its_workers_along(tmp_path: Path) -> None:
    running = Running(tmp_path, "--max-batch", "1")
    (worker,) = running.workers()
    running.process.kill()
    running.stop()
    eventually(lambda: not alive(worker))


@pytest.mark.parametrize("problem", ["store", "index", "port", "option", "token"])
def test_what_stops_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str], problem: str) -> None:
    """The last line on stderr says why, and the exit code is 2."""
    tiny_models.seeded(tiny_models.qwen3).save_pretrained(tmp_path / "model")
    make_index(1).save(tmp_path / "first.trie")
    options: dict[str, Any] = {
        "--model": tmp_path / "model", "--index": tmp_path / "first.trie", "--store": tmp_path / "store", "--port": 0
    }  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as taken:
        if problem == "store":
            del options["--index"]
        elif problem == "index":
            options["--index"] = tmp_path / "model/config.json"
        elif problem == "port":
            options["--port"] = taken.getsockname()[1]
        elif problem == "option":
            options["--max-batch"] = 0
        else:
            (tmp_path / "token").write_text("\n")
            options["--token-file"] = tmp_path / "token"
        assert main(["serve", *(str(word) for option in options.items() for word in option)]) == 2
    out, err = capfd.readouterr()
    message = {
        "store": "the store holds no catalogue version; publish one with --index FILE",
        "index": "not a TrieIndex file",
        "port": "Address already in use",
        "option": "max_batch must be at least 1, got 0",
        "token": "token must be one or more printable ASCII characters",
    }[problem]
    last = err.splitlines()[-1]
    assert last.startswith("raddpo_ext: ")
    assert "Traceback" not in err
    assert message in last
    assert out == ""


def test_without_the_extra(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("raddpo_ext.serve.server", "raddpo_ext.serve.connection"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["serve", "--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "raddpo_ext: the service needs uvicorn: pip install 'raddpo_ext[serve]'\n"


def test_publish_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_index(1).save(tmp_path / "one.trie")
    for version in (1, 2):
        assert main(["index", "publish", str(tmp_path / "one.trie"), "--store", str(tmp_path / "store")]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'store'}: version {version}\n"


def test_a_start_publishes_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that is started again with the same file goes on with the version that it had."""
    (tmp_path / "config.json").touch()
    served: list[Any] = []
    monkeypatch.setattr("raddpo_ext.serve.server.serve", served.append)
    store = rx.CatalogueStore(tmp_path / "store")
    for number, version in ((1, 1), (1, 1), (2, 2), (1, 3)):
        make_index(number).save(tmp_path / "shop.trie")
        options = ["--index", str(tmp_path / "shop.trie"), "--store", str(store.path)]
        assert main(["serve", "--model", str(tmp_path), *options]) == 0
        assert store.version == version
    assert len(served) == 4
