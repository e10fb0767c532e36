"""What the front and its workers say to one another: pickles behind their length, over a socket pair.

Both ends are this package on one machine, and nothing from a client is ever unpickled.
"""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

LENGTH = struct.Struct("!Q")


@dataclass(frozen=True)
class Query:
    """One request, its shape checked by the front. One of ``input_ids``, ``text`` and ``history`` is given, or with
    ``example`` none: a history to try is wanted. Item ids are what the catalogue has, integers or strings."""

    input_ids: list[int] | None = None
    text: str | None = None
    history: list[int | str] | None = None
    top_k: int = 10
    allowed_items: tuple[int | str, ...] | None = None
    trace: bool = False
    example: bool = False


class Limits(NamedTuple):
    """What the model takes: token ids below ``vocab_size``, prompts of at most ``longest_prompt`` tokens."""

    vocab_size: int
    longest_prompt: int

    def check(self, prompt: list[int], name: str) -> None:
        """Raises :class:`ServiceError` for a prompt that the model cannot take."""
        if not prompt:
            raise bad_field(name, "must give at least one token")
        if len(prompt) > self.longest_prompt:
            raise bad_field(name, f"must give at most {self.longest_prompt} tokens, got {len(prompt)}")
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            position = next(i for i, token in enumerate(prompt) if not 0 <= token < self.vocab_size)
            raise bad_field(f"{name}[{position}]", f"must be in [0, {self.vocab_size}), got {prompt[position]}")


class Hello(NamedTuple):
    """A worker's first words: what it serves, or why it cannot; and the newer version that it refused, and why."""

    version: int
    limits: Limits | None
    failure: str | None = None
    refused: str | None = None


class Answer(NamedTuple):
    """To one query: a HTTP status and the JSON body, or for an error its code and message."""

    status: int
    body: bytes = b""
    code: str = ""
    message: str = ""


class Answers(NamedTuple):
    """To one batch, in its order, the catalogue's version that all of them are of, and :attr:`Hello.refused`."""

    version: int
    answers: list[Answer]
    refused: str | None = None


class ServiceError(Exception):
    """An error that a client is told as it is."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message

    @property
    def body(self) -> bytes:
        """What the client reads, JSON."""
        return json.dumps({"error": {"code": self.code, "message": self.message}}).encode()


def bad_field(name: str, problem: str) -> ServiceError:
    return ServiceError(422, "bad_field", f"{name} {problem}")


def pack(message: Any) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


def unpack(data: bytes) -> Any:
    return pickle.loads(data)
