"""What a batch of sessions holds, as Python lists: for the functions that are written to be read."""

from __future__ import annotations

from raddpo_ext.losses.session import SessionBatch

Sid = tuple[int, ...]


def sids_of(sessions: SessionBatch) -> list[Sid]:
    rows = zip(sessions.tokens.tolist(), sessions.lengths.tolist(), strict=True)
    return [tuple(row[:length]) for row, length in rows]


def positive_rows(sessions: SessionBatch, session: int) -> list[int]:
    first = int(sessions.offsets[session])
    return list(range(first, first + int(sessions.num_positives[session])))


def negative_rows(sessions: SessionBatch, session: int) -> range:
    return range(
        int(sessions.offsets[session]) + int(sessions.num_positives[session]), int(sessions.offsets[session + 1])
    )


def common_prefix(a: Sid, b: Sid) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
