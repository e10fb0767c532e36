"""Checks of the trainers that its model, tokenizer, vocabulary, index and rows belong together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from transformers.utils import logging

from raddpo_ext.data.pack_sessions import PackedSessions
from raddpo_ext.data.session_sids import SIDCheck, contained
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.integrations.session_collator import SessionCollator

#: Number of rows checked per data set, evenly spread; of a stream, its first rows.
SAMPLED, SAMPLED_OF_STREAM = 256, 32
_FOREIGN = 100  # if none of this many candidates is in the index, it is the wrong index
_TOKENS_OF_A_LEVEL = 4096  # maximum number checked per level, evenly spread

_logger = logging.get_logger(__name__)


def check_vocabulary(vocab: SIDVocab | None, index: TrieIndex | None, vocab_size: int, tokenizer: Any) -> None:
    """Raise ValueError if the SIDs' tokens do not match the model, the index or the tokenizer."""
    if vocab is not None and vocab.max_token >= vocab_size:
        raise ValueError(f"vocab must hold token ids below the model's vocab_size {vocab_size}, got {vocab.max_token}")
    if index is not None:
        if index.vocab is not None and index.vocab != vocab:
            raise ValueError(f"vocab must be the index's, {index.vocab}, got {vocab}")
        if max(index.max_tokens) >= vocab_size:
            raise ValueError(
                f"index must hold token ids below the model's vocab_size {vocab_size}, got {max(index.max_tokens)}"
            )
    if vocab is not None and hasattr(tokenizer, "convert_ids_to_tokens"):
        for level in range(vocab.levels):
            _check_tokenizer(vocab, level, tokenizer)


def check_rows(
    datasets: dict[str, Any],
    collator: Any,
    vocab: SIDVocab | None,
    index: TrieIndex | None,
    *,
    need_index: str,
    check_packed: Callable[[PackedSessions], None],
) -> None:
    """Collate some rows of each data set, and log how many of their candidates the index lacks.

    Args:
        datasets: the data sets by name. A value may be None, or a dict of data sets.
        collator: the trainer's. If it is not a :class:`SessionCollator`, only empty data sets are refused.
        vocab, index: the trainer's, or None.
        need_index: what needs every candidate in the index, such as "normalize = 'trie'", or "". If it is given,
            candidates that the index lacks are refused.
        check_packed: raises ValueError for a packed row that the model cannot take.

    Raises:
        ValueError, TypeError: a data set has no rows, the collator refuses a row, a candidate is not a SID of
            ``vocab``, or the index has none of 100 candidates or more.
    """
    for name, dataset in datasets.items():
        if isinstance(dataset, dict):
            parts = {f"{name}[{key!r}]": part for key, part in dataset.items()}
            check_rows(parts, collator, vocab, index, need_index=need_index, check_packed=check_packed)
        elif dataset is not None:
            _check_dataset(name, dataset, collator, vocab, index, need_index, check_packed)


def _check_dataset(
    name: str,
    dataset: Any,
    collator: Any,
    vocab: SIDVocab | None,
    index: TrieIndex | None,
    need_index: str,
    check_packed: Callable[[PackedSessions], None],
) -> None:
    """:func:`check_rows` for one data set."""
    check = None if vocab is None else SIDCheck(vocab)
    lacking: list[str] = []
    rows = candidates = 0
    for number, row in _sampled(dataset, name):
        rows += 1
        if not isinstance(collator, SessionCollator):
            continue
        # The row by itself: the collator, the model's windows and the vocabulary accept it, or the error names it.
        try:
            packed = collator([row])["packed"]
            check_packed(packed)
            found = list(collator.named_candidates(packed.sessions, [row]))
            for place, tokens in found:
                why = None if check is None else check.why_not(tokens)
                if why is not None:
                    raise ValueError(f"{place} = {tokens} is not a SID of vocab: it {why}")
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{name}[{number}]: {error}") from error
        # Its candidates that the index lacks.
        if index is not None:
            known = contained(index, [tokens for _, tokens in found])
            lacking += [
                f"{name}[{number}]: {place} = {tokens}"
                for (place, tokens), has in zip(found, known, strict=True)
                if not has
            ]
        candidates += len(found)
    # A few candidates may be missing, but not all of many, and none if need_index says so.
    if lacking:
        told = (
            f"{len(lacking)} of {candidates} candidates of {rows} rows of {name} are not in the index, such as "
            f"{lacking[0]}"
        )
        if need_index:
            raise ValueError(f"{told}; {need_index} needs every candidate in the index")
        if len(lacking) == candidates >= _FOREIGN:
            raise ValueError(f"{told}; the index seems to be that of another catalogue")
        _logger.warning(told)


def _sampled(dataset: Any, name: str) -> Iterator[tuple[int, Any]]:
    """Some rows with their numbers. Nothing is read from a stream that can be read only once.

    Raises:
        ValueError: the data set has no rows.
    """
    if hasattr(dataset, "__len__"):
        count = len(dataset)
        numbers = sorted({round(i * (count - 1) / max(SAMPLED - 1, 1)) for i in range(SAMPLED)}) if count else []
        found: Iterator[tuple[int, Any]] = ((number, dataset[number]) for number in numbers)
    elif iter(dataset) is iter(dataset):
        return
    else:
        found = enumerate(islice(iter(dataset), SAMPLED_OF_STREAM))
    number = -1
    for number, row in found:
        yield number, row
    if number < 0:
        raise ValueError(f"{name} must have at least one row, got none")


def _check_tokenizer(vocab: SIDVocab, level: int, tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer lacks tokens of a level, or numbers them otherwise than the codes."""
    # The tokens of the codes, evenly spread if there are many.
    codes = (vocab.token_ids[level] >= 0).nonzero()[:, 0]
    if len(codes) > _TOKENS_OF_A_LEVEL:
        codes = codes[torch.linspace(0, len(codes) - 1, _TOKENS_OF_A_LEVEL).long()]
    ids = vocab.token_ids[level][codes].tolist()
    # Each must be a token of the tokenizer, and not a special one.
    special = {tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id} - {None}
    size = len(tokenizer)
    tokens = []
    for code, token_id in zip(codes.tolist(), ids, strict=True):
        token = tokenizer.convert_ids_to_tokens(token_id) if token_id < size else None
        if token is None or token_id in special:
            what = "none" if token is None else f"{token!r}"
            raise ValueError(
                f"vocab: code {code} of level {level} is token id {token_id}, where the tokenizer has {what}; add "
                "the SIDs' tokens to the tokenizer, or correct the vocab's offsets"
            )
        tokens.append((code, token_id, token))
    # Tokens such as <a_12> are numbered. Most should then have the same prefix, and numbers that follow the codes.
    forms = [re.fullmatch(r"(.*?)(\d+)(\D*)", token, re.DOTALL) for _, _, token in tokens]
    kinds = [
        None if form is None else (form[1], int(form[2]) - code, form[3])
        for form, (code, _, _) in zip(forms, tokens, strict=True)
    ]
    kind, count = Counter(kinds).most_common(1)[0]
    if kind is None or count <= len(kinds) // 2:
        return
    for found, (code, token_id, token) in zip(kinds, tokens, strict=True):
        if found != kind:
            expected = f"{kind[0]}{code + kind[1]}{kind[2]}"
            raise ValueError(
                f"vocab: code {code} of level {level} is token id {token_id}, which the tokenizer reads as {token!r}, "
                f"not as {expected!r}; correct the vocab's offsets and sizes"
            )
