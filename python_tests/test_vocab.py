"""SIDVocab: codes to token ids, given in every way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import Catalogue, catalogues

import raddpo_ext as rx


def test_levels_follow_one_another() -> None:
    vocab = rx.SIDVocab([3, 2], offset=10)
    assert [ids.tolist() for ids in vocab.token_ids] == [[10, 11, 12], [13, 14]]
    assert vocab.levels == 2
    assert vocab.encode([[2, 0], [0, 1]]).tolist() == [[12, 13], [10, 14]]


def test_offsets_place_each_level() -> None:
    vocab = rx.SIDVocab([3, 2], offsets=[100, 50], eos=7)
    assert vocab.encode([[2, 0], [0, 1]]).tolist() == [[102, 50, 7], [100, 51, 7]]


def test_eos_follows_the_last_code() -> None:
    vocab = rx.SIDVocab([3, 2], eos=9)
    sids = np.array([[2, 0], [0, 99], [-5, 99]], np.int16)
    assert vocab.encode(sids, lengths=[2, 1, 0]).tolist() == [[2, 3, 9], [0, 9, -1], [9, -1, -1]]
    assert vocab.encode(torch.tensor([[1]])).tolist() == [[1, 9]]


@given(catalogues(tables=("contiguous", "overlapping", "scattered", "lexicographic", "gaps")))
def test_encode_equals_a_dictionary(catalogue: Catalogue) -> None:
    assert catalogue.vocab is not None
    tokens = catalogue.vocab.encode(catalogue.sids, catalogue.lengths)
    assert [tuple(token for token in row if token >= 0) for row in tokens.tolist()] == catalogue.tokens()


@given(catalogues())
def test_index_gives_its_vocab_back(catalogue: Catalogue) -> None:
    assert rx.TrieIndex.build(**catalogue.arguments()).vocab == catalogue.vocab


def test_equality() -> None:
    assert rx.SIDVocab([3, 2], offset=4) == rx.SIDVocab([3, 2], offsets=[4, 7])
    assert rx.SIDVocab([3, 2]) == rx.SIDVocab([3, 2], token_ids=[[0, 1, 2], torch.tensor([3, 4])])
    assert rx.SIDVocab([3, 2]) != rx.SIDVocab([3, 2], eos=5)
    assert rx.SIDVocab([3, 2]) != rx.SIDVocab([3, 2], offset=1)
    assert rx.SIDVocab([3]) != [3]
    assert "sizes=(3, 2)" in repr(rx.SIDVocab([3, 2]))


class FakeTokenizer:
    """Token ids as public checkpoints give them: used tokens only, in lexicographic order."""

    unk_token_id = 0

    def __init__(self, sids: list[list[str]]) -> None:
        self.ids = {token: 50 + i for i, token in enumerate(sorted({token for sid in sids for token in sid}))}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.ids.get(token, self.unk_token_id)


SIDS = [["<a_0>", "<b_10>"], ["<a_2>", "<b_9>"], ["<a_10>", "<b_10>"]]


def test_from_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps(dict(enumerate(SIDS))))
    vocab = rx.SIDVocab.from_tokenizer(FakeTokenizer(SIDS), path, eos=3)
    assert vocab.sizes == (11, 11)
    assert vocab.eos == 3
    assert vocab.token_ids[0].tolist() == [50, -1, 52, -1, -1, -1, -1, -1, -1, -1, 51]
    assert vocab.encode([[10, 9]]).tolist() == [[51, 54, 3]]


@pytest.mark.parametrize(("sids", "message"), [([["<a_0>", "<c_1>"]], "<c_1>"), ([["<a_0>", "hat"]], "hat")])
def test_from_tokenizer_refuses_foreign_tokens(tmp_path: Path, sids: list[list[str]], message: str) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps(dict(enumerate(sids))))
    with pytest.raises(ValueError, match=message):
        rx.SIDVocab.from_tokenizer(FakeTokenizer(SIDS), path)
