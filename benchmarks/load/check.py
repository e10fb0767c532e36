"""Whether the service's answers are right: every one is held against the catalogue that it says it is of."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.load.client import Reply

_TOLERANCE = 1e-3  # of a score: a batch's padding changes the order of its sums
_SHOWN = 20  # problems kept with their text; all are counted
_OVERLOAD = frozenset((429, 503, 504))


@dataclass(frozen=True)
class Expected:
    """What a request may be answered.

    Attributes:
        kind: what it is counted as.
        statuses: that fit it, besides those of overload.
        top_k: most items.
        references: by the catalogue's name its right items and their scores, more than ``top_k`` of them.
        only: the request's filter.
        of: the catalogue that the request's history is from; 422 fits while another one may be served.
    """

    kind: str
    statuses: frozenset[int] = frozenset((200,))
    top_k: int = 10
    references: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    only: frozenset[int] | None = None
    of: str | None = None


class Checker:
    """Follows what is published, and counts answers by kind and status (503 by its cause
    too) and what is wrong with them by its name.

    Call :meth:`announce` before a version is published and :meth:`published` after: an answer must be of a version
    that was announced when it came, and not older than what was published when its request was sent.
    """

    def __init__(self, sids: Mapping[str, Mapping[int, list[int]]]) -> None:
        self.sids = sids  # codes by item, by the catalogue's name
        self.names: dict[int, str] = {}
        self.newest = 0  # published, so that every request from now on must see it
        self.counts: Counter[tuple[str, str]] = Counter()
        self.problems: Counter[str] = Counter()
        self.examples: list[str] = []

    def announce(self, version: int, name: str) -> None:
        self.names[version] = name

    def published(self, version: int) -> None:
        self.newest = version

    def lost(self, kind: str, why: str) -> None:
        """A request that was sent whole and has no answer."""
        self.counts[kind, "lost"] += 1
        self._problem("lost", f"{kind}: {why}")

    def unanswered(self, kind: str) -> None:
        """A request whose client did not want an answer, or that came after the service was told to stop."""
        self.counts[kind, "unanswered"] += 1

    def answered(self, expected: Expected, oldest: int, reply: Reply) -> None:
        """``oldest`` is :attr:`newest` when the request was sent."""
        try:
            body = json.loads(reply.body)
        except ValueError:
            self.counts[expected.kind, str(reply.status)] += 1
            self._problem("no JSON", f"{expected.kind}: {reply.body[:80]!r}")
            return
        cause = f" {body['error']['code']}" if reply.status == 503 and not [*_error_shape(body)] else ""
        self.counts[expected.kind, f"{reply.status}{cause}"] += 1
        if reply.status in expected.statuses:
            wrong = _error_shape(body) if reply.status != 200 else self._answer(expected, oldest, body)
        elif reply.status in _OVERLOAD:
            wrong = _error_shape(body)
        elif reply.status == 422 and expected.of is not None:
            possible = {name for version, name in self.names.items() if version >= oldest}
            wrong = () if possible - {expected.of} else ("refused a history of the catalogue served",)
        else:
            wrong = (f"status {reply.status}",)
        for name in wrong:
            self._problem(name, f"{expected.kind}: {str(body)[:200]}")

    def _answer(self, expected: Expected, oldest: int, body: Any) -> Iterable[str]:
        items, scores, version = body["items"], body["scores"], body["catalogue_version"]
        if version not in self.names:
            yield "unknown version"
            return
        if version < oldest:
            yield "stale version"
        name = self.names[version]
        sids, reference = self.sids[name], expected.references.get(name)
        if not len(items) == len(scores) == len(body["sids"]) <= expected.top_k:
            yield "wrong length"
        if not items and expected.only is None:
            yield "empty"
        if len(set(items)) < len(items):
            yield "item twice"
        if any(item not in sids for item in items):
            yield "foreign item"
        elif any(sids[item] != sid for item, sid in zip(items, body["sids"], strict=False)):
            yield "wrong SID"
        if expected.only is not None and not expected.only.issuperset(items):
            yield "filtered item"
        if any(not math.isfinite(score) or score > 0 for score in scores):
            yield "impossible score"
        if any(after > before for before, after in pairwise(scores)):
            yield "scores not sorted"
        if reference is not None and not _agree(items, scores, reference):
            yield "another query's answer"

    def _problem(self, name: str, example: str) -> None:
        self.problems[name] += 1
        if len(self.examples) < _SHOWN:
            self.examples.append(f"{name}: {example}")

    def by_kind(self) -> dict[str, dict[str, int]]:
        table: dict[str, dict[str, int]] = {}
        for (kind, status), count in sorted(self.counts.items()):
            table.setdefault(kind, {})[status] = count
        return table


def _agree(items: list[int], scores: list[float], reference: Mapping[int, float]) -> bool:
    """The right items with their scores; those as good to the tolerance may change places."""
    best = sorted(reference.values(), reverse=True)[: len(items)]
    return all(
        abs(score - reference.get(item, math.inf)) <= _TOLERANCE and abs(score - right) <= _TOLERANCE
        for item, score, right in zip(items, scores, best, strict=False)
    )


def _error_shape(body: Any) -> Iterable[str]:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or error.keys() != {"code", "message"}:
        yield "error without code and message"
    elif any(word in error["message"] for word in ("Traceback", ".py", "raddpo_ext", "/tmp")):
        yield "error tells the inside"
