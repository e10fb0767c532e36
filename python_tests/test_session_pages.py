"""SessionCollator(page=...): next-token prediction of pages, against plain cross-entropy of a plain forward."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from support.tiny_models import VOCAB, qwen3, seeded, session_rows, t5
from support.trainer_runs import assert_same, assert_same_history, run, trainer_for

import raddpo_ext as rx
from raddpo_ext.integrations.transformers import SessionCollator, session_states

SEPARATOR = VOCAB - 1
WEIGHTS = [1.0, 0.5, 2.0]


def page_rows(count: int, seed: int = 0, tiers: bool = True) -> list[dict[str, Any]]:
    """Rows of 0 to 3 items of 1 to 3 tokens."""
    source = random.Random(seed)
    rows = session_rows(count, seed)
    for row in rows:
        del row["negatives"]
        row["prompt_ids"] = [token % (VOCAB - 1) for token in row["prompt_ids"]]
        if tiers:
            row["tiers"] = [source.choice((0.0, 0.3, 1.0, 2.0)) for _ in row["positives"]]
    return rows


def collator(kind: str = "sequence", **options: Any) -> SessionCollator:
    return SessionCollator(page=kind, **options)


def loss_by_hand(
    model: Any, rows: list[dict[str, Any]], kind: str, separator: int | None, supervised: bool, weights: list[float]
) -> tuple[Tensor, Tensor]:
    """The sum of the weighted cross-entropies and that of the weights, by one plain forward per page."""
    total, divisor = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row in rows:
        items = row["positives"]
        tiers = row.get("tiers", [1.0] * len(items))
        pages = [range(len(items))] if kind == "sequence" else [[i] for i in range(len(items))]
        for page in pages:
            ids, own = list(row["prompt_ids"]), [0.0] * len(row["prompt_ids"])
            for place, i in enumerate(page):
                ids += items[i]
                own += [tiers[i] * weight for weight in weights[: len(items[i])]]
                if separator is not None and place < len(page) - 1:
                    ids.append(separator)
                    own.append(tiers[i] * supervised)
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
            losses = torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[1:], dtype=torch.int64), reduction="none"
            )
            total = total + (torch.tensor(own[1:], dtype=torch.float64) * losses).sum()
            divisor = divisor + sum(own)
    return total, divisor


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kind", "separator"), [("set", None), ("sequence", None), ("sequence", SEPARATOR)])
def test_equals_plain_cross_entropy(kind: str, separator: int | None, seed: int) -> None:
    rows, supervised = page_rows(5, seed), seed % 2 == 0
    options: dict[str, Any] = {
        "padding_side": "left" if seed > 1 else "right",
        "layout": ("candidates", "trie")[seed % 2],
    }
    if separator is not None:
        options |= {"separator": separator, "supervise_separator": supervised}
    model = seeded(qwen3).double()
    batch = collator(kind, level_weights=WEIGHTS, **options)(rows)
    packed, page = batch["packed"], batch["page"]
    states = session_states(model, packed)
    logps = rx.linear_token_logps(states.hidden, states.weight, page["tokens"], rows=page["rows"])
    loss = -(page["weights"] * logps).sum()
    expected, divisor = loss_by_hand(model, rows, kind, separator, supervised, WEIGHTS)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(page["weights"].sum().double(), divisor, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(loss, [*model.parameters()])
    for name, a, b in zip(
        dict(model.named_parameters()), found, torch.autograd.grad(expected, [*model.parameters()]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_the_items_are_the_sessions() -> None:
    """What reads a batch's sessions, such as the evaluation, sees SIDs and not pages."""
    rows = page_rows(6)
    packed = collator(separator=SEPARATOR)(rows)["packed"]
    expected = SessionCollator(page="set")(rows)["packed"].sessions
    for name in ("tokens", "lengths", "offsets", "num_positives"):
        assert torch.equal(getattr(packed.sessions, name), getattr(expected, name)), name
    assert packed.rows.shape == packed.sessions.tokens.shape


def test_a_page_of_one_item_is_a_set() -> None:
    rows = [row | {name: row[name][:1] for name in ("positives", "tiers")} for row in page_rows(8)]
    one, other = collator()(rows), collator("set")(rows)
    for name in ("input_ids", "position_ids", "ends", "distinct", "rows"):
        assert torch.equal(getattr(one["packed"], name), getattr(other["packed"], name)), name
    for name, table in other["page"].items():
        assert torch.equal(one["page"][name], table), name


def test_positions_run_on() -> None:
    row = {"prompt_ids": [7, 8], "positives": [[3, 4], [5, 6, 9], [1]]}
    packed = collator(separator=SEPARATOR)([row])["packed"]
    assert packed.input_ids.tolist() == [[7, 8, 3, 4, SEPARATOR, 5, 6, 9, SEPARATOR]]  # the last token predicts nothing
    assert packed.position_ids.tolist() == [[*range(9)]]
    assert packed.mask()[0, 0].equal(torch.ones(9, 9).tril().bool())


def test_max_items_and_negatives() -> None:
    row = {"prompt_ids": [7, 8], "positives": [[3, 4], [5, 6], [1, 2]], "negatives": [[9, 9]]}
    cut = row | {"positives": row["positives"][:2], "negatives": []}
    for kind in ("set", "sequence"):
        found, expected = collator(kind, max_items=2)([row]), collator(kind)([cut])
        assert torch.equal(found["packed"].input_ids, expected["packed"].input_ids)
        assert found["packed"].sessions.num_candidates == 2
    page = collator(separator=SEPARATOR, max_items=2)
    assert page.num_tokens(row) == 2 + 4 + 1
    weights = page([row | {"tiers": torch.tensor([1.0, 0.5, 2.0])}])["page"]["weights"]
    assert weights.tolist() == [[1, 1, 1], [0.5, 0.5, 0]]  # the tiers of the first items
    assert collator("set", max_items=2).num_tokens(row) == 2 + 4


def test_an_item_is_never_cut() -> None:
    row = {"prompt_ids": [7, 8, 9], "positives": [[3, 4], [5, 6]]}
    packed = collator(separator=SEPARATOR, max_length=7)([row])["packed"]
    assert packed.num_truncated == 1
    assert packed.input_ids.tolist() == [[8, 9, 3, 4, SEPARATOR, 5]]
    with pytest.raises(ValueError, match=r"max_length = 5 leaves prompts\[0\] no token beside a candidate of 5 tokens"):
        collator(separator=SEPARATOR, max_length=5)([row])


def test_text() -> None:
    class Words:
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

    texts = [{"prompt": "7 8", "chosen": ["3 4", "5"]}]
    tokens = [{"prompt_ids": [7, 8], "positives": [[3, 4], [5]]}]
    found = collator(separator=SEPARATOR, tokenizer=Words())(texts)
    assert torch.equal(found["packed"].input_ids, collator(separator=SEPARATOR)(tokens)["packed"].input_ids)


def test_padding_with_empty_pages() -> None:
    rows = [{"prompt_ids": [7, 8], "positives": []}, {"prompt_ids": [7], "positives": [[3, 4]]}]
    for some in (rows, rows[:1], []):
        batch = collator(separator=SEPARATOR)(some)
        assert batch["packed"].sessions.num_sessions == len(some)
        assert len(batch["page"]["tokens"]) == batch["packed"].sessions.num_candidates
    expected = collator(separator=SEPARATOR)(rows[1:])["page"]
    for name in ("tokens", "weights"):
        assert torch.equal(collator(separator=SEPARATOR)(rows)["page"][name], expected[name])


@pytest.mark.parametrize("normalize", ["level", "trie"])
def test_other_supports(normalize: str) -> None:
    """A token's level is its place in its item, wherever the item is on the page."""
    rows = [{"prompt_ids": [1, 2], "positives": [[3, 8], [4, 7], [3, 7]]}, {"prompt_ids": [5], "positives": [[4, 8]]}]
    vocab = rx.SIDVocab([4, 4], offset=3)
    index = rx.TrieIndex.build(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 3]]), vocab=vocab)
    model = seeded(qwen3)
    found = run(seeded(qwen3), rows, page="sequence", normalize=normalize, max_steps=1, extra={"index": index})
    children = {(): {0, 1, 2}, (0,): {0, 1}, (1,): {0, 1}}  # of the prefixes above
    total = 0.0
    for row in rows:
        ids = row["prompt_ids"] + [token for sid in row["positives"] for token in sid]
        logits = model(torch.tensor([ids])).logits[0].detach()
        for place, token in enumerate(ids):
            level = (place - len(row["prompt_ids"])) % 2
            if place >= len(row["prompt_ids"]):
                prefix = tuple(code - 3 for code in ids[place - level : place])
                codes = children[prefix] if normalize == "trie" else range(4)
                support = [3 + 4 * level + code for code in codes]
                total -= float(logits[place - 1, token] - logits[place - 1, support].logsumexp(0))
    assert found.history[0]["loss"] == pytest.approx(total / 8, rel=1e-5)
    assert found.history[0]["sft"] == pytest.approx(total / 8, rel=1e-5)


def test_a_level_without_weight() -> None:
    """It is left out of the loss, but the tokens after it still follow it in the catalogue."""
    rows = [{"prompt_ids": [1, 2], "positives": [[3, 7], [4, 8]]}]
    index = rx.TrieIndex.build(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]), vocab=rx.SIDVocab([4, 4], offset=3))
    options: dict[str, Any] = {"page": "sequence", "normalize": "trie", "level_weights": [0.0, 1.0]}
    found = run(seeded(qwen3), rows, max_steps=1, extra={"index": index}, **options)
    logits = seeded(qwen3)(torch.tensor([[1, 2, 3, 7, 4, 8]])).logits[0].detach()
    expected = sum(float(logits[i - 1, 7:9].logsumexp(0) - logits[i - 1, token]) for i, token in ((3, 7), (5, 8)))
    assert found.history[0]["sft"] == pytest.approx(expected / 2, rel=1e-5)


def test_the_trainer_is_a_plain_loop() -> None:
    rows = page_rows(11)
    options = {"page": "sequence", "separator": SEPARATOR, "level_weights": WEIGHTS}
    whole = {"batch": 11, "train_sampling_strategy": "sequential", "max_steps": 3, "sft_weight": 0.5}
    found = run(seeded(qwen3), rows, **options, **whole)
    model = seeded(qwen3).train()
    for step in range(3):
        total, divisor = loss_by_hand(model, rows, "sequence", SEPARATOR, True, WEIGHTS)
        sft = (total / divisor).float()
        gradients = torch.autograd.grad(0.5 * sft, [*model.parameters()])
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.01 * (1 - step / 3) * gradient * min(1.0, 1.0 / (float(norm) + 1e-6))
        assert found.history[step]["sft"] == pytest.approx(float(sft.detach()), rel=1e-5)
        assert found.history[step]["loss"] == pytest.approx(0.5 * float(sft.detach()), rel=1e-5)
        assert found.history[step]["preference"] == 0
    assert_same(found.parameters, dict(model.named_parameters()))


def test_accumulation_equals_one_big_batch() -> None:
    """Also with a sum of weights below 1: a mean does not depend on their scale."""
    one = run(seeded(qwen3), page_rows(8), page="sequence", batch=8, max_steps=2)
    rows = [row | {"tiers": [2**-7 * tier for tier in row["tiers"]]} for row in page_rows(8)]
    found = run(seeded(qwen3), rows, page="sequence", batch=2, accumulate=4, max_steps=2)
    assert_same(found.parameters, one.parameters)
    assert_same_history(found.history, one.history)


@pytest.mark.parametrize("kind", ["set", "sequence"])
def test_an_encoder_decoder(kind: str, tmp_path: Any) -> None:
    rows = page_rows(4)
    if kind == "sequence":
        with pytest.raises(ValueError, match="page must be 'set' for an encoder-decoder model"):
            trainer_for(seeded(t5), rows, output_dir=str(tmp_path), page=kind)
    else:
        assert run(seeded(t5), rows, page=kind, max_steps=1).history[0]["sft"] > 0


def test_evaluation(tmp_path: Any) -> None:
    """The loss is that of the pages, and what is retrieved is compared with the items."""
    codes = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    index = rx.TrieIndex.build(codes, vocab=rx.SIDVocab([4, 4], offset=3))
    rows = [
        {"prompt_ids": [20 + i, 30], "positives": [[3 + i % 3, 7], [5, 7 + i % 3]], "tiers": [1.0, 0.25]}
        for i in range(5)
    ]
    options = {"page": "sequence", "separator": SEPARATOR, "sft_weight": 2.0, "eval_beam_width": 9}
    trainer = trainer_for(seeded(qwen3), rows, output_dir=str(tmp_path), **options, extra={"index": index})
    found = trainer.evaluate(rows)
    # A mean does not depend on the scale of its weights, also where they add up to less than 1.
    faint = trainer.evaluate([row | {"tiers": [2**-7 * tier for tier in row["tiers"]]} for row in rows])
    assert faint["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-5)
    total, divisor = loss_by_hand(seeded(qwen3), rows, "sequence", SEPARATOR, True, [1.0, 1.0])
    assert found["eval_sft"] == pytest.approx(float(total / divisor), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(2 * float(total / divisor), rel=1e-5)
    plain = trainer_for(seeded(qwen3), rows, output_dir=str(tmp_path), page="set", extra={"index": index}).evaluate(
        rows
    )
    for k in (1, 5):
        assert found[f"eval_sid_recall@{k}"] == plain[f"eval_sid_recall@{k}"]
    assert found["eval_sid_recall@5"] > 0


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"page": "pages"}, ValueError, "page must be one of"),
    ({"page": "set", "separator": 3}, ValueError, "separator must be None with page = 'set', got 3"),
    ({"separator": 3}, ValueError, "separator, max_items and level_weights need page, got None"),
    ({"max_items": 3}, ValueError, "separator, max_items and level_weights need page, got None"),
    ({"page": "sequence", "separator": -1}, ValueError, "separator must be at least 0, got -1"),
    ({"page": "sequence", "separator": 1.5}, TypeError, "separator must be an integer"),
    ({"page": "sequence", "max_items": 0}, ValueError, "max_items must be at least 1, got 0"),
    ({"page": "sequence", "level_weights": [1, -1]}, ValueError, r"level_weights\[1\] must be .* got -1"),
    ({"page": "sequence", "level_weights": [float("nan")]}, ValueError, r"level_weights\[0\] must be .* got nan"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SessionCollator(**options)


BAD_ROWS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tiers": [1.0]}, ValueError, r"rows\[0\]\['tiers'\] must have one number per positive \(2\), got \[1.0\]"),
    ({"tiers": [1.0] * 3}, ValueError, r"rows\[0\]\['tiers'\] must have one number per positive \(2\), got \[1.0, 1.0"),
    ({"tiers": {0: 1.0, 1: 1.0}}, ValueError, r"rows\[0\]\['tiers'\] must have one number per positive \(2\), got {"),
    ({"tiers": [1.0, -2.0]}, ValueError, r"rows\[0\]\['tiers'\]\[1\] must be .*-2"),
    ({"tiers": [1.0, float("inf")]}, ValueError, r"rows\[0\]\['tiers'\]\[1\] must be .*inf"),
    ({"tiers": [1.0, "high"]}, TypeError, r"rows\[0\]\['tiers'\]\[1\] must be .*high"),
    ({"tiers": 1.0}, ValueError, r"rows\[0\]\['tiers'\] must have one number per positive \(2\), got 1.0"),
    ({"positives": [[3, 4], []]}, ValueError, r"rows\[0\]\['positives'\]\[1\] must have at least one token"),
    ({"positives": 3}, TypeError, r"rows\[0\]\['positives'\] must be a list of candidates, got 3"),
    ({"positives": [[3, 4], [VOCAB, 1]]}, ValueError, f"holds token id {VOCAB}"),
    ({"positives": [[3, 4, 5]]}, ValueError, r"level_weights must have one entry per token of an item \(3\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ROWS)
def test_bad_rows(change: dict[str, Any], error: type[Exception], message: str) -> None:
    row = {"prompt_ids": [7, 8], "positives": [[3, 4], [5, 6]]} | change
    with pytest.raises(error, match=message):
        collator(separator=SEPARATOR, vocab_size=VOCAB, level_weights=[1.0, 1.0])([row])


def test_a_separator_that_is_a_codes_token() -> None:
    vocab = rx.SIDVocab([4, 4], offset=3, eos=1)
    with pytest.raises(ValueError, match="separator = 8 is also the token of a code of level 1"):
        collator(separator=8, vocab=vocab)
    collator(separator=1, vocab=vocab)  # the end token may be


def test_a_separator_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match=f"separator must be below vocab_size = {VOCAB}, got {VOCAB}"):
        collator(separator=VOCAB, vocab_size=VOCAB)


def test_bad_trainers(tmp_path: Any) -> None:
    rows, vocab = page_rows(3, tiers=False), rx.SIDVocab([4, 4, 4], offset=3)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"page": "sequence", "use_reference": True}, "args.use_reference must be False with pages"),
        ({"page": "sequence", "separator": SEPARATOR, "normalize": "level"}, "supervise_separator must be False with"),
        ({"separator": SEPARATOR}, "separator, max_items and level_weights need page, got None"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer_for(seeded(qwen3), rows, output_dir=str(tmp_path), extra={"vocab": vocab}, **options)
    # A given collator decides what is learned.
    rows = [row | {"negatives": []} for row in rows]
    for options, other in (
        ({"page": "sequence"}, SessionCollator()),
        ({"page": "sequence"}, collator("set")),
        ({"separator": SEPARATOR}, collator()),
        ({"supervise_separator": False}, collator(separator=SEPARATOR)),
        ({"max_items": 2}, collator()),
        ({"level_weights": WEIGHTS}, collator()),
    ):
        with pytest.raises(ValueError, match=f"args.{next(iter(options))} must be .* with a data_collator, which has"):
            trainer_for(seeded(qwen3), rows, output_dir=str(tmp_path), extra={"data_collator": other}, **options)
