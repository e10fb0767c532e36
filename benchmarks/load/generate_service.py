"""A service as one writes it around ``generate``: FastAPI, the constraint as a dictionary, one thread that searches::

    python -m benchmarks.load.generate_service MODEL --beam-width 50

It serves the catalogue "even" of :mod:`benchmarks.load.service` on a free port of the loopback, and answers ``POST
/retrieve`` as ``python -m raddpo_ext serve`` does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import uvicorn
from fastapi import Body, FastAPI
from transformers import AutoModelForCausalLM

from benchmarks.load.service import Catalogue, make_catalogues
from raddpo_ext.bench.retriever import children_of, generate

Tokens = Annotated[list[int], Body()]


class Search:
    """``generate`` under the catalogue's constraint."""

    def __init__(self, model: Any, catalogue: Catalogue, beam_width: int) -> None:
        self.model, self.beam_width = model, beam_width
        assert catalogue.index.vocab is not None
        tokens = catalogue.index.vocab.encode(torch.tensor(list(catalogue.sids.values()))).tolist()
        self.items = dict(zip(map(tuple, tokens), catalogue.sids, strict=True))
        self.levels, self.children = catalogue.index.levels, children_of(tokens)

    def __call__(self, input_ids: list[int], top_k: int) -> dict[str, list[Any]]:
        found = generate(
            self.model,
            torch.tensor([input_ids]),
            width=self.beam_width,
            levels=self.levels,
            top_k=top_k,
            prefix_allowed_tokens_fn=lambda _, row: self.children[tuple(row[len(input_ids) :].tolist())],
            return_dict_in_generate=True,
            output_scores=True,
        )
        sids = map(tuple, found.sequences[:, len(input_ids) :].tolist())
        return {"items": [self.items[sid] for sid in sids], "scores": found.sequences_scores.tolist()}


def make_app(search: Search) -> FastAPI:
    app, searching = FastAPI(), ThreadPoolExecutor(max_workers=1)

    @app.post("/retrieve")
    async def retrieve(input_ids: Tokens, top_k: Annotated[int, Body()]) -> dict[str, list[Any]]:
        return await asyncio.get_running_loop().run_in_executor(searching, search, input_ids, top_k)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--beam-width", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    app = make_app(Search(model, make_catalogues()[1]["even"], args.beam_width))
    listening = socket.create_server(("127.0.0.1", 0))
    print(f"serving on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listening])


if __name__ == "__main__":
    main()
