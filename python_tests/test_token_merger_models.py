"""Models with a TokenMerger: the retriever, the collator, the trainers, checkpoints and adapters."""

from __future__ import annotations

import copy
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from support.tiny_models import SHAPE, gpt2, llama, qwen3, seeded, t5
from support.tolerances import close
from support.trainer_runs import run, trainer_for
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LogitsProcessorList,
)

import raddpo_ext as rx
from raddpo_ext.integrations.merger_checks import merger_of, verify_merger
from raddpo_ext.integrations.transformers import (
    PolicyConfig,
    PolicyTrainer,
    RADDPOTrainer,
    SessionCollator,
    session_states,
)

VOCAB = rx.SIDVocab([4, 4, 4], offset=3)
INDEX = rx.TrieIndex.build(torch.cartesian_prod(*[torch.arange(4)] * 3)[::3], vocab=VOCAB)


def gemma3(**options: Any) -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**SHAPE, "head_dim": 8, **options}))


def bart(**options: Any) -> BartForConditionalGeneration:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    shape = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 48}
    config = BartConfig(**heads, **shape, scale_embedding=True, init_std=0.3, dropout=0.0, **options)
    return BartForConditionalGeneration(config)


def install(model: Any, vocab: rx.SIDVocab = VOCAB, fill: bool = True) -> rx.TokenMerger:
    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    merger = rx.TokenMerger(reader.get_input_embeddings(), vocab)
    if fill:
        generator = torch.Generator().manual_seed(3)
        for parameter in merger.sid_projection.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
    reader.set_input_embeddings(merger)
    return merger


def merged(make: Any, **options: Any) -> Any:
    """A model with a TokenMerger."""
    model = seeded(make, **options)
    install(model)
    return model


OUTSIDE = 2**40


def rows(count: int = 8) -> list[dict[str, Any]]:
    """Histories of SIDs, with a token before and one between."""
    draw = torch.Generator().manual_seed(2)
    items = rx.item_tokens(INDEX, INDEX.items)

    def some(number: int) -> list[list[int]]:
        return [items[i] for i in torch.randperm(len(items), generator=draw)[:number].tolist()]

    return [
        {"prompt_ids": [1, *chain(*some(2 + i % 3)), 33, *some(1)[0]], "positives": some(1), "negatives": some(2)}
        for i in range(count)
    ]


# The retriever


def scores_by_hand(model: Any, prompt: Tensor) -> Tensor:
    """The log-prob of each item, from the embeddings of the prompt and of the item's tokens."""
    merger, sids = merger_of(model), torch.tensor(rx.item_tokens(INDEX, INDEX.items))
    assert merger is not None
    embeddings = merger(prompt)[None].expand(len(sids), -1, -1)
    if model.config.is_encoder_decoder:
        start = torch.full_like(sids[:, :1], model.config.decoder_start_token_id)
        logits = model(inputs_embeds=embeddings, decoder_input_ids=torch.cat((start, sids[:, :-1]), 1)).logits
    else:
        embeddings = torch.cat((embeddings, merger(sids[:, :-1])), 1)
        logits = model(inputs_embeds=embeddings).logits[:, len(prompt) - 1 :]
    return logits.log_softmax(-1).gather(-1, sids[..., None])[..., 0].sum(1)


@pytest.mark.parametrize("make", [qwen3, gpt2, gemma3, t5, bart])
@torch.no_grad()
def test_retrieves_as_from_embeddings(make: Any) -> None:
    model = merged(make)
    merger = merger_of(model)
    assert merger is not None
    prompts = [torch.tensor(merger.merge(row["prompt_ids"])) for row in rows(3)]
    assert [len(prompt) for prompt in prompts] == [5, 6, 7]  # consecutive positions, one per SID
    ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(prompt)] for prompt in prompts])
    retriever = rx.SIDRetriever(model, INDEX, beam_width=len(INDEX.items))
    found = retriever.retrieve(ids, mask)
    for query, prompt in enumerate(prompts):
        expected = scores_by_hand(model, prompt).sort(descending=True)
        assert torch.equal(found.items[query], INDEX.items[expected.indices])
        torch.testing.assert_close(found.scores[query], expected.values, **close("model"))
    assert (found.items != retriever.retrieve(torch.tensor([[1, 33, 2]])).items).any()


@torch.no_grad()
def test_generates() -> None:
    model = merged(qwen3, eos_token_id=None)
    ids = torch.tensor([model.get_input_embeddings().merge(rows(1)[0]["prompt_ids"])])
    processor = rx.TrieLogitsProcessor(INDEX, ids.shape[1])
    found = model.generate(
        ids,
        logits_processor=LogitsProcessorList([processor]),
        max_new_tokens=3,
        num_beams=5,
        num_return_sequences=5,
        do_sample=False,
    )
    expected = rx.SIDRetriever(model, INDEX, beam_width=5).retrieve(ids)
    assert torch.equal(VOCAB.encode(expected.sids[0]), found[:, ids.shape[1] :])


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (40, r"input_ids\[0, 1\] = 40 merges the codes \[-1, -1, -1\], which is not a SID of vocab"),
        (40 + 125, r"input_ids\[0, 1\] = 165 is outside \[0, 165\), the tokens and the merged SIDs"),
        (-1, r"input_ids\[0, 1\] = -1 is outside \[0, 40\), the model's vocabulary"),
    ],
)
def test_the_retriever_refuses_other_ids(number: int, message: str) -> None:
    retriever = rx.SIDRetriever(merged(qwen3), INDEX, beam_width=3)
    with pytest.raises(ValueError, match=message):
        retriever.retrieve(torch.tensor([[1, number]]))
    plain = rx.SIDRetriever(seeded(qwen3), INDEX, beam_width=3)
    with pytest.raises(ValueError, match=r"is outside \[0, 40\), the model's vocabulary"):
        plain.retrieve(torch.tensor([[1, 40 + 31]]))


# The collator


def test_the_collator_merges_prompts() -> None:
    collate = SessionCollator(merge=True, vocab=VOCAB, vocab_size=40)
    given = rows()
    ids = install(seeded(qwen3)).ids
    (packed,) = (batch["packed"] for batch in DataLoader(given, batch_size=8, collate_fn=collate, num_workers=1))
    prompts, mask = packed.prompts()
    for row, tokens, kept in zip(given, prompts, mask.bool(), strict=True):
        assert tokens[kept].tolist() == ids.merge(row["prompt_ids"])
    plain = SessionCollator()(given)["packed"]
    assert torch.equal(packed.sessions.tokens, plain.sessions.tokens)
    # Positions count merged ids, and candidates go on from there.
    for row, length in enumerate(packed.prompt_lengths.tolist()):
        expected = [*range(length), *(length + i for _ in range(3) for i in range(3))]
        assert packed.position_ids[row, : len(expected)].tolist() == expected
    assert [collate.num_tokens(row) for row in given] == [len(ids.merge(row["prompt_ids"])) + 9 for row in given]


def test_prompts_are_merged_before_they_are_truncated() -> None:
    collate = SessionCollator(merge=True, vocab=VOCAB, vocab_size=40, max_length=6)
    packed = collate(rows(1))["packed"]
    whole = install(seeded(qwen3)).merge(rows(1)[0]["prompt_ids"])
    assert packed.prompts()[0].tolist() == [whole[-3:]]
    assert packed.num_truncated == 1


@pytest.mark.parametrize(
    ("options", "row", "error", "message"),
    [
        ({"vocab_size": 40}, {}, ValueError, "merge needs vocab and vocab_size, got None and 40"),
        ({"vocab": VOCAB}, {}, ValueError, "merge needs vocab and vocab_size, got SIDVocab.* and None"),
        ({"vocab": VOCAB, "vocab_size": 12}, {}, ValueError, "vocab must hold token ids below 12"),
        (
            {},
            {"prompt_ids": [1, 40]},
            ValueError,
            r"rows\[1\] holds token id 40, which merges the codes \[-1, -1, -1\]",
        ),
        (
            {},
            {"prompt_ids": [1, 2**40]},
            ValueError,
            r"rows\[1\] holds token id 1099511627776, which is outside \[0, 165",
        ),
        ({}, {"positives": [[71]]}, ValueError, r"rows\[1\] holds token id 71, outside \[0, 40\), the vocabulary"),
        ({}, {"prompt_ids": None}, TypeError, r"rows\[1\]\['prompt_ids'\] must hold integers"),
        ({}, {"prompt_ids": []}, ValueError, r"prompts\[1\] must have at least one token"),
    ],
)
def test_the_collator_refuses(options: Any, row: Any, error: type[Exception], message: str) -> None:
    good = {"prompt_ids": [1, 71], "positives": [[3]], "negatives": []}  # merged already
    with pytest.raises(error, match=message):
        SessionCollator(merge=True, **({"vocab": VOCAB, "vocab_size": 40} if row else options))([good, {**good, **row}])


# Training


@pytest.mark.slow
@pytest.mark.parametrize("make", [qwen3, llama, t5])  # llama's head is tied
def test_trains_and_resumes(make: Any, tmp_path: Any) -> None:
    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    model = merged(make)
    start = copy.deepcopy(model.state_dict())
    found = run(model, rows(), output_dir=str(tmp_path), **options, extra={"index": INDEX})
    for name, value in found.trainer.model.state_dict().items():
        assert "sid_projection" not in name or not torch.equal(value, start[name])
    assert any("sid_projection.weight" in name for name in start)
    again = run(merged(make), rows(), resume=str(tmp_path / "checkpoint-1"), **options, extra={"index": INDEX})
    assert found.parameters.keys() == again.parameters.keys()
    for name, value in found.parameters.items():
        assert torch.equal(value, again.parameters[name]), name
    metrics = found.trainer.evaluate(rows(3))
    assert 0 < metrics["eval_sid_mrr"] <= 1


def test_a_step_equals_one_from_embeddings() -> None:
    model = merged(qwen3)
    packed = SessionCollator(merge=True, vocab=VOCAB, vocab_size=40)(rows())["packed"]
    assert packed.input_ids.max() >= 40
    states = session_states(model, packed)
    body = model.get_decoder()
    expected = body(
        inputs_embeds=model.get_input_embeddings()(packed.input_ids),
        attention_mask=packed.mask(),
        position_ids=packed.position_ids,
    ).last_hidden_state
    torch.testing.assert_close(states.hidden, packed.distinct_hidden(expected))


@pytest.mark.slow
def test_policy_training(tmp_path: Any) -> None:
    model = merged(qwen3)
    before = copy.deepcopy(model.state_dict())
    seen = []
    args = PolicyConfig(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, num_generations=3, save_strategy="no"
    )
    trainer = PolicyTrainer(
        model,
        args,
        train_dataset=rows(),
        reward_fn=lambda items, sids, rows: [float(item % 2) for item in items.tolist()],
        index=INDEX,
    )
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("input_ids")), with_kwargs=True
    )
    trainer.train()
    # The rollouts and the update read merged ids.
    assert {len(ids) for ids in seen if ids is not None and ids.max() >= 40} >= {len(rows())}
    name = "model.embed_tokens.sid_projection.weight"
    assert not torch.equal(model.state_dict()[name], before[name])


def test_the_trainer_refuses(tmp_path: Any) -> None:
    train = partial(trainer_for, rows=rows(), output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="vocab must be the TokenMerger's, SIDVocab"):
        train(merged(qwen3), extra={"vocab": rx.SIDVocab([4, 4, 4], offset=4)})
    with pytest.raises(ValueError, match="ref_model must have a TokenMerger"):
        train(merged(qwen3), extra={"ref_model": seeded(qwen3)}, use_reference=True)
    wrong = seeded(t5)
    wrong.set_input_embeddings(rx.TokenMerger(wrong.get_input_embeddings(), VOCAB))
    with pytest.raises(ValueError, match="the encoder's alone"):
        train(wrong)
    # Without an index the vocab is the merger's.
    trainer = train(merged(qwen3))
    assert isinstance(trainer, RADDPOTrainer)
    assert trainer.data_collator([rows(1)[0]])["packed"].prompt_lengths.tolist() == [5]


class _Elsewhere(nn.Module):
    """Embeddings per layer, that a model looks up by its ids as well."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.model.register_forward_pre_hook(self._read, with_kwargs=True)
        self.model = [model]

    def _read(self, module: Any, args: Any, kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        if ids is None:
            return args, kwargs
        embeddings = module.get_input_embeddings()(ids) + torch.where(ids < 40, ids, 0)[..., None]
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embeddings}


def test_a_model_that_looks_ids_up_elsewhere() -> None:
    model = merged(qwen3)
    verify_merger(model)
    _Elsewhere(model)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM cannot read merged ids: it reads input_ids by more than"):
        verify_merger(model)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM cannot read merged ids"):
        rx.SIDRetriever(model, INDEX, beam_width=3).retrieve(torch.tensor([[1, 71]]))


def test_a_second_table_is_seen_before_it_adds_anything() -> None:
    options = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "intermediate_size": [24, 24]}
    layers = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 40, "num_kv_shared_layers": 0}
    config = Gemma3nTextConfig(
        **{**SHAPE, "head_dim": 4, **options, **layers, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]}
    )
    model = Gemma3nForCausalLM(config).eval()
    install(model)
    with pytest.raises(ValueError, match="Gemma3nForCausalLM cannot read merged ids: it reads input_ids by more than"):
        verify_merger(model)


# Checkpoints


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("make", [qwen3, gpt2, gemma3, t5, bart])
def test_saved_with_the_model(make: Any, tie: bool, tmp_path: Any) -> None:
    model = merged(make, tie_word_embeddings=tie)
    model.save_pretrained(tmp_path, max_shard_size="5KB" if tie else "1GB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1 or not tie
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[-2] for name in loading["unexpected_keys"]} == {"sid_projection"}
    assert not loading["missing_keys"]
    merger = install(again.eval(), fill=False)
    merger.load(tmp_path)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    head = again.get_output_embeddings()
    assert head is None or not tie or head.weight is merger.weight


def test_a_folder_without_a_merger(tmp_path: Any) -> None:
    seeded(qwen3).save_pretrained(tmp_path / "plain")
    merger = install(seeded(qwen3))
    for folder in ("plain", "none"):
        with pytest.raises(ValueError, match=f"{folder} must hold safetensors files with sid_projection.weight"):
            merger.load(tmp_path / folder)
    other = seeded(qwen3)
    install(other, rx.SIDVocab([4, 4], offset=3))
    other.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"must have shape \(16, 48\), got \(16, 32\)"):
        merger.load(tmp_path / "two")


def test_a_resized_model_is_refused() -> None:
    model = merged(qwen3)
    model.resize_token_embeddings(48, mean_resizing=False)
    with pytest.raises(ValueError, match="must have 40 rows, as when the TokenMerger was made, got 48"):
        model(input_ids=torch.tensor([[1, 71]]))


# Adapters


def test_adapters(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")

    def adapted(**options: Any) -> Any:
        return peft.get_peft_model(merged(qwen3), peft.LoraConfig(r=2, init_lora_weights=False, **options))

    ids = torch.tensor([[1, 71, 5, 90]])
    # The embeddings may not be adapted: LoRA looks ids up in a table of its own.
    wrong = adapted(target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"adapter \(peft.*Embedding\) on its TokenMerger, .*modules_to_save"):
        merger_of(wrong)
    with pytest.raises(ValueError, match="on its TokenMerger"):
        trainer_for(wrong, rows(), output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="on its TokenMerger"):
        rx.SIDRetriever(wrong.eval(), INDEX, beam_width=3).retrieve(ids)
    # The projection may, by LoRA (as "all-linear" does) or whole.
    lora = adapted(target_modules=["q_proj", "sid_projection"]).eval()
    merger = merger_of(lora)
    assert merger is not None
    rows_of = merger.weight[torch.tensor(merger.split([71]))].flatten()
    torch.testing.assert_close(merger(ids)[0, 1], merger.sid_projection(rows_of))
    with torch.no_grad():
        torch.testing.assert_close(merger(ids)[0, 1], merger.sid_projection(rows_of))
    assert not torch.allclose(merger(ids)[0, 1], merger.sid_projection.base_layer(rows_of))
    whole = adapted(target_modules=["q_proj"], modules_to_save=["sid_projection"])
    before = {name: value.detach().clone() for name, value in whole.named_parameters() if value.requires_grad}
    found = run(whole, rows(), max_steps=1, extra={"index": INDEX})
    assert any("sid_projection.modules_to_save" in name for name in before)
    for name, value in before.items():
        assert not torch.equal(found.parameters[name], value), name
    # So may the embeddings with their projection, whole.
    table = adapted(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    found = run(table, rows(), max_steps=1, extra={"index": INDEX})
    assert any("modules_to_save.default.sid_projection.weight" in name for name in found.parameters)
    assert rx.SIDRetriever(table.eval(), INDEX, beam_width=3).retrieve(ids).items.shape == (1, 3)
