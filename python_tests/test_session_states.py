"""session_states: packed sessions give what every candidate behind its own copy of the prompt gives."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
import transformers
from support.tiny_models import SHAPE, VOCAB, gpt2, llama, qwen3, seeded, session_rows, t5, t5_unscaled

import raddpo_ext as rx
from raddpo_ext.integrations.transformers import (
    SessionCollator,
    accept_sessions,
    logits_map,
    session_states,
    verify_packing,
)

pytestmark = pytest.mark.slow

MODELS = [qwen3, llama, gpt2, t5, t5_unscaled]


@functools.cache
def model_of(make: Any, attention: str) -> Any:
    return seeded(make, attn_implementation=attention)


def replicated(model: Any, row: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Each candidate's token log-probs and the state at its last token, by an ordinary forward of its own."""
    logps, embeddings = [], []
    prompt = torch.tensor([row["prompt_ids"]])
    for candidate in row["positives"] + row["negatives"]:
        tokens = torch.tensor([candidate])
        if model.config.is_encoder_decoder:
            start = torch.full((1, 1), model.config.decoder_start_token_id)
            output = model(input_ids=prompt, decoder_input_ids=torch.cat((start, tokens), 1), output_hidden_states=True)
            logits, state = output.logits[0, :-1], output.decoder_hidden_states[-1][0, -1]
        else:
            output = model(input_ids=torch.cat((prompt, tokens), 1), output_hidden_states=True)
            logits, state = output.logits[0, prompt.shape[1] - 1 : -1], output.hidden_states[-1][0, -1]
        logps.append(logits.log_softmax(-1).gather(1, tokens.T)[:, 0])
        embeddings.append(state)
    return logps, embeddings


def packed_logps(model: Any, packed: Any) -> tuple[Tensor, Any]:
    states = session_states(model, packed)
    sessions = packed.sessions
    targets = sessions.tokens.masked_fill(~sessions.mask(), -100)
    head = {"rows": states.rows, "bias": states.bias, **logits_map(model)}
    logps = rx.linear_token_logps(states.hidden, states.weight, targets, **head)
    return logps, states


def gradients(model: Any, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equals_replicated(model: Any, rows: list[dict[str, Any]], reference: Any = None, **options: Any) -> None:
    """To 1e-5 in log-probs, and in the gradients of all parameters of random sums of log-probs and embeddings."""
    reference = model if reference is None else reference
    packed = SessionCollator(**options)(rows)["packed"]
    found = [replicated(reference, row) for row in rows]
    expected = [logps for row_logps, _ in found for logps in row_logps]
    states = [state for _, row_states in found for state in row_states]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(logps.shape, generator=generator) for logps in expected]
    direction = torch.randn(16, generator=generator)
    logps, given_states = packed_logps(model, packed)
    assert len(logps) == len(expected)
    for row, right in zip(logps, expected, strict=True):
        torch.testing.assert_close(row[: len(right)], right, rtol=1e-5, atol=1e-5)
    value = sum((row[: len(w)] @ w for row, w in zip(logps, weights, strict=True)), logps.sum() * 0)
    right_value = sum((row @ w for row, w in zip(expected, weights, strict=True)), torch.zeros(()))
    if options.get("embeddings", True):
        assert given_states.embeddings.shape == (len(expected), 16)
        for embedding, right in zip(given_states.embeddings, states, strict=True):
            # Of T5 the head's input is scaled; a cosine does not see it.
            torch.testing.assert_close(F.normalize(embedding, dim=0), F.normalize(right, dim=0), rtol=1e-5, atol=1e-5)
            value = value + F.normalize(embedding, dim=0) @ direction
            right_value = right_value + F.normalize(right, dim=0) @ direction
    else:
        assert given_states.embeddings is None
    if not expected:
        assert all(float(grad.abs().max()) == 0 for grad in gradients(model, value).values())
        return
    right_gradients, mine = gradients(reference, right_value), gradients(model, value)
    assert len(mine) == len(right_gradients)
    scale = max(float(grad.abs().max()) for grad in right_gradients.values())
    for (name, grad), right in zip(mine.items(), right_gradients.values(), strict=True):
        torch.testing.assert_close(
            grad, right, rtol=1e-5, atol=1e-5 * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", MODELS)
@settings(max_examples=6)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 3),
    layout=st.sampled_from(["candidates", "trie"]),
    side=st.sampled_from(["right", "left"]),
    multiple=st.sampled_from([None, 8]),
    embeddings=st.booleans(),
)
def test_equals_the_replicated_layout(
    make: Any, attention: str, seed: int, count: int, layout: str, side: str, multiple: int | None, embeddings: bool
) -> None:
    assert_equals_replicated(
        model_of(make, attention),
        session_rows(count, seed, codes=2),
        layout=layout,
        padding_side=side,
        pad_to_multiple_of=multiple,
        embeddings=embeddings,
    )


@pytest.mark.parametrize("make", [qwen3, t5])
def test_no_candidates_at_all(make: Any) -> None:
    """A rank may get such a batch: every parameter has a gradient, of 0."""
    model = model_of(make, "sdpa")
    assert_equals_replicated(model, [{"prompt_ids": [4, 5], "positives": [], "negatives": []}])
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_with_eager_attention() -> None:
    model = model_of(qwen3, "eager")
    packed = SessionCollator()(session_rows(4, 1))["packed"]
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = packed_logps(model, packed)
    torch.testing.assert_close(logps, packed_logps(model, packed)[0], rtol=0.1, atol=0.3)
    low = seeded(qwen3, attn_implementation="eager").to(torch.bfloat16)
    assert session_states(low, packed).hidden.dtype == torch.bfloat16


def test_behind_adapters_and_compile() -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    rows = session_rows(3, 2)
    plain = model_of(llama, "sdpa")
    adapted = get_peft_model(seeded(llama), LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    packed = SessionCollator()(rows)["packed"]
    with torch.no_grad():
        logps = packed_logps(adapted, packed)[0]
        expected = [row for r in rows for row in replicated(adapted, r)[0]]
        for row, right in zip(logps, expected, strict=True):
            torch.testing.assert_close(row[: len(right)], right, rtol=1e-5, atol=1e-5)
        assert not torch.equal(logps, packed_logps(plain, packed)[0])
    compiled = torch.compile(plain, backend="eager")
    assert torch.equal(packed_logps(compiled, packed)[0], packed_logps(plain, packed)[0])
    prompted = get_peft_model(seeded(llama), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="adapters of type PROMPT_TUNING"):
        session_states(prompted, packed)


def test_logits_map() -> None:
    """Models that cap or scale their logits, and a bias of the head."""
    gemma = transformers.Gemma2Config(**SHAPE, head_dim=4, final_logit_softcapping=2.0, attn_implementation="eager")
    granite = transformers.GraniteConfig(**SHAPE, logits_scaling=3.0)
    cohere = transformers.CohereConfig(**SHAPE, logit_scale=0.25)
    expected = {"logit_softcap": 2.0}, {"temperature": 3.0}, {"temperature": 4.0}
    for config, options in zip((gemma, granite, cohere), expected, strict=True):
        model = seeded(transformers.AutoModelForCausalLM.from_config, config=config)
        assert logits_map(model) == options
        verify_packing(model)
        assert_equals_replicated(model, session_rows(2, 3))
    biased = seeded(qwen3)
    biased.lm_head = nn.Linear(16, VOCAB)
    assert logits_map(biased) == {}
    assert_equals_replicated(biased, session_rows(2, 3))


@pytest.mark.parametrize("make", MODELS)
def test_verify_packing(make: Any) -> None:
    model = seeded(make).train()
    verify_packing(model)
    assert model.training
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: output * 1.1)
    with pytest.raises(ValueError, match=f"{type(model).__name__} ignores the attention mask, or changes its head"):
        verify_packing(model)


def test_verify_packing_finds_a_model_that_looks_past_the_mask() -> None:
    model = seeded(qwen3)
    forward = model.model.forward
    model.model.forward = lambda attention_mask=None, **kwargs: forward(attention_mask=None, **kwargs)
    with pytest.raises(ValueError, match="gives different log-probs for packed sessions"):
        verify_packing(model)


def test_windows() -> None:
    rows = [{"prompt_ids": [5] * 9, "positives": [[3, 7]], "negatives": [[4, 8], [5, 9]] * 3}]
    packed = SessionCollator()(rows)["packed"]
    sliding = seeded(qwen3, use_sliding_window=True, sliding_window=11, max_window_layers=1)
    assert "sliding_attention" in sliding.config.layer_types
    assert_equals_replicated(sliding, rows)  # though the packed row is longer
    rows[0]["prompt_ids"].append(6)
    with pytest.raises(ValueError, match=r"12 tokens, more than the model's config\.sliding_window = 11"):
        session_states(sliding, SessionCollator()(rows)["packed"])
    session_states(sliding, SessionCollator(max_length=11)(rows)["packed"])
    full = seeded(qwen3, use_sliding_window=False, sliding_window=4)
    assert_equals_replicated(full, rows)
    short = seeded(gpt2, n_positions=11)
    assert_equals_replicated(short, [{**rows[0], "prompt_ids": [5] * 9}])
    with pytest.raises(ValueError, match=r"12 tokens, more than the model's config\.max_position_embeddings = 11"):
        session_states(short, SessionCollator()(rows)["packed"])
    assert packed.input_ids.shape[1] > 11


def test_bad_input() -> None:
    packed = SessionCollator()(session_rows(2))["packed"]
    model = seeded(qwen3)
    with pytest.raises(TypeError, match="packed must be a PackedSessions, got dict"):
        session_states(model, {"packed": packed})
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        session_states(nn.Linear(2, 2), packed)
    with pytest.raises(ValueError, match="must have a language modelling head, Qwen3Model has none"):
        session_states(transformers.AutoModel.from_config(model.config), packed)
    for attention, message in [("flash_attention_2", "takes no custom mask"), ("flex_attention", "needs CUDA")]:
        model.model.config._attn_implementation = attention
        with pytest.raises(ValueError, match=message):
            session_states(model, packed)
    with pytest.raises(ValueError, match="model is wrapped in DataParallel, which averages gradients only if called"):
        session_states(nn.DataParallel(model), packed)


def test_accept_sessions() -> None:
    model = seeded(qwen3)
    packed = SessionCollator()(session_rows(3))["packed"]
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    assert accept_sessions(accept_sessions(model)) is model
    assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model(packed=packed).hidden, session_states(model, packed).hidden)
    assert model(packed=packed, compute=lambda states, packed, scale: states.hidden.sum() * scale, scale=0) == 0


def test_a_deep_copy_runs_its_own_weights() -> None:
    """As an averaged model or a frozen reference is made, after the trainer gave the model its keywords."""
    model = accept_sessions(seeded(qwen3))
    ids = torch.tensor([[1, 2, 3]])
    packed = SessionCollator()(session_rows(3))["packed"]
    before, states = model(ids).logits, model(packed=packed).hidden
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(other(ids).logits, before)
    assert not torch.equal(other(packed=packed).hidden, states)
    torch.testing.assert_close(model(ids).logits, before)


def test_ten_line_loop() -> None:
    """As the documentation shows it."""
    model, dataset = seeded(qwen3), session_rows(24, 5, empty=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []

    loss = rx.RADDPOLoss(rx.SimilarityWeighting(window=32))
    for _ in range(4):
        for batch in DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=SessionCollator()):
            packed = batch["packed"].to(model.device)
            states = session_states(model, packed)
            output = loss(sessions=packed.sessions, **states._asdict())
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        history.append(float(output.metrics["rewards/margins"]))

    assert history[-1] > history[0] + 0.5
    assert bool(loss.similarity_weighting.thresholds.isfinite().all())
