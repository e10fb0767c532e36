"""The service beside one that is written around ``generate``: the same model, catalogue, prompts and clients."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.load.requests import post
from benchmarks.load.service import Service, prompts, serve_command
from benchmarks.load.speed import BATCH, TOP_K, Meter

MODEL, PROMPT, BEAMS = "large", 128, 50
CLIENTS = (1, 16)
ROUNDS, SECONDS = 3, 15.0
TOLERANCE = 1e-3  # of scores


def measure(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """A cell for each number of clients; ``folder`` holds the ``large`` model and the ``store``."""
    options = ("--workers", "1", "--max-batch", str(BATCH), "--beam-width", str(BEAMS))
    commands = {
        "ours": serve_command(folder / MODEL, folder / "store", *options),
        "peer": [
            *(sys.executable, "-m", "benchmarks.load.generate_service"),
            *(str(folder / MODEL), "--beam-width", str(BEAMS)),
        ],
    }
    services: dict[str, Service] = {}
    try:
        for name, command in commands.items():
            (folder / name).mkdir()
            services[name] = Service(command, folder / name)
        return asyncio.run(_measure(services, *((1, 1.0) if quick else (ROUNDS, SECONDS))))
    finally:
        for service in services.values():
            service.stop()


async def _measure(services: dict[str, Service], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Both services in turns; the one that waits takes no CPU."""
    asked = prompts(64, seed=0, shortest=PROMPT, longest=PROMPT)
    meters = {name: Meter(service, asked) for name, service in services.items()}
    await _warm_up(meters, asked[0])
    cells = []
    for clients in CLIENTS:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in meters}
        for _ in range(rounds):
            for name, meter in meters.items():
                found[name].append(await meter.closed(clients, seconds))
        cells.append(cell(clients, found))
    for meter in meters.values():
        meter.client.close()
    return cells


async def _warm_up(meters: dict[str, Meter], prompt: list[int]) -> None:
    body = post(json.dumps({"input_ids": prompt, "top_k": TOP_K}).encode())
    agree(*[json.loads((await meter.client.request(body)).body) for meter in meters.values()])


def agree(ours: dict[str, Any], peer: dict[str, Any]) -> None:
    """SystemExit unless the answers have the same items with the same scores."""
    if ours["items"] != peer["items"] or not np.allclose(ours["scores"], peer["scores"], rtol=0, atol=TOLERANCE):
        raise SystemExit(f"the services give other answers: {ours} and {peer}")


def cell(clients: int, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """From the runs of both services; SystemExit if a request failed."""
    failed = sum(run["others"] for runs in found.values() for run in runs)
    if failed:
        raise SystemExit(f"{failed} requests of {clients} clients were not answered with 200")
    ratios = [a["throughput"] / b["throughput"] for a, b in zip(found["ours"], found["peer"], strict=True)]
    return {
        "case": f"{clients} client{'s' * (clients > 1)}",
        "ratios": {"ours / peer": {"median": median(ratios), "least": min(ratios), "most": max(ratios)}},
        "runs": found,
    }
