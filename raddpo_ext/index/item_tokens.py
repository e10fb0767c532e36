"""Items as tokens, the same in training and serving: prompts from histories, and the candidates of sessions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.index.item_ids import UnknownItem
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.trie_input import item_ids_of


def history_prompts(
    index: TrieIndex, histories: Sequence[Sequence[int]], *, bos_token_id: int | None = None
) -> list[list[int]]:
    """Build prompts from item histories: ``bos_token_id``, then the tokens of each item's SID, without end tokens.

    ``python -m raddpo_ext serve`` builds the prompt of a request's ``history`` with this function and
    ``model.config.bos_token_id``, so that a model trained on these prompts gets the same ones from the service. Build
    many prompts in one call: every call passes once over all items of the index.

    Args:
        index: the catalogue.
        histories: sequences of integer item ids, one per prompt, oldest first.
        bos_token_id: token id at the start of every prompt, or None.

    Returns:
        One list of token ids per history, for the column ``prompt_ids`` of a session. The prompt of an empty history
        has only ``bos_token_id``.

    Raises:
        ValueError: the index lacks an item id; names the id and its position.
        TypeError: the histories do not hold integers.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [2, 3]], vocab=rx.SIDVocab([4, 4], offset=10, eos=1))
        >>> rx.history_prompts(index, [[1, 0], []], bos_token_id=2)
        [[2, 12, 17, 10, 15], [2]]
    """
    _check.instance(index, "index", TrieIndex)
    start = [] if bos_token_id is None else [_check.integer(bos_token_id, "bos_token_id", 0)]
    rows = [item_ids_of(history, f"histories[{row}]").tolist() for row, history in enumerate(histories)]
    flat = torch.tensor([*chain.from_iterable(rows)], dtype=torch.int64)
    try:
        codes = index.sids_of(flat)
    except UnknownItem as error:
        # Name the history and the position in it.
        row, position = 0, error.position
        while position >= len(rows[row]):
            position -= len(rows[row])
            row += 1
        raise UnknownItem(f"histories[{row}][{position}]", error.item, position) from None
    tokens = iter(_ragged(_encoded(index, codes)[:, : index.sid_levels].masked_fill(codes < 0, -1)))
    return [[*start, *chain.from_iterable(islice(tokens, len(row)))] for row in rows]


def item_tokens(index: TrieIndex, item_ids: Any) -> list[list[int]]:
    """The tokens of each item's SID, with the end token if the index's vocab has one.

    They are what the columns ``positives`` and ``negatives`` of a session hold.

    Args:
        index: the catalogue.
        item_ids: integers ``[K]``.

    Returns:
        ``K`` lists of token ids.

    Raises:
        ValueError: the index lacks an item id; names it.
        TypeError: the ids are not integers.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [2, 3]], vocab=rx.SIDVocab([4, 4], offset=10, eos=1))
        >>> rx.item_tokens(index, [1, 0])
        [[12, 17, 1], [10, 15, 1]]
    """
    _check.instance(index, "index", TrieIndex)
    return _ragged(_encoded(index, index.sids_of(item_ids)))


def _encoded(index: TrieIndex, codes: Tensor) -> Tensor:
    """Token ids ``[K, sid_levels]``, or ``[K, sid_levels + 1]`` with an end token; padded with -1."""
    return codes if index.vocab is None else index.vocab.lookup(codes, (codes >= 0).sum(1))


def _ragged(rows: Tensor) -> list[list[int]]:
    """Each row without its padding."""
    flat = iter(rows[rows >= 0].tolist())
    return [[*islice(flat, count)] for count in (rows >= 0).sum(1).tolist()]
