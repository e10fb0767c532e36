"""Tiny random models of transformers, and rows of sessions to train them on."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB, WINDOW = 40, 48
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Far from a uniform softmax, so that a wrong mask shows.
    "initializer_range": 0.3,
}


def qwen3(**options: Any) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "head_dim": 4, **options}))


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "tie_word_embeddings": True, **options}))


def gpt2(**options: Any) -> GPT2LMHeadModel:
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": WINDOW, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    special = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "attn_pdrop": 0.0, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**{**shape, **special, **options}))


def t5(**options: Any) -> T5ForConditionalGeneration:
    shape = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(
        T5Config(**{**shape, "dropout_rate": 0.0, "decoder_start_token_id": 0, **options})
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.normal_()
    return model


def t5_unscaled(**options: Any) -> T5ForConditionalGeneration:
    """As T5 v1.1: the decoder's states go to the head as they are."""
    return t5(**options, tie_word_embeddings=False)


def seeded(make: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return make(**options).eval()


def session_rows(count: int, seed: int = 0, codes: int = 4, empty: bool = True) -> list[dict[str, Any]]:
    """Rows whose candidates share prefixes, of 1 to 3 tokens and 0 to 3 positives and negatives, and items."""
    source = random.Random(seed)

    def sid() -> list[int]:
        return [3 + 4 * level + source.randrange(codes) for level in range(source.choice((1, 2, 3, 3, 3)))]

    rows = []
    for number in range(count):
        positives, negatives = source.randrange(0 if empty else 1, 4), source.randrange(0 if empty else 1, 4)
        rows.append(
            {
                "prompt_ids": [source.randrange(1, VOCAB) for _ in range(source.randrange(1, 9))],
                "positives": [sid() for _ in range(positives)],
                "negatives": [sid() for _ in range(negatives)],
                "items": [1000 + number * 3 + i for i in range(positives)],
            }
        )
    return rows
