"""The service's retriever as a Ray Serve deployment, for more than one machine (``pip install raddpo_ext[ray]``).

Ray places the replicas, routes and batches requests and replaces replicas that die; a replica searches exactly as a
worker of ``python -m raddpo_ext serve`` does, with the same requests and answers::

    from ray import serve
    from raddpo_ext.serve.ray import deployment

    handle = serve.run(deployment("my-model", "catalogue", beam_width=50, num_replicas=4))
    handle.retrieve.remote({"history": [17, 4], "top_k": 10}).result()  # or POST the same to http://127.0.0.1:8000/
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from raddpo_ext.serve.body import Body, read_body
from raddpo_ext.serve.config import ServeConfig
from raddpo_ext.serve.protocol import Answer, Query, ServiceError
from raddpo_ext.serve.search import Search


def deployment(
    model: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    beam_width: int = 50,
    num_replicas: int = 1,
    max_batch_size: int = 16,
    batch_wait_timeout_s: float = 0.005,
    normalize: str = "vocab",
    length_penalty: float = 0.0,
    device: str = "cpu",
    dtype: str = "auto",
    **options: Any,
) -> serve.Application:
    """Make a Ray Serve application that answers like the service's ``POST /retrieve``, over HTTP and by its handle.

    Every replica loads the model once and takes the store's newest catalogue before each batch, so that a ``publish``
    reaches all of them without a restart. All answers of a batch are of one version. A search uses as many threads as
    Ray gives the replica cores (``ray_actor_options={"num_cpus": 4}``).

    Args:
        model: folder of a transformers model, as ``save_pretrained`` writes it; the same path on every machine.
        store: folder of a :class:`raddpo_ext.CatalogueStore` that holds a catalogue; the same path on every machine.
        beam_width, normalize, length_penalty: see :class:`raddpo_ext.SIDRetriever`.
        num_replicas: number of processes, each with its own model.
        max_batch_size: maximum queries per search.
        batch_wait_timeout_s: maximum seconds that the first query of a batch waits for others.
        device, dtype: where and in which type the model runs; ``"cuda"`` also needs
            ``ray_actor_options={"num_gpus": 1}``.
        options: other options of ``serve.deployment``, such as ``ray_actor_options``, ``max_queued_requests`` or
            ``autoscaling_config``. ``max_ongoing_requests`` is four batches unless it is given.

    Raises:
        ValueError, TypeError: naming the argument and the value.
    """
    config = ServeConfig(
        model=Path(model).resolve(),
        store=Path(store).resolve(),
        beam_width=beam_width,
        normalize=normalize,
        length_penalty=length_penalty,
        device=device,
        dtype=dtype,
        max_batch=max_batch_size,
    )
    options = {"num_replicas": num_replicas, "max_ongoing_requests": 4 * max_batch_size, **options}
    return serve.deployment(**options)(SIDRetrieverReplica).bind(config, batch_wait_timeout_s)


class SIDRetrieverReplica:
    """A replica of the deployment. Make it with :func:`deployment`."""

    def __init__(self, config: ServeConfig, batch_wait_timeout_s: float) -> None:
        self._config = config
        self._search = Search(config)
        batches: Any = self._answer
        batches.set_max_batch_size(config.max_batch)
        batches.set_batch_wait_timeout_s(batch_wait_timeout_s)

    async def retrieve(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request from the deployment's handle.

        Raises:
            ValueError: the request is bad; the service would answer it with a 4xx status.
            RuntimeError: the search failed.
        """
        try:
            return json.loads(await self._respond(json.dumps(request).encode()))
        except ServiceError as error:
            # Ray pickles exceptions, and these types need only their message.
            raise (ValueError if error.status < 500 else RuntimeError)(str(error)) from None

    async def __call__(self, request: Request) -> Response:
        """Answer an HTTP request to any path."""
        try:
            if request.method != "POST":
                raise ServiceError(405, "bad_request", "the method must be POST")
            content = await self._respond(await read_body(request, self._config.max_body))
            status = 200
        except ServiceError as error:
            content, status = error.body, error.status
        return Response(content, status, media_type="application/json")

    async def _respond(self, content: bytes) -> bytes:
        """The body of the answer to a request's body; raises :class:`ServiceError` for an error."""
        query = Body.parse(content).query(self._search.limits, self._config.beam_width)
        answer = await self._answer(query)
        if answer.status != 200:
            raise ServiceError(answer.status, answer.code, answer.message)
        return answer.body

    @serve.batch
    async def _answer(self, queries: list[Query]) -> list[Answer]:
        """Answer a batch, which Ray has collected."""
        return await asyncio.to_thread(self._answer_together, queries)  # so that the next batch can fill meanwhile

    def _answer_together(self, queries: list[Query]) -> list[Answer]:
        """Answer queries on one version of the catalogue."""
        self._search.update()
        # A traced query needs a search of its own.
        plain = [number for number, query in enumerate(queries) if not query.trace]
        traced = [[number] for number, query in enumerate(queries) if query.trace]  # one search each
        answers: dict[int, Answer] = {}
        for numbers in (plain, *traced):
            found = self._search.answer([queries[number] for number in numbers])
            answers.update(zip(numbers, found, strict=True))
        return [answers[number] for number in range(len(queries))]
