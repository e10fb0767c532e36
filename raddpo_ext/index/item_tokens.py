"""Items as a model reads them, for training and serving alike: a history's prompt, and candidates of a session."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.trie_input import item_ids_of
from raddpo_ext.index.trie_items import UnknownItem, codes_of_items


def history_prompts(
    index: TrieIndex, histories: Sequence[Sequence[int]], *, bos_token_id: int | None = None
) -> list[list[int]]:
    """The prompts of people who had these items: ``bos_token_id``, then the SIDs' tokens one after another.

    End tokens are left out. ``python -m raddpo_ext serve`` makes the prompt of a request's ``history`` by this
    function, with ``model.config.bos_token_id``: a model trained on what it gives is asked in the same words. Make many
    prompts in one call, which passes once over the index's items.

    Args:
        index: the catalogue.
        histories: item ids of each prompt, oldest first.
        bos_token_id: the token that opens every prompt, or None for no such token.

    Returns:
        A list of token ids a history, as the column ``prompt_ids`` of a session wants it. That of an empty history is
        empty but for ``bos_token_id``.

    Raises:
        ValueError: an id that the index lacks, naming it and where it stands.
        TypeError: not integers.
    """
    _check.instance(index, "index", TrieIndex)
    start = [] if bos_token_id is None else [_check.integer(bos_token_id, "bos_token_id", 0)]
    rows = [item_ids_of(history, f"histories[{row}]").tolist() for row, history in enumerate(histories)]
    flat = torch.tensor([*chain.from_iterable(rows)], dtype=torch.int64)
    try:
        codes = codes_of_items(index, flat, "histories")
    except UnknownItem as error:
        row, position = 0, error.position
        while position >= len(rows[row]):
            position -= len(rows[row])
            row += 1
        raise UnknownItem(f"histories[{row}][{position}]", error.item, position) from None
    tokens = iter(_ragged(_encoded(index, codes)[:, : index.sid_levels].masked_fill(codes < 0, -1)))
    return [[*start, *chain.from_iterable(islice(tokens, len(row)))] for row in rows]


def item_tokens(index: TrieIndex, item_ids: Any) -> list[list[int]]:
    """The tokens of each item's SID, as the columns ``positives`` and ``negatives`` of a session want them: with the
    end token, if the index's vocab has one.

    Args:
        index: the catalogue.
        item_ids: integers ``[K]``.

    Returns:
        ``K`` lists of token ids.

    Raises:
        ValueError: an id that the index lacks, naming it.
        TypeError: not integers.
    """
    _check.instance(index, "index", TrieIndex)
    return _ragged(_encoded(index, index.sids_of(item_ids)))


def _encoded(index: TrieIndex, codes: Tensor) -> Tensor:
    """Token ids ``[K, sid_levels]``, one column more with an end token, padded with -1."""
    return codes if index.vocab is None else index.vocab.lookup(codes, (codes >= 0).sum(1))


def _ragged(rows: Tensor) -> list[list[int]]:
    """Each row without its padding."""
    flat = iter(rows[rows >= 0].tolist())
    return [[*islice(flat, count)] for count in (rows >= 0).sum(1).tolist()]
