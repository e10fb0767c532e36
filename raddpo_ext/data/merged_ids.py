"""Merged ids: one id that stands for a whole SID of a prompt, as ``TokenMerger`` reads it."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.index.vocab import SIDVocab

_MAX_MERGED = 2**62  # merged ids and tokens together fit into int64
_NO_TOKEN = 2**31 - 1  # beyond any table, so that a look-up fails


class MergedIds:
    """Converts between the tokens of SIDs and merged ids. It holds no weights, so data loaders may send it to workers.

    A SID has one digit per level: its code + 1, or 0 beyond its last code. Its merged id is ``vocab_size`` plus the
    number that has these digits, the first level's first. Ids below ``vocab_size`` are tokens.

    Args:
        vocab: the SIDs' tokens.
        vocab_size: number of rows of the model's embedding table.

    Raises:
        ValueError, TypeError: a token of ``vocab`` is beyond the table, or there are more than 2**62 SIDs.
    """

    def __init__(self, vocab: SIDVocab, vocab_size: int) -> None:
        _check.instance(vocab, "vocab", SIDVocab)
        self.vocab = vocab
        self.vocab_size = _check.integer(vocab_size, "vocab_size", 1)
        if vocab.max_token >= self.vocab_size:
            raise ValueError(
                f"vocab must hold token ids below {self.vocab_size}, the rows of the embedding table, got "
                f"{vocab.max_token}"
            )
        #: Number of digits per level, and what one digit counts.
        self.radices = tuple(size + 1 for size in vocab.sizes)
        self.strides = tuple(math.prod(self.radices[level + 1 :]) for level in range(len(self.radices)))
        if math.prod(self.radices) > _MAX_MERGED:
            raise ValueError(f"vocab must have at most 2**62 SIDs, got levels of {vocab.sizes} codes")
        #: The first id that is too large.
        self.end = self.vocab_size + math.prod(self.radices)
        #: Number of codes with a token per level.
        self.counts = tuple(int((ids >= 0).sum()) for ids in vocab.token_ids)
        #: The tokens of all codes that have one, int64 ``[U + 1]``, level by level, after a placeholder.
        self.tokens = torch.cat([torch.zeros(1, dtype=torch.int64), *(ids[ids >= 0] for ids in vocab.token_ids)])
        #: For each digit of each level, in one row, its place in ``tokens``: 0 for no code, 2**31 - 1 for no token.
        self.places = torch.full((sum(self.radices),), _NO_TOKEN)
        first = 1
        self._digits: list[dict[int, int]] = []  # per level: token -> digit
        for begin, ids, count in zip(self.begins, vocab.token_ids, self.counts, strict=True):
            digits = (ids >= 0).nonzero()[:, 0] + 1
            self.places[begin] = 0
            self.places[begin + digits] = torch.arange(first, first + count)
            self._digits.append(dict(zip(ids[ids >= 0].tolist(), digits.tolist(), strict=True)))
            first += count

    @property
    def begins(self) -> tuple[int, ...]:
        """The begin of each level in :attr:`places`."""
        return tuple(accumulate(self.radices[:-1], initial=0))

    def places_of(self, ids: Tensor, places: Tensor) -> Tensor:
        """The places of each id's codes in :attr:`tokens`, int64 ``[..., L]``; 2**31 - 1 for what no SID has.

        Args:
            ids: int64, any shape. Those of tokens have no codes: 0.
            places: :attr:`places`, on the device of ``ids``.
        """
        rest = (ids - self.vocab_size).clamp(min=0)
        digits = zip(self.begins, self.strides, self.radices, strict=True)
        found = torch.stack([places[begin + rest // stride % radix] for begin, stride, radix in digits], -1)
        # The codes are those of the first levels, at least one.
        gap = (found[..., 1:] > 0) & (found[..., :-1] == 0)
        wrong = (ids >= self.end) | gap.any(-1) | ((ids >= self.vocab_size) & (found[..., 0] == 0))
        return found.masked_fill(wrong[..., None], _NO_TOKEN)

    def wrong(self, ids: Tensor) -> Tensor:
        """Whether an id is neither a token nor that of a SID: bool, the shape of ``ids``, on the CPU."""
        return (ids < 0) | (self.places_of(ids, self.places) == _NO_TOKEN).any(-1)

    def why_not(self, number: int) -> str:
        """The end of a sentence that says what is wrong with an id."""
        if not self.vocab_size <= number < self.end:
            return f"is outside [0, {self.end}), the tokens and the merged SIDs"
        digits = [(number - self.vocab_size) // s % radix for s, radix in zip(self.strides, self.radices, strict=True)]
        codes = [digit - 1 for digit in digits]
        return f"merges the codes {codes}, which is not a SID of vocab (-1: no code)"

    def merge(self, ids: Any, name: str = "prompt_ids") -> list[int]:
        """Replace each SID by its merged id; see :meth:`raddpo_ext.TokenMerger.merge`. ``name`` is for errors."""
        tokens = [] if isinstance(ids, list) and not ids else _check.integer_array(ids, name, 1).tolist()
        merged: list[int] = []
        place = 0
        while place < len(tokens):
            number, level = self.vocab_size, 0
            for digits, stride in zip(self._digits, self.strides, strict=True):
                digit = digits.get(tokens[place + level]) if place + level < len(tokens) else None
                if digit is None:
                    break
                number, level = number + digit * stride, level + 1
            merged.append(number if level else tokens[place])
            place += max(level, 1)
        return merged

    def split(self, ids: Any) -> list[int]:
        """Replace each merged id by its tokens; see :meth:`raddpo_ext.TokenMerger.split`."""
        numbers = torch.tensor([], dtype=torch.int64)
        if not (isinstance(ids, list) and not ids):
            numbers = _check.integer_tensor(ids, "ids", 1).cpu()
        wrong = self.wrong(numbers)
        _check.none(wrong, lambda i: f"ids[{i}] = {int(numbers[i])} {self.why_not(int(numbers[i]))}")
        tokens: list[int] = []
        for number, places in zip(numbers.tolist(), self.places_of(numbers, self.places), strict=True):
            tokens += [number] if number < self.vocab_size else self.tokens[places[places > 0]].tolist()
        return tokens
