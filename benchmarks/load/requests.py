"""What clients send: right requests with their right answers, and everything that goes wrong with requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

import raddpo_ext as rx
from benchmarks.load.check import Expected
from benchmarks.load.client import ANSWER_SECONDS, Client, Lost, Reply
from benchmarks.load.service import BEAMS, BOS, CODES, FIRST, TOKEN, Catalogue, make_model, prompts
from benchmarks.load.service import Shape as ModelShape

MAX_BODY = 1 << 16  # bytes that the service under faults takes
_PROMPTS, _HISTORIES = 64, 16
_TOP_K = 10
_AUTHORIZATION = f"Authorization: Bearer {TOKEN}\r\n"
_CHUNKED = f"POST /retrieve HTTP/1.1\r\nHost: load\r\n{_AUTHORIZATION}Transfer-Encoding: chunked\r\n\r\n".encode()
_CHUNK = b"4000\r\n" + b" " * 0x4000 + b"\r\n"


@dataclass(frozen=True)
class Request:
    """Bytes to send, and what may come back.

    Attributes:
        parts: sent one after another, ``pause`` seconds apart.
        hang_up: seconds after which the client goes away without an answer; None if it waits for one.
    """

    expected: Expected
    parts: tuple[bytes, ...]
    pause: float = 0.0
    hang_up: float | None = None


def post(body: bytes, authorization: str = _AUTHORIZATION) -> bytes:
    head = f"POST /retrieve HTTP/1.1\r\nHost: load\r\n{authorization}Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: load\r\n{_AUTHORIZATION}\r\n".encode()


class Requests:
    """Draws requests at random. Right answers are found first, without the service, by ``SIDRetriever``."""

    def __init__(self, shape: ModelShape, catalogues: dict[str, Catalogue], seed: int) -> None:
        self._random = Random(seed)
        self._filters = hasattr(rx.TrieIndex, "restrict")
        model = make_model(shape)
        retrievers = {name: rx.SIDRetriever(model, it.index, beam_width=BEAMS) for name, it in catalogues.items()}
        self._prompts = [
            (prompt, {name: _right(retriever, prompt) for name, retriever in retrievers.items()})
            for prompt in prompts(_PROMPTS, seed)
        ]
        self._histories = []
        for name, catalogue in catalogues.items():
            for _ in range(_HISTORIES):
                items = self._random.choices(list(catalogue.sids), k=self._random.randrange(1, 9))
                prompt = [BOS] + [
                    FIRST + CODES * level + code for item in items for level, code in enumerate(catalogue.sids[item])
                ]
                self._histories.append((items, name, _right(retrievers[name], prompt)))
        self._items = [item for catalogue in catalogues.values() for item in catalogue.sids]

    def right(self) -> Request:
        """A prompt, and now and then a history, a filter, the beams, or a deadline that cannot be kept."""
        draw = self._random.random()
        if draw < 0.1:
            items, name, reference = self._random.choice(self._histories)
            expected = Expected("history", references={name: reference}, of=name)
            return Request(expected, (post(_json(history=items)),))
        prompt, references = self._random.choice(self._prompts)
        if draw < 0.15 and self._filters:
            only = self._random.sample(self._items, self._random.choice((1, 100, 3000)))
            expected = Expected("filter", only=frozenset(only))
            return Request(expected, (post(_json(input_ids=prompt, allowed_items=only)),))
        if draw < 0.17:
            return Request(Expected("trace", references=references), (post(_json(input_ids=prompt, trace=True)),))
        if draw < 0.2:
            expected = Expected("1 ms deadline", frozenset((200, 504)), references=references)
            return Request(expected, (post(_json(input_ids=prompt, timeout_ms=1)),))
        top_k = self._random.randrange(1, _TOP_K + 1)
        expected = Expected("prompt", top_k=top_k, references=references)
        return Request(expected, (post(_json(input_ids=prompt, top_k=top_k)),))

    def wrong(self) -> Request:
        """One of the ways in which a request is wrong, or its client goes."""
        name = self._random.choice(list(_WRONG))
        prompt, references = self._random.choice(self._prompts)
        return _WRONG[name](name, self._random, post(_json(input_ids=prompt)), references)


def _right(retriever: rx.SIDRetriever, prompt: list[int]) -> dict[int, float]:
    found = retriever.retrieve(torch.tensor([prompt]), top_k=BEAMS)
    return dict(zip(found.items[0].tolist(), found.scores[0].tolist(), strict=True))


def _json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


Make = Callable[[str, Random, bytes, Any], Request]


def _refused(status: int, *raw: bytes) -> Make:
    """One of several requests that are all answered by a status."""
    return lambda name, random, right, references: Request(Expected(name, frozenset((status,))), (random.choice(raw),))


def _hang_up(name: str, random: Random, right: bytes, references: Any) -> Request:
    return Request(Expected(name), (right,), hang_up=random.choice((0.0, 0.001, 0.01)))


def _truncated(name: str, random: Random, right: bytes, references: Any) -> Request:
    return Request(Expected(name), (right[: random.randrange(1, len(right))],), hang_up=0.05)


def _slow(name: str, random: Random, right: bytes, references: Any) -> Request:
    cuts = sorted(random.sample(range(1, len(right)), 5))
    parts = tuple(right[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(right)], strict=True))
    return Request(Expected(name, references=references), parts, pause=0.3)


def _garbage_after(name: str, random: Random, right: bytes, references: Any) -> Request:
    return Request(Expected(name, frozenset((413, 400))), (_CHUNKED + 5 * _CHUNK, b"zz\r\n"), pause=0.1)


def _never_whole(name: str, random: Random, right: bytes, references: Any) -> Request:
    return Request(Expected(name, frozenset((408,))), (right[:-1],))


_WRONG: dict[str, Make] = {
    "broken JSON": _refused(400, post(b""), post(b'{"input_ids": [1, 2'), post(b"\xff\xfe"), post(b"[" * 5000)),
    "no HTTP": _refused(400, b"\x16\x03\x01\x02\x00\r\n\r\n", b"POST /retrieve\r\n\r\n"),
    "bad header": _refused(
        400,
        b"POST /retrieve HTTP/1.1\r\nHost: load\r\nContent-Length: many\r\n\r\n",
        b"POST /retrieve HTTP/1.1\r\nHost: load\r\nbad header\r\n\r\n",
        b"POST /retrieve HTTP/1.1\r\nHost: load\r\nX: " + b"x" * 20_000,
        _CHUNKED + b"zz\r\n",
        b"POST /nowhere HTTP/1.1\r\nHost: load\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ),
    "wrong type": _refused(
        422,
        post(b"[]"),
        post(_json(input_ids="5")),
        post(_json(input_ids=[1.5])),
        post(_json(input_ids=[5], top_k=True)),
        post(_json(input_ids=[5], trace=1)),
    ),
    "wrong value": _refused(
        422,
        post(_json(input_ids=[])),
        post(_json(input_ids=[10**9])),
        post(_json(input_ids=[-1])),
        post(_json(input_ids=[5] * 2000)),
        post(_json(input_ids=[5], top_k=10**6)),
        post(_json(input_ids=[5], timeout_ms=0)),
        post(_json(history=[10**15])),
        post(_json(text="no tokenizer")),
    ),
    "unknown field": _refused(422, post(_json(input_ids=[5], beams=3)), post(_json())),
    "no token": _refused(401, post(_json(input_ids=[5]), "")),
    "wrong token": _refused(401, post(_json(input_ids=[5]), "Authorization: Bearer guess\r\n")),
    "no such path": _refused(404, get("/admin"), get("/retrieve/../etc/passwd")),
    "wrong method": _refused(405, get("/retrieve")),
    "too large": _refused(413, post(b" " * (MAX_BODY + 1)), _CHUNKED + 5 * _CHUNK + b"0\r\n\r\n"),
    "hang up": _hang_up,
    "truncated": _truncated,
    "garbage after too large": _garbage_after,
    "slow body": _slow,
    "never whole": _never_whole,
}


async def perform(client: Client, request: Request, sent: Callable[[], None]) -> Reply | None:
    """Sends a request in its way; ``sent`` is called when its last byte is about to go.

    Returns:
        The answer, or None if the client hung up.

    Raises:
        Lost, ConnectionRefusedError: there is no answer.
    """
    if len(request.parts) == 1 and request.hang_up is None:
        return await client.request(request.parts[0], sent)
    connection = await client.open()
    try:
        answer = connection.expect()
        for number, part in enumerate(request.parts, 1):
            if number == len(request.parts):
                sent()
            connection.transport.write(part)
            await asyncio.sleep(request.pause)
        if request.hang_up is None:
            return await asyncio.wait_for(answer, ANSWER_SECONDS)
        await asyncio.sleep(request.hang_up)
        return None
    except asyncio.TimeoutError:
        raise Lost("no answer") from None
    finally:
        connection.transport.abort()
