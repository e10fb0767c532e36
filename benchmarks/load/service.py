"""The service under load: its model and catalogues, its processes, and what the kernel says about them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import raddpo_ext as rx
from benchmarks.harness import catalogues
from benchmarks.harness.catalogues import ROOT
from raddpo_ext.bench.compare import Missing

CODES, FIRST, BOS = 256, 64, 1  # codes of a level, token id of the first one
BEAMS = 20
SHORTEST, LONGEST = 16, 32  # tokens of a prompt
TOKEN = "for-the-load-test"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Shape:
    """A random Qwen3."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int


SHAPES = {
    "small": Shape(vocab=1024, hidden=64, intermediate=128, layers=2, heads=4),
    "large": Shape(vocab=32_768, hidden=512, intermediate=1536, layers=4, heads=8),
}


def make_model(shape: Shape) -> Qwen3ForCausalLM:
    """Far from a uniform softmax, so that every prompt has items of its own."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=2,
    )
    return Qwen3ForCausalLM(config).eval()


@dataclass(frozen=True)
class Catalogue:
    """An index, and what it was built from."""

    index: rx.TrieIndex
    sids: dict[int, list[int]]


def make_catalogues() -> tuple[str, dict[str, Catalogue]]:
    """What they are derived from, and two catalogues without a common item, whose rows have other SIDs."""
    try:
        source, sids = "industrial", catalogues.real("industrial")
    except Missing:
        source, sids = "synthetic", catalogues.clustered(3686, CODES, 3)
    ids = 2 * np.arange(len(sids))
    return source, {"even": _catalogue(ids, sids), "odd": _catalogue(ids + 1, CODES - 1 - sids)}


def _catalogue(ids: np.ndarray, sids: np.ndarray) -> Catalogue:
    vocab = rx.SIDVocab([CODES] * sids.shape[1], offset=FIRST)
    index = rx.TrieIndex.build(sids, item_ids=ids, vocab=vocab)
    return Catalogue(index, dict(zip(ids.tolist(), sids.tolist(), strict=True)))


def prompts(count: int, seed: int, shortest: int = SHORTEST, longest: int = LONGEST) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, size=count)
    return [rng.integers(3, FIRST + 3 * CODES, size=length).tolist() for length in lengths]


def serve_command(model: Path, store: Path, *options: str) -> list[str]:
    """``python -m raddpo_ext serve`` on a free port of the loopback, one thread per worker."""
    command = [sys.executable, "-m", "raddpo_ext", "serve", "--model", str(model), "--store", str(store)]
    return [*command, "--port", "0", "--threads", "1", *options]


class Service:
    """A service's process, which prints its address when it is ready; ``folder`` takes its log and temporary files."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.log = folder / "service.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RADDPO_TOKEN": TOKEN,
            "TMPDIR": str(self.temporary),
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log)
        self.pid = self.process.pid
        self.port = self._wait_until_ready()

    def _wait_until_ready(self, seconds: float = 120.0) -> int:
        assert self.process.stdout is not None
        patience = threading.Timer(seconds, self.process.kill)
        patience.start()
        try:
            line = self.process.stdout.readline().decode()
        finally:
            patience.cancel()
        address = re.fullmatch(r"serving on http://127\.0\.0\.1:(\d+)\n", line)
        if address is None:
            self.kill()
            raise SystemExit(f"the service did not start:\n{self.log.read_text()[-2000:]}")
        return int(address[1])

    def workers(self) -> list[int]:
        """Pids of the front's children that search, the one that was started first ahead."""
        found = []
        for pid in children(self.pid):
            try:
                arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
            except FileNotFoundError:
                continue
            if b"raddpo_ext.serve.worker" in arguments:
                found.append((started(pid), pid))
        return [pid for _, pid in sorted(found)]

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """The front alone: its workers end when it is gone."""
        self.process.kill()
        self.process.wait()


def children(pid: int) -> list[int]:
    """Of every thread of a process."""
    try:
        lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        return [int(child) for found in lists for child in found]
    except (FileNotFoundError, ProcessLookupError):
        return []


def started(pid: int) -> int:
    """Clock ticks since boot."""
    return int(_stat(pid)[19])


def cpu_seconds(pids: Sequence[int]) -> float:
    """Of these processes until now."""
    return sum((int(fields[11]) + int(fields[12])) / _TICKS for fields in map(_stat, pids))


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; of a process that is gone zeros."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["0"] * 50


def memory(pid: int) -> dict[str, int] | None:
    """Bytes of a process by kind: ``Rss``, ``Pss`` and ``Anonymous``; None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines[1:]}
    return {name: sizes[name] for name in ("Rss", "Pss", "Anonymous")} if sizes else None


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def mapped_versions(pid: int) -> int:
    """How many versions of a catalogue a process has mapped."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return len({line.split()[5] for line in lines if ".trie" in line})
