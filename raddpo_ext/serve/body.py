"""The body of POST /retrieve: read within its limits, and checked field by field."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect

from raddpo_ext.index.item_ids import LARGEST_ITEM
from raddpo_ext.serve.protocol import Limits, Query, ServiceError, bad_field

HUNG_UP = 499  # status under which requests of disconnected clients are counted
_BODY_SECONDS = 10.0
_SHOWN = 60  # characters of a bad value in an error's message

_Id = Annotated[int, Field(ge=0, lt=2**63)]


def _item(value: Any) -> int | str:
    """An item's id: an integer, or a string of the catalogue's id map."""
    if isinstance(value, str) or (type(value) is int and 0 <= value <= LARGEST_ITEM):
        return value
    raise PydanticCustomError("item", f"Input should be a string or an integer from 0 to {LARGEST_ITEM}")


_Item = Annotated[int | str, PlainValidator(_item)]


class Body(BaseModel):
    """The fields of a request. Unknown fields are refused, and values are not converted."""

    model_config = ConfigDict(strict=True, extra="forbid")

    input_ids: list[_Id] | None = None
    text: str | None = None
    history: list[_Item] | None = None
    top_k: Annotated[int, Field(ge=1)] = 10
    allowed_items: list[_Item] | None = None
    timeout_ms: Annotated[int, Field(ge=1)] | None = None
    trace: bool = False

    @classmethod
    def parse(cls, content: bytes) -> Body:
        """Parse a body. Raises :class:`ServiceError`: 400 if it is not JSON, 422 for a bad field."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as failed:
            error: Any = failed.errors(include_url=False, include_context=False)[0]
        if error["type"] == "json_invalid":
            raise ServiceError(400, "bad_json", "the body is not valid JSON")
        # Name the first bad field as a path, such as allowed_items[3].
        name = "body"
        for part in error["loc"]:
            name = f"{name}[{part}]" if isinstance(part, int) else str(part)[:_SHOWN]
        raise bad_field(name, f"is wrong: {error['msg']}, got {_shown(error['input'])}")

    def query(self, limits: Limits, beam_width: int) -> Query:
        """The query for a worker. Raises :class:`ServiceError` if it cannot be searched."""
        given = [name for name in ("input_ids", "text", "history") if getattr(self, name) is not None]
        if len(given) != 1:
            raise bad_field(
                "body", f"must have one of input_ids, text and history, got {' and '.join(given) or 'none'}"
            )
        if self.input_ids is not None:
            limits.check(self.input_ids, "input_ids")
        if self.top_k > beam_width:
            raise bad_field("top_k", f"must be at most {beam_width}, the beam width, got {self.top_k}")
        allowed = None if self.allowed_items is None else tuple(sorted(set(self.allowed_items), key=_order))
        return Query(self.input_ids, self.text, self.history, self.top_k, allowed, self.trace)


async def read_body(request: Request, most: int) -> bytes:
    """Read the body. Raises :class:`ServiceError` if it has more than ``most`` bytes or does not arrive in time."""
    too_large = ServiceError(413, "too_large", f"the body must have at most {most} bytes")
    # Refuse by the declared size first, then by what arrives.
    declared = request.headers.get("content-length", "0")
    if int(declared) > most:
        raise too_large
    content = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            content.extend(chunk)
            if len(content) > most:
                raise too_large

    try:
        await asyncio.wait_for(read(), _BODY_SECONDS)
    except ClientDisconnect:
        raise ServiceError(HUNG_UP, "hung_up", "the client hung up") from None
    except asyncio.TimeoutError:
        raise ServiceError(408, "timeout", f"the body did not arrive within {_BODY_SECONDS:.0f} s") from None
    return bytes(content)


def _order(item: int | str) -> tuple[bool, Any]:
    """A sort key for integers and strings together, so that equal filters compare equal."""
    return isinstance(item, str), item


def _shown(value: Any) -> str:
    """A bad value for an error's message, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
