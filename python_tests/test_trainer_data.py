"""What RADDPOTrainer asks of its rows, its tokenizer, its vocabulary and its index, and how it samples rows."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("tokenizers")
import tokenizers
import transformers
from support.tiny_models import qwen3, seeded, session_rows
from support.trainer_runs import run, trainer_for

import raddpo_ext as rx
from raddpo_ext.integrations.transformers import RADDPOConfig, SessionCollator

pytestmark = pytest.mark.slow

# The words come first; <a_0> is token 10, <b_0> 18, <c_0> 26.
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "history", "<", ">", "a", "_", "9"]
VOCAB = rx.SIDVocab([8, 8, 8], offset=10, eos=2)
SIDS = [[a, b, c] for a in range(8) for b in range(4) for c in range(2)]
INDEX = rx.TrieIndex.build(SIDS, vocab=VOCAB)
ROWS = [{"prompt": "history", "chosen": f"<a_{i}><b_1><c_1>", "rejected": f"<a_{i}><b_2><c_1>"} for i in range(8)]
TOKENS = [
    {"prompt_ids": [4], "positives": [[10 + i, 19, 27, 2]], "negatives": [[10 + i, 20, 27, 2], [10, 18, 26, 2]]}
    for i in range(8)
]


def tokenizer(splits: bool = False, pad: int = 0, sids: int = 8) -> Any:
    """``splits``: an unknown text becomes its letters, not one <unk>. ``pad``: words more before the SIDs' tokens."""
    words = WORDS + [f"word{i}" for i in range(pad)]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = (
        tokenizers.pre_tokenizers.Split("", "isolated") if splits else tokenizers.pre_tokenizers.WhitespaceSplit()
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_tokens([f"<{level}_{code}>" for level in "abc" for code in range(sids)])
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
    )
    return fast


def trainer(rows: Any, folder: Path, *, extra: Any = None, **options: Any) -> Any:
    return trainer_for(
        seeded(qwen3), rows, output_dir=str(folder), extra={"processing_class": tokenizer(), **(extra or {})}, **options
    )


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ("<a_99><b_1><c_1>", "which is not a token of level 0"),
        ("<a_1><c_1><b_1>", "holds 27, which is not a token of level 1"),
        ("<a_1><b_1><c_1><c_1>", "has 4 codes, not 1 to 3"),
        ("the <a_1><b_1><c_1>", "codes, not 1 to 3"),
    ],
)
def test_text_that_is_no_sid(chosen: str, why: str, splits: bool, with_index: bool, tmp_path: Path) -> None:
    """Whether it was looked at when the trainer was made, or met in a batch: the error names the row and the tokens."""
    extra: dict[str, Any] = {"processing_class": tokenizer(splits)}
    extra |= {"index": INDEX} if with_index else {"vocab": VOCAB}
    bad = {**ROWS[0], "rejected": [ROWS[0]["rejected"], chosen]}
    if splits and chosen.startswith("<a_99>"):
        why = "has 8 codes, not 1 to 3"
    with pytest.raises(
        ValueError, match=r"train_dataset\[3\]: rows\[0\]\['rejected'\]\[1\] = \[.*\] is not a SID.*" + why
    ):
        trainer([*ROWS[:3], bad], tmp_path, extra=extra)
    made = trainer(ROWS, tmp_path, extra=extra)
    with pytest.raises(ValueError, match=r"^rows\[1\]\['rejected'\]\[1\] = \[.*\] is not a SID"):
        made.data_collator([ROWS[0], bad])


@pytest.mark.parametrize("splits", [False, True])
def test_text_that_is_no_sid_in_a_stream(splits: bool, tmp_path: Path) -> None:
    """At the start where it is among the first rows, else when it is met, also in a worker's process."""
    bad = {**ROWS[0], "chosen": "<a_99><b_1><c_1>"}
    extra = {"processing_class": tokenizer(splits), "vocab": VOCAB}
    with pytest.raises(ValueError, match=r"train_dataset\[2\]: rows\[0\]\['chosen'\]\[0\] = .* is not a SID"):
        trainer(Stream([*ROWS[:2], bad]), tmp_path, extra=extra)
    for workers in (0, 1):
        late = Stream([*ROWS * 4, ROWS[1], bad])
        made = trainer(late, tmp_path, extra=extra, batch=2, max_steps=20, dataloader_num_workers=workers)
        with pytest.raises(ValueError, match=r"rows\[1\]\['chosen'\]\[0\] = .* is not a SID"):
            made.train()
        assert made.state.global_step <= 16


def test_messages(tmp_path: Path) -> None:
    """What a chat template adds behind ``vocab.eos`` is no part of a SID; before it, it is refused."""
    ask = [{"role": "user", "content": "history"}]

    def row(text: str) -> dict[str, Any]:
        return {"prompt": ask, "chosen": [{"role": "assistant", "content": text}], "rejected": []}

    tail = tokenizer()
    tail.chat_template = tail.chat_template.replace("' </s> '", "' </s> history '")
    for reader in (tokenizer(), tail):
        made = trainer([row("<a_1><b_1><c_1>")], tmp_path, extra={"processing_class": reader, "vocab": VOCAB})
        assert made.data_collator(made.train_dataset)["packed"].sessions.tokens.tolist() == [[11, 19, 27, 2]]
    with pytest.raises(ValueError, match=r"train_dataset\[0\]: rows\[0\]\['chosen'\]\[0\] .* is not a SID"):
        trainer([row("<a_99><b_1><c_1>")], tmp_path, extra={"vocab": VOCAB})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"positives": [[11, 19, 27]]}, r"\['positives'\]\[0\] = \[11, 19, 27\] .*does not end in eos, 2"),
        ({"negatives": [[19, 11, 27, 2]]}, r"\['negatives'\]\[0\] = .* holds 19, which is not a token of level 0"),
    ],
)
def test_token_ids_that_are_no_sid(row: dict[str, Any], why: str, tmp_path: Path) -> None:
    """Also in an evaluation's rows, in one of several data sets, in a stream, and by a collator of one's own."""
    bad = {**TOKENS[0], **row}
    for rows, extra in [
        ([*TOKENS, bad], {"index": INDEX}),
        (TOKENS, {"vocab": VOCAB, "eval_dataset": [bad]}),
        (TOKENS, {"vocab": VOCAB, "eval_dataset": {"good": TOKENS, "bad": [bad]}}),
        (Stream([bad]), {"vocab": VOCAB}),
        ([bad], {"vocab": VOCAB, "data_collator": SessionCollator()}),
    ]:
        with pytest.raises(ValueError, match=r"(train|eval)_dataset(\['bad'\])?\[\d\]: rows\[0\]" + why):
            trainer(rows, tmp_path, extra=extra)
    made = trainer(TOKENS, tmp_path, extra={"vocab": VOCAB})
    with pytest.raises(ValueError, match=r"eval_dataset\[0\]: rows\[0\]" + why):
        made.evaluate([bad])


class Stream(torch.utils.data.IterableDataset):
    """Rows without a number; ``once``: of an iterator that is gone after one pass."""

    def __init__(self, rows: list[dict[str, Any]], once: bool = False) -> None:
        self.rows = iter(rows) if once else rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def test_a_stream_that_is_read_once_loses_no_row() -> None:
    whole, once = (run(seeded(qwen3), Stream(TOKENS, once), batch=2, max_steps=4) for once in (False, True))
    assert once.history[:4] == whole.history[:4]
    assert len(once.history) == 5


@pytest.mark.parametrize(
    ("vocab", "reader", "message"),
    [
        (
            rx.SIDVocab([8, 8, 8], offset=9, eos=2),
            {},
            r"code 0 of level 0 is token id 9, .*reads as '9', not as '<a_-1>'",
        ),
        (rx.SIDVocab([8, 8, 8], offset=11, eos=2), {}, r"code 7 of level 0 is token id 18, .* '<b_0>', not as '<a_8>'"),
        (rx.SIDVocab([8, 8, 7], offset=11), {}, "code 7 of level 0 is token id 18"),
        (
            rx.SIDVocab([8, 8, 8], offset=10, eos=2),
            {"sids": 7},
            r"code 7 of level 0 is token id 17, .*reads as '<b_0>'",
        ),
        (rx.SIDVocab([7, 8, 8], offset=10, eos=2), {}, r"code 1 of level 1|code 0 of level 1 is token id 17.*'<a_7>'"),
        (rx.SIDVocab([8, 8, 8], offset=16, eos=2), {}, r"code \d of level \d"),
        (rx.SIDVocab([2], token_ids=[[3, 9]]), {}, "code 0 of level 0 is token id 3, where the tokenizer has '<unk>'"),
        (rx.SIDVocab([2, 2], offset=34), {}, "code 0 of level 0 is token id 34, where the tokenizer has none"),
        (rx.SIDVocab([8, 8, 8], offset=17), {}, r"vocab must hold token ids below the model's vocab_size 40, got 40"),
    ],
)
def test_a_vocabulary_of_another_tokenizer_or_model(vocab: Any, reader: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(TOKENS, tmp_path, extra={"vocab": vocab, "processing_class": tokenizer(**reader)})


def test_vocabularies_that_are_the_tokenizers(tmp_path: Path) -> None:
    """Numbered from 1, with gaps, of words, and one set of tokens for all levels."""
    for vocab, positives in [
        (rx.SIDVocab([7, 7, 7], offsets=[11, 19, 27]), [11, 19, 27]),
        (rx.SIDVocab([8, 8], token_ids=[[10, -1, 12, -1, 14, 15, -1, 17], [18, 19, -1, -1, -1, -1, -1, 25]]), [12, 25]),
        (rx.SIDVocab([2, 2], token_ids=[[4, 9], [7, 8]]), [4, 8]),
        (rx.SIDVocab([8, 8], token_ids=[range(10, 18)] * 2), [10, 10]),
    ]:
        trainer([{"prompt_ids": [4], "positives": [positives], "negatives": []}], tmp_path, extra={"vocab": vocab})


def test_an_index_of_another_model_or_vocabulary(tmp_path: Path) -> None:
    foreign = rx.TrieIndex.build(SIDS, vocab=rx.SIDVocab([8, 8, 8], offset=17))
    for extra, message in [
        ({"index": foreign}, "vocab must hold token ids below the model's vocab_size 40, got 40"),
        ({"index": rx.TrieIndex.build([[5, 40]])}, "index must hold token ids below the model's vocab_size 40, got 40"),
        ({"index": INDEX, "vocab": rx.SIDVocab([8, 8, 8], offset=10)}, "vocab must be the index's"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(TOKENS, tmp_path, extra=extra)


def test_candidates_that_the_index_lacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are counted; refused where their log-prob would be -inf, and where there are many and all are foreign."""
    logging.getLogger("transformers").propagate = True
    other = rx.TrieIndex.build([sid for sid in SIDS if sid[0] != 3], vocab=VOCAB)
    with caplog.at_level(logging.WARNING):
        trainer(TOKENS, tmp_path, extra={"index": INDEX})
        assert not caplog.records
        trainer(TOKENS, tmp_path, extra={"index": other})
    told = "2 of 24 candidates of 8 rows of train_dataset are not in the index, such as train_dataset[3]: rows[0]"
    assert [record.getMessage().startswith(told) for record in caplog.records] == [True]
    with pytest.raises(ValueError, match=r"2 of 24 candidates .*; normalize = 'trie' needs every candidate"):
        trainer(TOKENS, tmp_path, extra={"index": other}, normalize="trie")
    elsewhere = rx.TrieIndex.build([[0, 7, 7]], vocab=VOCAB)
    trainer(TOKENS, tmp_path, extra={"index": elsewhere})
    with pytest.raises(
        ValueError, match=r"120 of 120 .* of eval_dataset .*; the index seems to be that of another catalogue"
    ):
        trainer(TOKENS, tmp_path, extra={"index": elsewhere, "eval_dataset": TOKENS * 5})


def test_an_empty_data_set_is_named(tmp_path: Path) -> None:
    for rows, extra, name in [
        ([], {}, "train_dataset"),
        (Stream([]), {}, "train_dataset"),
        (TOKENS, {"eval_dataset": []}, "eval_dataset"),
        (TOKENS, {"eval_dataset": {"x": [], "y": TOKENS}}, r"eval_dataset\['x'\]"),
        ([], {"data_collator": lambda rows: rows}, "train_dataset"),
    ]:
        with pytest.raises(ValueError, match=f"^{name} must have at least one row, got none$"):
            trainer(rows, tmp_path, extra=extra)
    with pytest.raises(ValueError, match=r"^eval_dataset must have at least one row, got none$"):
        trainer(TOKENS, tmp_path).evaluate([])


def test_many_rows_are_sampled(tmp_path: Path) -> None:
    """A bounded number of them, the first and the last too."""

    class Counted(list):
        seen: set[int]

        def __getitem__(self, number: Any) -> Any:
            self.seen.add(number)
            return super().__getitem__(number)

    rows = Counted(TOKENS * 1000)
    rows.seen = set()
    trainer(rows, tmp_path)
    assert len(rows.seen) == 256
    assert {0, 7999} < rows.seen
    assert max(b - a for a, b in zip(sorted(rows.seen), sorted(rows.seen)[1:], strict=False)) < 40


def test_group_by_length(tmp_path: Path) -> None:
    """Batches hold rows of like lengths, prompts and candidates counted, of tokens and of text."""
    rows = session_rows(64, empty=False)
    random.Random(0).shuffle(rows)
    text = [{"prompt": "history " * (1 + i * 7 % 16), "chosen": "<a_1>", "rejected": []} for i in range(64)]

    def spread(rows: list[dict[str, Any]], **options: Any) -> float:
        made = trainer(rows, tmp_path, batch=8, **options)
        batches = [batch["packed"] for batch in made.get_train_dataloader()]
        assert sum(len(packed.input_ids) for packed in batches) == 64
        return sum(packed.input_ids.numel() for packed in batches)

    for data in (rows, text):
        assert spread(data, train_sampling_strategy="group_by_length") < 0.92 * spread(data)
    collate = SessionCollator(tokenizer=tokenizer())
    assert collate.num_tokens(TOKENS[0]) == 13
    assert collate.num_tokens(text[0]) == 2
    found = run(seeded(qwen3), rows, batch=8, max_steps=2, train_sampling_strategy="group_by_length")
    assert found.history[0]["loss"] > 0


def test_every_option_from_a_command_line() -> None:
    """By HfArgumentParser, that of transformers' own scripts."""
    given = {
        "report_to": "none",
        "logging_steps": "0.5",
        "beta": "1.5",
        "positives": "pooled",
        "level_weights": "1 0.5",
        "max_length": "64",
        "pad_to_multiple_of": "8",
        "similarity_weighting": "False",
        "use_reference": "True",
        "eval_ks": "1 5",
        "learning_rate": "1e-3",
    }
    words = [word for name, value in given.items() for word in (f"--{name}", *value.split())]
    (config,) = transformers.HfArgumentParser(RADDPOConfig).parse_args_into_dataclasses(
        ["--output_dir", "x", "--use_cpu", "True", *words]
    )
    assert (config.beta, config.logging_steps, config.positives, config.learning_rate) == (1.5, 0.5, "pooled", 1e-3)
    assert (config.level_weights, config.eval_ks, config.max_length) == ([1.0, 0.5], [1, 5], 64)
    assert (config.similarity_weighting, config.use_reference, config.pad_to_multiple_of) == (False, True, 8)
    assert config.report_to in ([], ["none"])
