"""SIDVocab: codes to token ids, given in every way."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from support.strategies import Catalogue, catalogues

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


LAYOUTS = {
    "LC-Rec": ["<a_0>", "<a_1>", "<a_10>", "<b_0>", "<b_2>", "<c_5>", "<d_1>"],
    "OneRec": ["<s_a_0>", "<s_a_1>", "<s_a_10>", "<s_b_0>", "<s_b_2>", "<s_c_5>", "<|sid_begin|>", "<|sid_end|>"],
}
CODES = [[0, 1, 10], [0, 2], [5], [1]]


def words(tokens: list[str], wrapped: bool = True) -> Any:
    """A tokenizer of words with these tokens added behind them."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers, which comes with transformers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a_7": 1, "s": 2}, unk_token="<unk>"))
    inner.add_tokens(tokens)
    if not wrapped:
        return inner
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_tokenizer_alone(layout: str, wrapped: bool) -> None:
    tokens = LAYOUTS[layout]
    markers = tokens[6:] if layout == "OneRec" else []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vocab = rx.SIDVocab.from_tokenizer(words(tokens, wrapped))
    levels = CODES[: 3 if layout == "OneRec" else 4]
    assert vocab.sizes == tuple(max(codes) + 1 for codes in levels)
    assert [ids[ids >= 0].tolist() for ids in vocab.token_ids] == (
        [[3, 4, 5], [6, 7], [8]] if markers else [[3, 4, 5], [6, 7], [8], [9]]
    )
    assert [(ids >= 0).nonzero()[:, 0].tolist() for ids in vocab.token_ids] == levels
    assert vocab.left_out == tuple(markers)
    assert [str(warning.message) for warning in caught] == (
        ["the vocab leaves out 2 tokens of the tokenizer: <|sid_begin|>, <|sid_end|>"] if markers else []
    )


def test_an_end_marker_may_be_eos() -> None:
    tokens = LAYOUTS["OneRec"]
    with pytest.warns(UserWarning, match=r"leaves out 1 tokens of the tokenizer: <\|sid_begin\|>$"):
        vocab = rx.SIDVocab.from_tokenizer(words(tokens), eos=10)
    assert vocab.encode([[10, 2, 5]]).tolist() == [[5, 7, 8, 10]]


def test_from_tokenizer_with_a_catalogue_of_onerec(tmp_path: Path) -> None:
    """The catalogue's codes alone, its markers passed over; what the tokenizer has more is named."""
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"B0": ["<|sid_begin|>", "<s_a_10>", "<s_b_2>", "<|sid_end|>"]}))
    with pytest.warns(UserWarning, match="leaves out 6 tokens of the tokenizer: <s_a_0>, <s_a_1>, <s_b_0>, <s_c_5>, "):
        vocab = rx.SIDVocab.from_tokenizer(words(LAYOUTS["OneRec"]), path)
    assert vocab.encode([[10, 2]]).tolist() == [[5, 7]]
    assert vocab.left_out == ("<s_a_0>", "<s_a_1>", "<s_b_0>", "<s_c_5>", "<|sid_begin|>", "<|sid_end|>")


@pytest.mark.parametrize(
    ("tokens", "sid", "message"),
    [
        (["<x>"], None, "the tokenizer has no SID tokens"),
        (["<a_0>", "<s_a_0>"], None, "SID tokens of two layouts, '<a_0>' and '<s_a_0>'"),
        (["<a_0>", "<c_4>"], None, "has the SID token '<c_4>' but none of level 'b'"),
        (["<a_1>", "<a_01>"], None, "tokens '<a_1>' and '<a_01>' have the same code"),
        (["<a_1>", "<a_01>"], ["<a_1>", "<a_01>"], ""),  # of two levels: each its own
        (["<a_1>"], ["<a_2>"], "the tokenizer does not know token '<a_2>'"),
        (["<a_1>"], ["<unk>"], "token '<unk>' does not end in"),
        (["<a_1>"], ["<a_1>\n"], "does not end in"),
        (["<a_1>"], [["<a_1>"]], "does not end in"),
        (["<a_1>"], ["<|sid_begin|>"], "holds no SIDs"),
    ],
)
def test_from_tokenizer_refuses(tmp_path: Path, tokens: list[str], sid: list[Any] | None, message: str) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"0": sid}))
    if not message:
        assert rx.SIDVocab.from_tokenizer(words(tokens), path).sizes == (2, 2)
        return
    with pytest.raises(ValueError, match=message):
        rx.SIDVocab.from_tokenizer(words(tokens), None if sid is None else path)


def test_two_tokens_of_one_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"0": ["<a_1>"], "1": ["<s_a_1>"]}))
    with pytest.raises(ValueError, match="'<a_1>' and '<s_a_1>' of one level have the same code"):
        rx.SIDVocab.from_tokenizer(words(["<a_1>", "<s_a_1>"]), path)
    with pytest.raises(TypeError, match="tokenizer must be a transformers or tokenizers tokenizer, got str"):
        rx.SIDVocab.from_tokenizer("folder", path)
    with pytest.raises(ValueError, match="index_json must be given"):
        rx.SIDVocab.from_tokenizer(FakeTokenizer(SIDS))
