"""The service (``python -m raddpo_ext serve``) under load, on the loopback, CPU::

    python -m benchmarks.load                       # speed, about 8 minutes
    python -m benchmarks.load --mode soak           # faults for 30 minutes
    python -m benchmarks.load --mode soak --quick   # for one minute
    python -m benchmarks.load --mode peer           # beside a service around ``generate``, about 5 minutes

The model is a random Qwen3, float32: ``small`` (hidden size 64, 2 layers, V = 1k), with which the service is what takes
time, or ``large`` (512, 4 layers, V = 32k), with which the model is. The catalogue is the real ``industrial`` one, or a
synthetic one of its size where that is absent; prompts have 16 to 32 tokens, searches 20 beams, workers one thread.

Arrivals are Poisson and come whatever the service is at (open loop); latency counts from the arrival, so a request that
waits for a connection or for the client is as late as it is to its user. Everything is bounded: the time, the rate, the
connections (256) and the requests under way; an arrival beyond those is left out, and said.

``speed``: throughput of clients who wait for their answers (closed loop), then latency at shares of the best of it.
The floor is ``SIDRetriever.retrieve`` in a loop, one thread, no service.

``soak``: a steady rate, and around it catalogues published in turn, damaged ones offered, a worker killed with -9 every
ten seconds, clients that hang up, and wrong requests of every kind; at last SIGTERM in the middle of requests. Every
answer is held against the catalogue of its version and against what ``SIDRetriever`` finds without the service. Exit
code 1 if anything that is required is not so.

``peer``: throughput of clients who wait for their answers, of this service and of one around ``generate`` in turns:
``large``, prompts of 128 tokens, 50 beams, one worker, both checked to give the same answer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

import raddpo_ext as rx
from benchmarks.harness import report, results
from benchmarks.load import peer as load_peer
from benchmarks.load import service as load_service
from benchmarks.load import speed as load_speed
from benchmarks.load import tables
from benchmarks.load.soak import Soak

MODULE = "benchmarks.load"
_QUICK_MINUTES = 1.0


def speed(args: argparse.Namespace, folder: Path, environment: dict[str, Any]) -> int:
    cases = [case for case in load_speed.CASES if args.cases in case.name]
    if not cases:
        raise SystemExit(f"--cases {args.cases!r} matches none of: {', '.join(c.name for c in load_speed.CASES)}")
    source, catalogues = load_service.make_catalogues()
    rx.CatalogueStore(folder / "store").publish(catalogues["even"].index)
    floors, cells = {}, []
    for model in dict.fromkeys(case.model for case in cases):
        load_service.make_model(load_service.SHAPES[model]).save_pretrained(folder / model)
        floors[model] = load_speed.floor(model, catalogues["even"], 0.5 if args.quick else 5.0)
    for case in cases:
        cells.append(load_speed.measure(case, folder, args.quick))
        print(tables.offered(cells[-1:]), flush=True)
        if args.out:
            run = {"catalogue": source, "floors_ms": floors, "results": cells}
            results.write(args.out, {MODULE: environment | run})
    print(tables.summary(cells, floors), tables.offered(cells), sep="\n\n")
    return 0


def soak(args: argparse.Namespace, folder: Path, environment: dict[str, Any]) -> int:
    minutes = _QUICK_MINUTES if args.quick else args.minutes
    result = Soak(folder, 60 * minutes, args.load).run()
    if args.out:
        results.write(args.out, {MODULE: environment | {"results": [result]}})
    print(tables.soak(result))
    for line in result["examples"] + result["failures"]:
        print(line)
    return 1 if result["failures"] else 0


def peer(args: argparse.Namespace, folder: Path, environment: dict[str, Any]) -> int:
    source, catalogues = load_service.make_catalogues()
    rx.CatalogueStore(folder / "store").publish(catalogues["even"].index)
    load_service.make_model(load_service.SHAPES[load_peer.MODEL]).save_pretrained(folder / load_peer.MODEL)
    cells = load_peer.measure(folder, args.quick)
    if args.out:
        results.write(args.out, {MODULE: environment | {"catalogue": source, "results": cells}})
    print(tables.peer(cells))
    return 0


_MODES = {"speed": speed, "soak": soak, "peer": peer}


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=tuple(_MODES), default="speed", help="what is measured (speed)")
    parser.add_argument("--cases", default="", help="speed: only services whose name contains this")
    parser.add_argument("--minutes", type=float, default=30.0, help="soak: how long (30)")
    parser.add_argument("--load", type=float, default=0.4, help="soak: rate, as a share of the capacity (0.4)")
    parser.add_argument("--quick", action="store_true", help="one minute, or a second a rate")
    parser.add_argument("--out", type=Path, help="write the result to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        return _MODES[args.mode](args, Path(folder), report.environment(MODULE))


if __name__ == "__main__":
    raise SystemExit(main())
