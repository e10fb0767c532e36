"""From item ids to codes, prompts and candidates: each against a dictionary."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.strategies import Catalogue, catalogues

import raddpo_ext as rx

INDEX = rx.TrieIndex.build([[0, 1], [2, 3], [2, 4]], item_ids=[7, 9, 2**40], vocab=rx.SIDVocab([5, 5], offset=10))


@settings(max_examples=60)
@given(catalogues(), st.integers(0, 2**32 - 1), st.sampled_from([None, 0, 5]))
def test_equals_a_dictionary(catalogue: Catalogue, seed: int, bos: int | None) -> None:
    rng = np.random.default_rng(seed)
    index = rx.TrieIndex.build(**catalogue.arguments())
    ids = catalogue.items()
    if rng.random() < 0.5:  # the places of a restricted index are others
        ids = [item for item in ids if rng.random() < 0.6] or ids[:1]
        index = index.restrict(ids)
    codes = dict(zip(catalogue.items(), catalogue.codes(), strict=True))
    tokens = dict(zip(catalogue.items(), catalogue.tokens(), strict=True))
    histories = [rng.choice(ids, count).tolist() for count in rng.integers(0, 5, rng.integers(0, 6))]
    asked = [item for history in histories for item in history]

    found = index.sids_of(torch.tensor(asked) if asked else asked)
    assert (found.dtype, found.shape) == (torch.int64, (len(asked), index.sid_levels))
    assert found.tolist() == [[*codes[item], *[-1] * (index.sid_levels - len(codes[item]))] for item in asked]
    assert rx.item_tokens(index, asked) == [list(tokens[item]) for item in asked]
    start = [] if bos is None else [bos]
    spoken = {item: list(tokens[item])[: len(codes[item])] for item in asked}  # without an end token
    expected = [[*start, *(token for item in history for token in spoken[item])] for history in histories]
    assert rx.history_prompts(index, histories, bos_token_id=bos) == expected


@pytest.mark.parametrize("unknown", [0, 8, -1, 2**31, 2**32 + 7, 2**40 + 1, 2**63 - 1, -(2**63)])
def test_an_unknown_item_is_named(unknown: int) -> None:
    with pytest.raises(ValueError, match=rf"^item_ids\[2\] = {unknown} is no item of the index$"):
        INDEX.sids_of([7, 9, unknown, 8])
    with pytest.raises(ValueError, match=rf"^item_ids\[0\] = {unknown} is no item of the index$"):
        rx.item_tokens(INDEX, [unknown])
    with pytest.raises(ValueError, match=rf"^histories\[2\]\[1\] = {unknown} is no item of the index$"):
        rx.history_prompts(INDEX, [[7, 9], [], [2**40, unknown], [8]])


def test_the_error_goes_from_one_process_to_another() -> None:
    with pytest.raises(ValueError, match="no item") as raised:
        rx.history_prompts(INDEX, [[7], [9, 8]])
    assert repr(pickle.loads(pickle.dumps(raised.value))) == repr(raised.value)


def test_an_item_that_is_discarded_is_unknown() -> None:
    with pytest.raises(ValueError, match=r"^item_ids\[0\] = 9 is no item of the index$"):
        INDEX.discard([9]).sids_of([9])
    with pytest.raises(ValueError, match=r"^item_ids\[0\] = 9 is no item of the index$"):
        INDEX.restrict([]).sids_of([9])
    assert INDEX.restrict([]).sids_of([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: INDEX.sids_of(["7"]), TypeError, "item_ids must hold integers"),
        (lambda: INDEX.sids_of([7.0]), TypeError, "item_ids must hold integers"),
        (lambda: INDEX.sids_of([[7]]), ValueError, "item_ids must have 1 dimensions"),
        (lambda: INDEX.sids_of(7), ValueError, "item_ids must have 1 dimensions"),
        (lambda: INDEX.sids_of(np.array([7, 2**63], np.uint64)), ValueError, r"item_ids\[1\] = .* exceeds 2\*\*63 - 1"),
        (lambda: rx.history_prompts(INDEX, [[7], ["9"]]), TypeError, r"histories\[1\] must hold integers"),
        (lambda: rx.history_prompts(INDEX, [7, 9]), ValueError, r"histories\[0\] must have 1 dimensions"),  # type: ignore[list-item]
        (lambda: rx.history_prompts(INDEX, [[7]], bos_token_id=-1), ValueError, "bos_token_id must be at least 0"),
        (lambda: rx.history_prompts([[0, 1]], [[7]]), TypeError, "index must be a TrieIndex"),  # type: ignore[arg-type]
        (lambda: rx.item_tokens(INDEX.vocab, [7]), TypeError, "index must be a TrieIndex"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
