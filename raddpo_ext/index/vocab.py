"""SIDVocab: how the codes of a semantic ID (SID) become token ids of a language model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _C, _check
from raddpo_ext.index.tokenizer_sids import file_levels, known_ids, left_out, tokenizer_levels


class SIDVocab:
    """Maps code ``c`` of level ``l`` to a token id of the language model, and back.

    By default the levels are consecutive and start at ``offset``: code ``c`` of level ``l`` is token
    ``offset + sizes[0] + .. + sizes[l - 1] + c``. ``offsets`` places each level separately, ``token_ids`` every code.

    Args:
        sizes: number of codes ``K_l`` of each level, at most 2**24 in total.
        offsets: token id of code 0 of each level.
        offset: token id of code 0 of level 0; the other levels follow it. Not with ``offsets`` or ``token_ids``.
        eos: token id that ends every SID, or None. It must not be the token of a code.
        token_ids: for each level the token ids of its codes, ``[K_l]``, -1 for a code without a token. Levels may be
            anywhere in the vocabulary and may overlap. Within a level, token ids are distinct.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> vocab = rx.SIDVocab([4, 4], offset=100, eos=2)
        >>> vocab.encode([[1, 3], [0, 2]])
        tensor([[101, 107,   2],
                [100, 106,   2]])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        offsets: Sequence[int] | None = None,
        offset: int = 0,
        eos: int | None = None,
        token_ids: Sequence[Sequence[int] | Tensor] | None = None,
    ) -> None:
        if not isinstance(sizes, Iterable):
            raise TypeError(f"sizes must be a sequence of integers, got {sizes!r}")
        self.sizes = tuple(_check.integer(size, f"sizes[{i}]", 1) for i, size in enumerate(sizes))
        if not self.sizes:
            raise ValueError("sizes must name at least one level, got ()")
        _check_sizes(self.sizes)
        # The token ids of each level's codes, given in one of three ways.
        if sum((offsets is not None, token_ids is not None, offset != 0)) > 1:
            raise ValueError("give only one of offsets, offset and token_ids")
        if token_ids is not None:
            self.token_ids = self._checked(token_ids)
        else:
            if offsets is None:
                starts = [_check.integer(offset, "offset", 0)]
                for size in self.sizes[:-1]:
                    starts.append(starts[-1] + size)
            else:
                starts = [_check.integer(start, f"offsets[{i}]", 0) for i, start in enumerate(offsets)]
            if len(starts) != len(self.sizes):
                raise ValueError(f"offsets must have one entry per level ({len(self.sizes)}), got {len(starts)}")
            _check_tokens(max(s + k - 1 for s, k in zip(starts, self.sizes, strict=True)))
            self.token_ids = [torch.arange(s, s + k, device="cpu") for s, k in zip(starts, self.sizes, strict=True)]
        # The end token, which no code may share.
        self.eos = None if eos is None else _check.integer(eos, "eos", 0)
        _check_tokens(self.eos or 0)
        for level, ids in enumerate(self.token_ids):
            if self.eos is not None and bool((ids == self.eos).any()):
                raise ValueError(f"eos = {self.eos} is also the token of a code of level {level}")
        # The columns of each level's softmax, as level_columns returns them.
        end = torch.tensor([] if self.eos is None else [self.eos], dtype=torch.int64, device="cpu")
        lists = [torch.cat([ids[ids >= 0], end[: level > 0]]).sort().values for level, ids in enumerate(self.token_ids)]
        lists += [end] if len(end) else []
        counts = torch.tensor([len(ids) for ids in lists], device="cpu")
        self._level_columns = torch.cat(lists).to(torch.int32), counts.cumsum(0) - counts, counts
        self._elsewhere: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        # Per level of _level_columns: begin, length, first token id, and whether the token ids are consecutive.
        self.level_runs = [
            (int(end) - len(ids), len(ids), int(ids[0]), int(ids[-1] - ids[0]) == len(ids) - 1)
            for ids, end in zip(lists, counts.cumsum(0), strict=True)
        ]
        #: The largest token id, ``eos`` included.
        self.max_token = max(int(ids[-1]) for ids in lists)
        #: The tokens that :meth:`from_tokenizer` left out, by ascending token id.
        self.left_out: tuple[str, ...] = ()

    def _checked(self, token_ids: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
        if len(token_ids) != len(self.sizes):
            raise ValueError(f"token_ids must have one entry per level ({len(self.sizes)}), got {len(token_ids)}")
        checked = []
        for level, (ids, size) in enumerate(zip(token_ids, self.sizes, strict=True)):
            tensor = _check.integer_tensor(ids, f"token_ids[{level}]", 1).cpu().clone()
            if tensor.shape != (size,):
                raise ValueError(f"token_ids[{level}] must have shape ({size},), got {tuple(tensor.shape)}")
            if int(tensor.min()) < -1:
                raise ValueError(f"token_ids[{level}] must be >= 0, or -1 for no token, got {int(tensor.min())}")
            _check_tokens(int(tensor.max()))
            # Some code has a token, and no two codes have the same one.
            used = tensor[tensor >= 0].sort().values
            if not len(used):
                raise ValueError(f"token_ids[{level}] must hold at least one token id, got only -1")
            repeats = used[1:][used[1:] == used[:-1]]
            if len(repeats):
                raise ValueError(f"token_ids[{level}] must hold distinct token ids, got {int(repeats[0])} twice")
            checked.append(tensor)
        return checked

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, index_json: str | os.PathLike[str] | None = None, eos: int | None = None
    ) -> SIDVocab:
        """Read the token ids of the codes from a tokenizer that has SID tokens.

        Args:
            tokenizer: a ``transformers`` or ``tokenizers`` tokenizer.
            index_json: file ``{"item": ["<a_12>", "<b_7>", ...], ...}``: the vocab has the codes of its SIDs. Markers
                around a SID are skipped. Default: all SID tokens of the tokenizer, ``<a_12>`` as in LC-Rec, LETTER
                and MiniOneRec or ``<s_a_12>`` as in OneRec. The letter is the level.
            eos: as for the class.

        Returns:
            The vocab. :attr:`left_out` has the tokens of the tokenizer that look like parts of a SID but are neither
            codes of the vocab nor its ``eos``. If there are any, a UserWarning names them.

        Raises:
            ValueError: the file is not such an object, one of its tokens is unknown to the tokenizer or does not end in
                ``_<code>>``, or two of its tokens have the same code. Without a file: the tokenizer has no SID tokens,
                has those of both layouts, or has none for a level.
        """
        ids = known_ids(tokenizer)
        levels = tokenizer_levels(ids) if index_json is None else file_levels(index_json, ids)
        sizes = [max(codes) + 1 for codes in levels]
        _check_sizes(sizes)
        token_ids = [torch.full((size,), -1, device="cpu") for size in sizes]
        for level, codes in zip(token_ids, levels, strict=True):
            level[[*codes]] = torch.tensor([ids[token] for token in codes.values()], device="cpu")
        vocab = cls(sizes, eos=eos, token_ids=token_ids)
        vocab.left_out = left_out(ids, levels, eos)
        if vocab.left_out:
            some = ", ".join(vocab.left_out[:4]) + (", ..." if len(vocab.left_out) > 4 else "")
            warnings.warn(f"the vocab leaves out {len(vocab.left_out)} tokens of the tokenizer: {some}", stacklevel=2)
        return vocab

    @property
    def levels(self) -> int:
        """Number of levels, without the end-of-sequence token."""
        return len(self.sizes)

    def level_columns(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids in each level's softmax: ``(columns, begins, counts)``, int32, int64 and int64.

        Level ``l`` has ``columns[begins[l]:begins[l] + counts[l]]``, ascending: the tokens of its codes and, after the
        first level, ``eos``. With ``eos`` there is one more level, which has ``eos`` alone.
        """
        device = torch.device(device)
        if device.type == "cpu":
            return self._level_columns
        columns, begins, counts = self._level_columns
        if torch.compiler.is_compiling():
            return columns.to(device), begins.to(device), counts.to(device)
        if device not in self._elsewhere:  # cached, because a copy per call would synchronise
            self._elsewhere[device] = columns.to(device), begins.to(device), counts.to(device)
        return self._elsewhere[device]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_elsewhere": {}}

    def encode(self, sids: Any, lengths: Any = None) -> Tensor:
        """Convert codes to token ids.

        Args:
            sids: integer codes ``[N, L]`` with ``L <= levels``. Codes beyond a SID's length are ignored.
            lengths: integer ``[N]`` in ``[0, L]``; default all ``L``.

        Returns:
            int64 ``[N, L]``, or ``[N, L + 1]`` with ``eos`` right after each SID's last code; padded with -1.

        Raises:
            ValueError: a code has no token or is outside its level.
        """
        codes = _check.integer_tensor(sids, "sids", 2)
        device = codes.device
        rows, columns = codes.shape
        if columns > self.levels:
            raise ValueError(f"sids must have at most {self.levels} levels, got shape {tuple(codes.shape)}")
        if lengths is None:
            ends = torch.full((rows,), columns, device=device)
        else:
            ends = _check.lengths(lengths, rows, 0, columns).to(device)
        tokens = self.lookup(codes, ends)
        unknown = (tokens[:, :columns] < 0) & (torch.arange(columns, device=device) < ends[:, None])
        if bool(unknown.any()):
            row, level = unknown.nonzero()[0].tolist()
            code, size = int(codes[row, level]), self.sizes[level]
            why = f"is outside [0, {size})" if not 0 <= code < size else f"has no token in vocab.token_ids[{level}]"
            raise ValueError(f"sids[{row}, {level}] = {code} {why}")
        return tokens

    def lookup(self, codes: Tensor, ends: Tensor) -> Tensor:
        """Like :meth:`encode`, for int64 codes ``[N, L]`` and lengths ``[N]``; -1 for a code without a token."""
        rows, columns = codes.shape
        tokens = codes.new_full((rows, columns + (self.eos is not None)), -1)
        for level in range(min(columns, self.levels)):
            known = (codes[:, level] >= 0) & (codes[:, level] < self.sizes[level]) & (ends > level)
            ids = self.token_ids[level].to(codes.device)[torch.where(known, codes[:, level], 0)]
            tokens[:, level] = torch.where(known, ids, -1)
        if self.eos is not None:
            tokens.scatter_(1, ends[:, None], self.eos)
        return tokens

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SIDVocab):
            return NotImplemented
        same = self.sizes == other.sizes and self.eos == other.eos
        return same and all(torch.equal(a, b) for a, b in zip(self.token_ids, other.token_ids, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SIDVocab(sizes={self.sizes}, eos={self.eos}, first tokens={[int(ids[0]) for ids in self.token_ids]})"


def _check_sizes(sizes: Sequence[int]) -> None:
    if sum(sizes) > _C.MAX_CODES:
        raise ValueError(f"sizes must sum to at most {_C.MAX_CODES}, got {sum(sizes)}")


def _check_tokens(largest: int) -> None:
    if largest > 2**31 - 2:
        raise ValueError(f"token ids must be below 2**31 - 1, got {largest}")
