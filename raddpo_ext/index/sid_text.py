"""Semantic IDs (SIDs) as text, in the layouts of public models and as plain codes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

#: A token of a SID: its layout's prefix, its level's letter and its code. ``<a_12>`` is of LC-Rec, LETTER and
#: MiniOneRec, ``<s_a_12>`` of OneRec.
TOKEN = re.compile(r"<(s_)?([a-z])_([0-9]{1,10})>")
#: A marker before or after a SID, such as ``<|sid_begin|>`` and ``<|sid_end|>`` of OneRec.
MARKER = re.compile(r"<\|?sid_(?:begin|start|end)\|?>")
LARGEST_CODE = 2**31 - 2
MOST_LEVELS = 32
_PLAIN = re.compile(r"\[?\s*([0-9]+(?:(?P<between>\s*,\s*|\s+|[-_/|:;])[0-9]+(?:(?P=between)[0-9]+)*)?)\s*\]?")


def code_of(token: Any, level: int) -> int:
    """The code of a token at a level, counted from 0.

    Raises:
        ValueError: the value is not a SID token, or its letter is that of another level.
    """
    match = TOKEN.fullmatch(token) if isinstance(token, str) else None
    if match is None or int(match[3]) > LARGEST_CODE:
        raise ValueError(f"level {level}: expected a token such as '<a_12>', got {shown(token)}")
    if ord(match[2]) - ord("a") != level:
        prefix = match[1] or ""
        letter = chr(ord("a") + level)
        expected = f"expected <{prefix}{letter}_..>" if level < 26 else "at most 26 levels have a letter"
        raise ValueError(f"level {level}: token {token!r} is of another level, {expected}")
    return int(match[3])


def without_markers(tokens: Sequence[Any]) -> Sequence[Any]:
    """A SID's tokens without the markers at its two ends."""
    begin = bool(tokens) and is_marker(tokens[0])
    end = len(tokens) > 1 and is_marker(tokens[-1])
    return tokens[begin : len(tokens) - end]


def is_marker(token: Any) -> bool:
    return isinstance(token, str) and MARKER.fullmatch(token) is not None


def codes_of(sid: Any) -> list[int]:
    """The codes of a SID: ``"<a_12><b_7>"``, ``"12,7"`` (also separated by blanks, ``-``, ``_``, ``/``, ``|``,
    ``:`` or ``;``, or in brackets), or a list of such tokens or of integers.

    Raises:
        ValueError: the value is not a SID of 1 to 32 codes.
    """
    if isinstance(sid, str):
        text = sid.strip()
        if plain := _PLAIN.fullmatch(text):
            sid = [int(number) for number in re.findall("[0-9]{1,11}", plain[1])]
        else:
            sid = re.findall(r"<[^<>]*>|[^<]+", re.sub(r">\s+<", "><", text))
    if not isinstance(sid, list) or not sid:
        raise ValueError(f"expected a SID such as '<a_12><b_7>' or '12,7', got {shown(sid)}")
    if all(type(code) is int for code in sid):
        if not 0 <= min(sid) <= max(sid) <= LARGEST_CODE:
            raise ValueError(f"codes must be from 0 to {LARGEST_CODE}, got {shown(sid)}")
        codes = sid
    else:
        tokens = without_markers(sid)
        if not tokens:
            raise ValueError(f"expected at least one code, got {shown(sid)}")
        codes = [code_of(token, level) for level, token in enumerate(tokens)]
    if len(codes) > MOST_LEVELS:
        raise ValueError(f"a SID has at most {MOST_LEVELS} codes, got {len(codes)}")
    return codes


def shown(value: Any) -> str:
    """A value as errors show it: at most 60 characters."""
    try:
        text = repr(value)
    except RecursionError:  # JSON can be nested too deeply for repr
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
