"""The tokens of a tokenizer that stand for codes of semantic IDs (SIDs)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raddpo_ext.index.sid_text import TOKEN, is_marker, without_markers

Levels = list[dict[int, str]]  # per level, the token of each code
_CODE = re.compile(r"(.*_)([0-9]{1,10})>", re.DOTALL)


class _Asked(dict[str, int]):
    """Token ids of a tokenizer that cannot list its tokens. Each token is looked up when it is needed."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __contains__(self, token: object) -> bool:
        found = self._tokenizer.convert_tokens_to_ids(token)
        if found is None or found == getattr(self._tokenizer, "unk_token_id", None):
            return False
        self[str(token)] = found
        return True


def known_ids(tokenizer: Any) -> Mapping[str, int]:
    """The id of each token, with added tokens, in ascending order of ids."""
    if hasattr(tokenizer, "get_vocab"):
        ids = dict(sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]))  # get_vocab has no order
        # The unknown token is not a code, even if it is spelled like one.
        ids.pop(getattr(tokenizer, "unk_token", None), None)
        return ids
    if hasattr(tokenizer, "convert_tokens_to_ids"):
        return _Asked(tokenizer)
    raise TypeError(f"tokenizer must be a transformers or tokenizers tokenizer, got {type(tokenizer).__name__}")


def file_levels(path: str | os.PathLike[str], ids: Mapping[str, int]) -> Levels:
    """The tokens of an ``index.json``'s SIDs."""
    try:
        sids = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"index_json: {os.fspath(path)}: not valid JSON: {error}") from None
    if not isinstance(sids, dict) or not all(isinstance(sid, list) for sid in sids.values()):
        raise ValueError(f'index_json: {os.fspath(path)}: expected an object {{"item": ["<a_12>", ...], ...}}')
    # Enter each token once: files repeat few tokens many times.
    levels: Levels = []
    seen: list[set[str]] = []
    for sid in sids.values():
        for level, token in enumerate(without_markers(sid)):
            if level == len(levels):
                levels.append({})
                seen.append(set())
            if not isinstance(token, str) or token not in seen[level]:
                _add(levels[level], token, ids)
                seen[level].add(token)
    if not levels:
        raise ValueError(f"index_json: {os.fspath(path)}: holds no SIDs")
    return levels


def _add(codes: dict[int, str], token: Any, ids: Mapping[str, int]) -> None:
    """Enter a token of a file under its code."""
    match = _CODE.fullmatch(token) if isinstance(token, str) else None
    if match is None:
        raise ValueError(f"index_json: token {token!r} does not end in _<code>>")
    if token not in ids:
        raise ValueError(f"index_json: the tokenizer does not know token {token!r}")
    other = codes.setdefault(int(match[2]), token)
    if other != token:
        raise ValueError(f"index_json: tokens {other!r} and {token!r} of one level have the same code")


def tokenizer_levels(ids: Mapping[str, int]) -> Levels:
    """All SID tokens of a tokenizer that lists its tokens."""
    if isinstance(ids, _Asked):
        raise ValueError("index_json must be given for a tokenizer without get_vocab()")
    found = [match for match in map(TOKEN.fullmatch, ids) if match]
    if not found:
        raise ValueError("the tokenizer has no SID tokens such as '<a_12>' or '<s_a_12>'")
    # One layout: tokens of two would be two sets of codes.
    prefixes = {match[1]: match[0] for match in found}
    if len(prefixes) > 1:
        some = " and ".join(map(repr, prefixes.values()))
        raise ValueError(f"the tokenizer has SID tokens of two layouts, {some}: give index_json to choose between them")
    # The token of each code, by level.
    by_letter: dict[str, dict[int, str]] = {}
    for match in found:
        codes = by_letter.setdefault(match[2], {})
        other = codes.setdefault(int(match[3]), match[0])
        if other != match[0]:
            raise ValueError(f"the tokenizer's tokens {other!r} and {match[0]!r} have the same code")
    # The levels are the letters from a on, without a gap.
    letters = "".join(sorted(by_letter))
    if letters != "abcdefghijklmnopqrstuvwxyz"[: len(letters)]:
        missing = next(letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in letters)
        last = by_letter[letters[-1]]
        raise ValueError(
            f"the tokenizer has the SID token {last[min(last)]!r} but none of level {missing!r}: give index_json to "
            "choose the tokens"
        )
    return [by_letter[letter] for letter in letters]


def left_out(ids: Mapping[str, int], levels: Levels, eos: int | None) -> tuple[str, ...]:
    """Tokens that look like parts of a SID but are neither codes nor ``eos``, in ascending order of ids."""
    used = {token for codes in levels for token in codes.values()}
    # A token looks like a code if it has the spelling of one of the vocab's, or of a public layout.
    stems = {match[1] for token in used if (match := _CODE.fullmatch(token))}

    def looks(token: str) -> bool:
        match = _CODE.fullmatch(token)
        return is_marker(token) or (match is not None and (match[1] in stems or TOKEN.fullmatch(token) is not None))

    return tuple(token for token in ids if looks(token) and token not in used and ids[token] != eos)
