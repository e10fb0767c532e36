"""Messages between the front and its workers: pickles, each after its length, over a socket pair.

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
    """One request, whose form the front has checked.

    One of ``input_ids``, ``text`` and ``history`` is given. With ``example`` none of them is given, and the answer is a
    history to try. Item ids are integers or strings, as in the catalogue.
    """

    input_ids: list[int] | None = None
    text: str | None = None
    history: list[int | str] | None = None
    top_k: int = 10
    allowed_items: tuple[int | str, ...] | None = None
    trace: bool = False
    example: bool = False


class Limits(NamedTuple):
    """What the model accepts: token ids below ``vocab_size``, prompts of at most ``longest_prompt`` tokens."""

    vocab_size: int
    longest_prompt: int

    def check(self, prompt: list[int], name: str) -> None:
        """Raise :class:`ServiceError` for a prompt that the model does not accept."""
        if not prompt:
            raise bad_field(name, "must give at least one token")
        if len(prompt) > self.longest_prompt:
            raise bad_field(name, f"must give at most {self.longest_prompt} tokens, got {len(prompt)}")
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            position = next(i for i, token in enumerate(prompt) if not 0 <= token < self.vocab_size)
            raise bad_field(f"{name}[{position}]", f"must be in [0, {self.vocab_size}), got {prompt[position]}")


class Hello(NamedTuple):
    """A worker's first message: what it serves or why it cannot, and which newer version it refused and why."""

    version: int
    limits: Limits | None
    failure: str | None = None
    refused: str | None = None


class Answer(NamedTuple):
    """The answer to one query: an HTTP status and the JSON body, or for an error its code and message."""

    status: int
    body: bytes = b""
    code: str = ""
    message: str = ""


class Answers(NamedTuple):
    """The answers to one batch in its order, the catalogue version of all of them, and :attr:`Hello.refused`."""

    version: int
    answers: list[Answer]
    refused: str | None = None


class ServiceError(Exception):
    """An error whose status, code and message are sent to the client."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message

    @property
    def body(self) -> bytes:
        """The JSON body of the response."""
        return json.dumps({"error": {"code": self.code, "message": self.message}}).encode()


def bad_field(name: str, problem: str) -> ServiceError:
    return ServiceError(422, "bad_field", f"{name} {problem}")


def pack(message: Any) -> bytes:
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(data)) + data


def unpack(data: bytes) -> Any:
    return pickle.loads(data)
