"""Leaks planted in a model at its own initialization: each is found, however faint, and a clean model has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")
import transformers
from test_retriever import VOCAB

from raddpo_ext.integrations.base_model import model_head
from raddpo_ext.integrations.probes import verify
from raddpo_ext.integrations.session_states import verify_packing

pytestmark = pytest.mark.slow

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DTYPES = [torch.float32, torch.bfloat16]
BEAMS, PROMPT = (2, 3), (2, 6)  # what the probe feeds a shared prompt: beams of a step, and the prompts


def qwen3(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TEXT)).to(dtype).eval()


def add(states: Tensor, place: Any, what: Tensor) -> Tensor:
    states = states.clone()
    states[place] += what
    return states


# Each of a layer's states of one step, [2, 3, H].
LEAKS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "another beam": lambda x, s: x + s * x.roll(1, 1),
    "the mean of the row": lambda x, s: x + s * x.mean(1, keepdim=True),
    "the mean of the batch": lambda x, s: x + s * x.mean((0, 1), keepdim=True),
    "a convolution": lambda x, s: add(x, (slice(None), slice(1, None)), s * x[:, :-1]),
    "an earlier beam": lambda x, s: add(x, (slice(None), 2), s * x[:, 0]),
    "a later beam": lambda x, s: add(x, (slice(None), 0), s * x[:, 2]),
    "the middle beam": lambda x, s: add(x, (slice(None), 2), s * x[:, 1]),
    "the other query": lambda x, s: add(x, 0, s * x[1]),
    "the query before": lambda x, s: add(x, 1, s * x[0]),
    "one number": lambda x, s: add(x, (..., 5), s * x[..., 5].roll(1, 1)),
}


def plant(model: Any, shape: tuple[int, int], leak: Callable[[Tensor], Tensor], skip: int = 0) -> None:
    """Lets the last layer's MLP leak where its states have a shape, from the ``skip``-th time on after the prompt."""
    calls = [0]

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        calls[0] = calls[0] + 1 if tuple(output.shape[:2]) == shape else 0
        return leak(output) if calls[0] > skip else output

    model.model.layers[-1].mlp.register_forward_hook(hook)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.5, 0.02])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_between_beams(leak: str, scale: float, dtype: torch.dtype) -> None:
    model = qwen3(dtype)
    plant(model, BEAMS, lambda states: LEAKS[leak](states, scale))
    assert tuple(verify(model, model_head(model)))[:3] == (True, False, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_leak_at_the_second_step_only(dtype: torch.dtype) -> None:
    model = qwen3(dtype)
    plant(model, BEAMS, lambda states: LEAKS["another beam"](states, 0.02), skip=1)
    assert not verify(model, model_head(model)).shared


def test_a_very_faint_leak() -> None:
    model = qwen3(torch.float32)
    plant(model, BEAMS, lambda states: LEAKS["an earlier beam"](states, 1e-3))
    assert not verify(model, model_head(model)).shared


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [1, 2])
def test_a_head_that_looks_past_the_mask(dtype: torch.dtype, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = F.scaled_dot_product_attention

    def past(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if query.shape[2] == 3 and attn_mask is not None and key.shape[2] == 6 + 3 * step:
            attn_mask = attn_mask.expand(-1, query.shape[1], -1, -1).clone()
            attn_mask[:, 3, :, 6:] = True
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", past)
    model = qwen3(dtype)
    assert tuple(verify(model, model_head(model)))[:3] == (True, False, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_leak_of_the_padding_into_a_prompt(dtype: torch.dtype) -> None:
    model = qwen3(dtype)
    plant(model, PROMPT, lambda x: add(x, (1, -1), 0.02 * x[1, 0]))  # the second prompt has three columns of padding
    assert tuple(verify(model, model_head(model)))[:3] == (True, False, False)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 0.02), (torch.bfloat16, 0.5)])
def test_a_leak_of_another_prompt_is_refused(dtype: torch.dtype, scale: float) -> None:
    """Prompts of one length share a batch in the slowest way too, which allows for rounding."""
    model = qwen3(dtype)
    plant(model, PROMPT, lambda x: add(x, 1, scale * x[0]))
    with pytest.raises(TypeError, match="logits of Qwen3ForCausalLM depend on other rows"):
        verify(model, model_head(model))


def test_rows_of_one_batch_that_leak_are_refused() -> None:
    """Nothing slower is left."""
    model = qwen3(torch.float32)
    plant(model, (3, 1), lambda states: states + 0.1 * states.roll(1, 0))
    plant(model, (6, 1), lambda states: states + 0.1 * states.roll(1, 0))
    with pytest.raises(TypeError, match="Qwen3ForCausalLM"):
        verify(model, model_head(model))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt2", "gemma3"])
def test_a_clean_model_shares(name: str, dtype: torch.dtype) -> None:
    t = transformers
    models = {
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT)),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**TEXT, **MOE)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**TEXT)),
    }
    torch.manual_seed(0)
    model = models[name]().to(dtype).eval()
    assert tuple(verify(model, model_head(model)))[:3] == (True, True, True)
    verify_packing(model)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leak", ["another beam", "the other query", "the query before", "the mean of the row"])
def test_a_leak_between_candidates(leak: str, dtype: torch.dtype) -> None:
    model = qwen3(dtype)
    columns = 5 + 3 * 2
    plant(model, (2, columns), lambda states: LEAKS[leak](states, 0.02))
    with pytest.raises(ValueError, match="depend on another's tokens"):
        verify_packing(model)
