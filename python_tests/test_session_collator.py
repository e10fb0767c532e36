"""SessionCollator: rows of token ids and of text to packed batches."""

from __future__ import annotations

import logging
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import raddpo_ext as rx
from raddpo_ext.integrations.transformers import SessionCollator

ROW = {"prompt_ids": [5, 6, 7], "positives": [[1, 2], [3]], "negatives": [[1, 4]]}
token_lists = st.lists(st.integers(0, 99), min_size=1, max_size=5)
rows_of_tokens = st.lists(
    st.fixed_dictionaries(
        {
            "prompt_ids": token_lists,
            "positives": st.lists(token_lists, max_size=3),
            "negatives": st.lists(token_lists, max_size=3),
        }
    ),
    min_size=1,
    max_size=4,
)


def candidates_of(sessions: rx.SessionBatch) -> list[list[list[int]]]:
    """Of each session its candidates' tokens."""
    rows = [row[:length].tolist() for row, length in zip(sessions.tokens, sessions.lengths.tolist(), strict=True)]
    offsets = sessions.offsets.tolist()
    return [rows[begin:end] for begin, end in pairwise(offsets)]


def assert_equal(found: Any, expected: Any) -> None:
    for name in ("input_ids", "position_ids", "ends", "predictors", "prompt_starts", "prompt_lengths"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("tokens", "lengths", "offsets", "num_positives"):
        assert torch.equal(getattr(found.sessions, name), getattr(expected.sessions, name)), name


@given(rows=rows_of_tokens, trie=st.booleans(), left=st.booleans(), embeddings=st.booleans())
def test_rows_of_tokens(rows: list[dict[str, Any]], trie: bool, left: bool, embeddings: bool) -> None:
    options: dict[str, Any] = {
        "layout": "trie" if trie else "candidates",
        "padding_side": "left" if left else "right",
        "embeddings": embeddings,
        "pad_token_id": 3,
        "pad_to_multiple_of": 4,
    }
    batch = SessionCollator(**options)(rows)
    assert batch.keys() == {"packed"}
    packed = batch["packed"]
    assert candidates_of(packed.sessions) == [row["positives"] + row["negatives"] for row in rows]
    assert packed.sessions.num_positives.tolist() == [len(row["positives"]) for row in rows]
    assert_equal(packed, rx.pack_sessions([row["prompt_ids"] for row in rows], packed.sessions, **options))
    prompts, mask = packed.prompts()
    unpadded = [ids[keep.bool()].tolist() for ids, keep in zip(prompts, mask, strict=True)]
    assert unpadded == [row["prompt_ids"] for row in rows]


def test_arrays_and_tensors() -> None:
    arrays = {
        "prompt_ids": np.array([5, 6, 7], np.int32),
        "positives": [np.array([1, 2]), torch.tensor([3])],
        "negatives": np.array([[1, 4]]),
    }
    tensors = {"prompt_ids": torch.tensor([5, 6, 7]), "positives": [[1, 2], [3]], "negatives": torch.tensor([[1, 4]])}
    expected = SessionCollator()([ROW, ROW])["packed"]
    assert_equal(SessionCollator()([arrays, tensors])["packed"], expected)


def test_items() -> None:
    batch = SessionCollator()([{**ROW, "items": [7, 9]}, ROW, {**ROW, "items": []}])
    assert batch["items"].tolist() == [[7, 9], [-1, -1], [-1, -1]]


def test_truncation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Prompts lose their first tokens, with a vocabulary whole SIDs; candidates lose none."""
    collate = SessionCollator(max_length=5)
    rows = [{**ROW, "prompt_ids": list(range(10, 20))}, ROW]
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            packed = collate(rows)["packed"]
    assert packed.num_truncated == 1
    assert packed.input_ids[0, :3].tolist() == [17, 18, 19]
    assert candidates_of(packed.sessions) == [[[1, 2], [3], [1, 4]]] * 2
    assert [record.getMessage()[:50] for record in caplog.records] == [
        "1 of 2 prompts of a batch exceeded max_length = 5 "
    ]
    vocab = rx.SIDVocab([10, 10], offsets=[10, 20])
    rows[0]["prompt_ids"] = [10, 20, 11, 21, 12, 22]
    assert SessionCollator(max_length=5, vocab=vocab)(rows)["packed"].prompt_lengths.tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"max_length = 2 leaves prompts\[0\] no token"):
        SessionCollator(max_length=2)(rows)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ([1, 2], TypeError, r"rows\[1\] must be a dict, got list"),
        ({"prompt_ids": [1]}, ValueError, r"rows\[1\] has no column 'positives', only \['prompt_ids'\]"),
        ({"prompt": "a", "chosen": "b"}, ValueError, r"rows\[1\] holds text .* which needs a tokenizer"),
        ({**ROW, "prompt_ids": []}, ValueError, r"prompts\[1\] must have at least one token"),
        ({**ROW, "prompt_ids": [4, -2]}, ValueError, r"prompts\[1\]\[1\] must be at least 0, got -2"),
        ({**ROW, "prompt_ids": [0.5]}, TypeError, r"prompts\[1\] must hold integers, got float64"),
        (
            {**ROW, "positives": [[1], []]},
            ValueError,
            r"rows\[1\]\['positives'\]\[1\] must have at least one token, got none",
        ),
        ({**ROW, "positives": [1, 2]}, (TypeError, ValueError), r"rows\[1\]\['positives'\]\[0\] must have 1 dimension"),
        ({**ROW, "negatives": [[1], [2.5]]}, TypeError, r"rows\[1\]\['negatives'\]\[1\] must hold integers"),
        ({**ROW, "negatives": [[1], ["a"]]}, TypeError, r"rows\[1\]\['negatives'\]\[1\] must hold integers"),
        (
            {**ROW, "negatives": [[1], [3, -7]]},
            ValueError,
            r"rows\[1\]\['negatives'\]\[1\] must hold token ids of at least 0, got -7",
        ),
        ({**ROW, "negatives": [None]}, TypeError, r"rows\[1\]\['negatives'\]\[0\] must hold integers"),
        ({**ROW, "negatives": None}, TypeError, r"rows\[1\]\['negatives'\] must be a list of candidates, got None"),
        ({**ROW, "negatives": [[90]]}, ValueError, r"rows\[1\] holds token id 90, outside \[0, 80\)"),
        ({**ROW, "prompt_ids": [3, 91]}, ValueError, r"rows\[1\] holds token id 91, outside \[0, 80\)"),
    ],
)
def test_bad_rows(row: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        SessionCollator(vocab_size=80, embeddings=False)([ROW, row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "tree"}, "layout must be one of"),
        ({"padding_side": "top"}, "padding_side must be one of"),
        ({"pad_token_id": -1}, "pad_token_id must be at least 0"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SessionCollator(**options)


def test_workers() -> None:
    rows = [{**ROW, "prompt_ids": [5] * (1 + i % 4), "items": [i]} for i in range(12)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate = SessionCollator(max_length=5, vocab=rx.SIDVocab([9, 9]))
        batches = list(DataLoader(rows, batch_size=4, num_workers=2, collate_fn=collate))
    for i, batch in enumerate(batches):
        assert_equal(batch["packed"], collate(rows[4 * i : 4 * i + 4])["packed"])
        assert batch["items"].tolist() == [[item] for item in range(4 * i, 4 * i + 4)]
        assert batch["packed"].num_truncated == 1


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of words; it begins a text with 1 and has 2 for the end, and a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", "a", "b", "c", "d", "x", "y"]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
    )
    return fast


def test_text(tokenizer: Any) -> None:
    """TRL's columns, one completion or several; the rest of the row stays."""
    rows = [
        {"prompt": "x y", "chosen": "a b", "rejected": ["a c", "d"], "items": [4]},
        {"prompt": "y", "chosen": ["a", "b"], "rejected": []},
        ROW,
    ]
    batch = SessionCollator(tokenizer=tokenizer)(rows)
    packed = batch["packed"]
    assert packed.prompts()[0].tolist() == [[1, 11, 12], [1, 12, 0], [5, 6, 7]]
    assert candidates_of(packed.sessions) == [[[7, 8], [7, 9], [10]], [[7], [8]], [[1, 2], [3], [1, 4]]]
    assert packed.sessions.num_positives.tolist() == [1, 2, 2]
    assert batch["items"].tolist() == [[4], [-1], [-1]]
    ending = SessionCollator(tokenizer=tokenizer, vocab=rx.SIDVocab([4, 4], offset=7, eos=2))
    rows[1]["chosen"] = ["a </s>", "b"]
    packed = ending(rows[:2])["packed"]
    assert candidates_of(packed.sessions) == [[[7, 8, 2], [7, 9, 2], [10, 2]], [[7, 2], [8, 2]]]


def test_conversations(tokenizer: Any) -> None:
    def says(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    asked = [{"role": "user", "content": "x y"}]
    rows = [
        {"prompt": asked, "chosen": says("a b"), "rejected": [says("c"), says("d")]},
        {"prompt": asked, "chosen": [says("a")], "rejected": []},
    ]
    packed = SessionCollator(tokenizer=tokenizer)(rows)["packed"]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert packed.prompts()[0].tolist() == [prompt, prompt]
    assert candidates_of(packed.sessions) == [[[7, 8, 2], [9, 2], [10, 2]], [[7, 2]]]
    whole = tokenizer.apply_chat_template(asked + says("a b"), return_dict=False)
    assert whole == [*prompt, 7, 8, 2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": "a"}, r"rows\[0\] has no column 'rejected'"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, r"rows\[0\]\['prompt'\] must be text or a list of messages"),
        ({"prompt": "x", "chosen": 3, "rejected": "b"}, r"rows\[0\]\['chosen'\] must be a completion or a list"),
        (
            {"prompt": "x", "chosen": ["a", 4], "rejected": "b"},
            r"rows\[0\]\['chosen'\]\[1\] must be text or messages, like the prompt",
        ),
        (
            {"prompt": "x", "chosen": "a", "rejected": ["b", " "]},
            r"rows\[0\]\['negatives'\]\[1\] must have at least one token, got none",
        ),
        (
            {"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"},
            r"rows\[0\]\['chosen'\]\[0\] must be text or messages, like the prompt, got 'a'",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "x"}],
                "chosen": [{"role": "user", "content": "a"}],
                "rejected": [],
            },
            r"rows\[0\]\['chosen'\]\[0\]: the chat template of prompt and completion does not begin",
        ),
    ],
)
def test_bad_text(tokenizer: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SessionCollator(tokenizer=tokenizer)([row])


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All of them, in whatever holds them."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@pytest.mark.parametrize("embeddings", [False, True])
def test_every_tensor_is_pinned_and_moved(embeddings: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a DataLoader and accelerate do wherever there is a GPU, which this needs not."""
    batch = SessionCollator(embeddings=embeddings)([{**ROW, "items": [4, 5]}, ROW])
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor, *device: Any) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    found = torch.utils.data._utils.pin_memory.pin_memory(batch)
    before, after = tensors_of(batch), tensors_of(found)
    assert len(before) == len(after) >= 13
    assert {id(tensor) for tensor in after} == {id(tensor) for tensor in pinned}
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (found["packed"].num_truncated, found["packed"].sessions.num_pairs) == (0, 4)
    operations = pytest.importorskip("accelerate.utils.operations")
    moved = operations.send_to_device(found, torch.device("meta"), non_blocking=True)
    assert {tensor.device.type for tensor in tensors_of(moved)} == {"meta"}
    assert len(tensors_of(moved)) == len(before)
