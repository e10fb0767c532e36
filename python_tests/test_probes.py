"""Models that cannot share a prefix, be padded, or have their head taken apart are right anyway."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from test_retriever import VOCAB, brute_force, make_index, prompts

import raddpo_ext as rx
from raddpo_ext.integrations.base_model import context, model_head
from raddpo_ext.integrations.probes import verify
from raddpo_ext.integrations.session_states import verify_packing

pytestmark = pytest.mark.slow

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.15,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 96,
    "pad_token_id": 0, "init_std": 0.15, "dropout": 0.0, "decoder_start_token_id": 2,
}  # fmt: skip
LINEAR: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
SPARSE: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}  # fmt: skip


def make(name: str) -> Any:
    t = transformers
    models = {
        "lfm2": lambda: t.Lfm2ForCausalLM(
            t.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"], conv_L_cache=3)
        ),
        "qwen3_5": lambda: t.Qwen3_5ForCausalLM(t.Qwen3_5TextConfig(**TEXT, **LINEAR)),
        "deepseek_v32": lambda: t.DeepseekV32ForCausalLM(t.DeepseekV32Config(**{**TEXT, **SPARSE})),
        "llama4_text": lambda: t.Llama4ForCausalLM(
            t.Llama4TextConfig(**TEXT, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=64)
        ),
        "modernbert": lambda: t.ModernBertDecoderForCausalLM(t.ModernBertDecoderConfig(**TEXT, local_attention=64)),
        "minimax": lambda: t.MiniMaxForCausalLM(t.MiniMaxConfig(**TEXT, num_local_experts=4, block_size=4)),
        "fsmt": lambda: t.FSMTForConditionalGeneration(
            t.FSMTConfig(**{**BART, "langs": ["a", "b"], "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB})
        ),
        "prophetnet": lambda: t.ProphetNetForCausalLM(
            t.ProphetNetConfig(
                vocab_size=VOCAB, hidden_size=32, decoder_ffn_dim=48, num_decoder_layers=2,
                num_decoder_attention_heads=4, max_position_embeddings=96, init_std=0.15,
            )
        ),
        "xlnet": lambda: t.XLNetLMHeadModel(t.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4)),
        "bart_decoder": lambda: t.BartForCausalLM(t.BartConfig(**BART, is_decoder=True, is_encoder_decoder=False)),
        "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**BART)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT)),
        "mamba": lambda: t.MambaForCausalLM(
            t.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8)
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    return models[name]().eval()


# head apart, shared prefix, padded
WAYS = {
    "lfm2": (True, False, True),
    "qwen3_5": (True, False, True),
    "deepseek_v32": (True, False, True),
    "llama4_text": (False, True, True),
    "modernbert": (False, True, True),
    "minimax": (True, False, True),
    "fsmt": (False, False, True),
    "bart_decoder": (True, False, False),
    "bart": (True, False, True),
    "qwen3": (True, True, True),
}


@pytest.mark.parametrize("name", WAYS)
def test_equals_plain_forwards(name: str) -> None:
    """A padded batch on either side: every score is that of a forward without a cache of the prompt alone."""
    model, index = make(name), make_index(12)
    ways = verify(model, model_head(model))
    assert tuple(ways)[:3] == WAYS[name]
    for side in ("left", "right"):
        retriever = rx.SIDRetriever(model, index, beam_width=14)
        found = retriever.retrieve(*prompts(side))
        for row, expected in enumerate(brute_force(model, index, *prompts(side))):
            kept = found.items[row] >= 0
            assert found.scores[row][kept].tolist() == pytest.approx(sorted(expected.values())[::-1], abs=2e-5)


@pytest.mark.parametrize(("name", "dtype"), [("lfm2", torch.float32), ("qwen3_5", torch.bfloat16)])
def test_verify_packing_sees_a_leak_at_the_models_own_initialization(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEXT, "initializer_range", 0.02)
    monkeypatch.setitem(TEXT, "hidden_size", 64)
    with pytest.raises(ValueError, match="depend on another's tokens"):
        verify_packing(make(name).to(dtype))


@pytest.mark.parametrize("name", ["llama4_text", "modernbert"])
def test_packing_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{type(make(name)).__name__} cannot be packed"):
        verify_packing(make(name))


@pytest.mark.parametrize("name", ["prophetnet", "xlnet"])
def test_a_model_that_looks_ahead_is_refused_by_name(name: str) -> None:
    """XLNet sees every token; ProphetNet's relative positions change with the length of what it is given."""
    model = make(name)
    message = f"model must be causal: later tokens change the logits of {type(model).__name__}"
    with pytest.raises(TypeError, match=message):
        rx.SIDRetriever(model, make_index(12), beam_width=4).retrieve(*prompts())


@pytest.mark.parametrize("error", [RuntimeError, KeyError, TypeError])
def test_a_models_own_error_with_a_cache_names_the_model(error: type[Exception]) -> None:
    class NoSteps(transformers.Qwen3ForCausalLM):
        def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
            if past_key_values is not None and past_key_values.get_seq_length():
                raise error("no steps")
            return super().forward(input_ids, past_key_values=past_key_values, **kwargs)

    model = NoSteps(transformers.Qwen3Config(**TEXT)).eval()
    with pytest.raises(
        TypeError, match=r"model must give the same logits with a KV cache.*: NoSteps fails: .*no steps"
    ):
        rx.SIDRetriever(model, make_index(12), beam_width=4).retrieve(*prompts())


def test_a_negative_context_is_no_window() -> None:
    """XLNet's config says -1."""
    model, index = make("qwen3"), make_index(12)
    found = rx.SIDRetriever(model, index, beam_width=4).retrieve(*prompts())
    model.config.max_position_embeddings = -1
    assert context(model.config) is None
    again = rx.SIDRetriever(model, index, beam_width=4, shared_prefix=True).retrieve(*prompts())
    assert torch.equal(again.items, found.items)
    verify_packing(model)


def test_a_model_that_cannot_be_packed_trains_a_row_a_candidate() -> None:
    """As docs/models.md says: its own logits, then the ops."""
    model, prompt = make("lfm2"), torch.tensor([5, 6, 7])
    sessions = rx.SessionBatch(
        torch.tensor([[30, 40], [30, 41], [31, 42]]), torch.full((3,), 2), torch.tensor([0, 3]), torch.tensor([1])
    )
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
    for _ in range(3):
        logits = model(torch.cat((prompt.expand(3, -1), sessions.tokens[:, :-1]), 1), use_cache=False).logits[:, -2:]
        loss = rx.rad_dpo_loss(rx.token_logps(logits, sessions.tokens), sessions, sft_weight=0.0, protect="none").loss
        logps = logits.double().log_softmax(-1).gather(-1, sessions.tokens[..., None])[..., 0]
        rewards = 2.0 * logps.mean(1)
        assert loss.item() == pytest.approx(
            torch.nn.functional.softplus((rewards[1:] - rewards[0]).logsumexp(0)).item(), abs=1e-5
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
