"""What each family of transformers allows: ``python -m python_tests.support.model_families`` writes docs/models.md.

Every causal and encoder-decoder class is built small, at random, from its own default config, and asked what the
package finds out about it. Where the retriever takes it, its scores must be those of plain forwards.
"""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers.models.auto import modeling_auto

import raddpo_ext as rx
from raddpo_ext.integrations.base_model import decoder_start
from raddpo_ext.integrations.probes import Ways
from raddpo_ext.integrations.session_states import verify_packing

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
SEQ_TO_SEQ = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FAMILIES = list(dict.fromkeys((*CAUSAL.items(), *SEQ_TO_SEQ.items())))
VOCAB, MOST_PARAMETERS = 64, 50_000_000
CODES = rx.SIDVocab([4, 4, 4], offset=40)
SIDS = torch.unique(torch.randint(0, 4, (12, 3), generator=torch.Generator().manual_seed(0)), dim=0)

# Every setting of these names, in a config and in the configs inside it.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "src_vocab_size", "tgt_vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "kv_channels", "global_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("d_ff", "dff", "dim_ff", "d_inner", "n_inner"), 48),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_num_experts_per_tok"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 96),
    **dict.fromkeys(("initializer_range", "init_std"), 0.15),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "index_n_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
# Further settings that some families need.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 16}
QWEN4 = {
    "hc_lowrank": 16, "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
DOTS3 = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
    "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},  # the default None fails
    "dots3_note": DOTS3,
    "dots3_note_text": DOTS3,
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "led": {"attention_window": 16},
    "longcat_flash": {"expert_ffn_hidden_size": 48, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "minicpm3": {"dim_model_base": 32},  # logits of the usual size
    "mt5": {"initializer_factor": 0.3},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "moe"],
    },
    "pegasus_x": {"block_size": 16},
    "qwen4_exp": QWEN4,
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 48, "lru_width": 32},
    "reformer": {"axial_pos_shape": (8, 12), "axial_pos_embds_dim": (16, 16), "attention_head_size": 8},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {
        "shape_vocab_size": 64, "pronunciation_vocab_size": 64, "shape_embed_dim": 8, "pronunciation_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2,
        "mamba_d_state": 8, "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": {"mamba_d_state": 8, "mamba_headdim": 16, "n_mamba_heads": 4, "chunk_size": 16, "mamba_ngroups": 1},
}  # fmt: skip
SHARED, ROWS, GROUPS = "shared prefix", "one cache row per beam", "in groups by prompt length"
LIMIT, LIMITS = 1e-5, {"zamba2": 5e-5}  # its scan takes differences of long sums, in float32 whatever the model has
# Reasons that the retriever's error does not give.
REASONS = {
    "cpmant": "a prompt's tokens see one another",
    "musicgen": "a list of heads, one per codebook of audio",
    "musicgen_melody": "a list of heads, one per codebook of audio",
    "prophetnet": "its logits change with the length of its input",
    "recurrent_gemma": "it keeps its state in its layers, not in a cache",
    "voxtral_realtime": "it needs audio",
    "xlm": "it looks ahead by default, and keeps no cache",
    "xlstm": "it keeps a state of its own, not a cache that can be reordered",
    "xlnet": "a prompt's tokens see one another",
}


class Found(NamedTuple):
    """A row of the page; ``error`` is how far the retriever's scores are from plain forwards."""

    retrieval: str
    packing: str
    error: float | None = None


def small(config: Any, **options: Any) -> Any:
    """A config of the same class, with the same nested configs, and with few and small layers."""
    fields = [field.name for field in dataclasses.fields(config) if field.init]
    values = {name: SIZES[name] for name in fields if name in SIZES}
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            values[name] = small(getattr(config, name))
    values |= {name: True for name in ("is_decoder", "add_cross_attention") if getattr(config, name, False)}
    if "kv_lora_rank" in fields:
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    # Settings per layer: one layer of each kind, and at least two layers.
    by_layer = {name: getattr(config, name) for name in PER_LAYER if getattr(config, name, None)}
    by_layer = {name: list(value) for name, value in by_layer.items() if name in fields}
    if by_layer:
        kinds = list(zip(*by_layer.values(), strict=False))
        first = sorted({kinds.index(kind) for kind in kinds})
        first = first if len(first) > 1 else [0, 1]
        values |= {name: [value[i] for i in first] for name, value in by_layer.items()}
        values["num_hidden_layers"] = len(first)
    return type(config)(**{**values, **options})


def build(family: str, name: str, attention: str | None = None) -> Any:
    """The family's model: small, at random, in evaluation mode."""
    cls = getattr(transformers, name)
    config = transformers.CONFIG_MAPPING[family]()
    if not isinstance(config, cls.config_class):
        inside = [getattr(config, part) for part in config.sub_configs]
        config = next((part for part in inside if isinstance(part, cls.config_class)), config)
    options = dict(OVERRIDES.get(family, {}))
    if family in CAUSAL and CAUSAL[family] == name and any(f.name == "is_decoder" for f in dataclasses.fields(config)):
        options.setdefault("is_decoder", True)
    config = small(config, **options)
    with torch.device("meta"):
        count = sum(weight.numel() for weight in cls(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=attention).float().eval()
    if model.config.is_encoder_decoder and getattr(model.generation_config, "decoder_start_token_id", None) is None:
        model.generation_config.decoder_start_token_id = SIZES["decoder_start_token_id"]
    head = model.get_output_embeddings()
    with torch.no_grad():
        if (
            isinstance(head, torch.nn.Linear) and head.weight.std() < 0.15
        ):  # logits far from uniform, so that a fault shows
            head.weight.mul_(0.2 / head.weight.std())
    return model


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, of 6 and 4 tokens."""
    ids = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    return ids * mask, mask


@torch.no_grad()
def plain(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """Each SID's log-prob after a prompt, by a forward without a cache."""
    tokens = CODES.encode(SIDS)
    prompt = prompt.expand(len(tokens), -1)
    if model.config.is_encoder_decoder:
        start = torch.full_like(tokens[:, :1], decoder_start(model))
        logits = model(
            input_ids=prompt, decoder_input_ids=torch.cat((start, tokens[:, :-1]), 1), use_cache=False
        ).logits
    else:
        logits = model(input_ids=torch.cat((prompt, tokens[:, :-1]), 1), use_cache=False).logits[:, -3:]
    return logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(1)


def look(family: str, name: str, attention: str | None = None) -> Found:
    """What is found out about a family."""
    try:
        model = build(family, name, attention)
    except Exception as error:
        cause = error.__cause__ or error
        return Found(f"not built: {(str(cause).strip() or type(cause).__name__).splitlines()[0]}", "")
    try:
        verify_packing(model)
        packing = "yes"
    except ValueError:
        packing = "no"
    try:
        ways, error = search(model)
    except TypeError as refusal:
        if name not in str(refusal):
            raise
        return Found(f"refused: {REASONS.get(family, str(refusal).splitlines()[0].split(' fails: ')[-1])}", packing)
    return Found(SHARED if ways.shared else ROWS if ways.padded else GROUPS, packing, error)


def search(model: Any) -> tuple[Ways, float]:
    """How the retriever runs a model, and how far its scores are from plain forwards: of both prompts in one batch,
    padded, and of each by itself."""
    ids, mask = prompts()
    retriever = rx.SIDRetriever(model, rx.TrieIndex.build(SIDS, vocab=CODES), beam_width=16)
    ways, error = retriever._find_ways(mask, retriever.index, retriever._widths(retriever.index)), 0.0
    alone = [row[real == 1][None] for row, real in zip(ids, mask, strict=True)]
    expected = torch.cat([plain(model, row)[None] for row in alone])
    together = retriever.retrieve(ids, mask, top_k=len(SIDS))
    for found, rows in ((together, expected), *((retriever.retrieve(alone[i]), expected[i : i + 1]) for i in range(2))):
        scores = torch.full_like(rows, float("inf"))
        for row in range(len(rows)):
            kept = found.items[row] >= 0
            scores[row, found.items[row][kept]] = found.scores[row][kept].double()
        error = max(error, float((scores - rows).abs().nan_to_num(float("inf")).max()))
    return ways, error


def right(family: str, found: Found) -> bool:
    return found.error is None or found.error <= LIMITS.get(family, LIMIT)


def line(family: str, name: str, found: Found) -> str:
    """Its row of the page's table."""
    return f"| {family} | `{name}` | {found.retrieval.replace('|', ' ')} | {found.packing} |"


def heading() -> str:
    return f"Found with transformers {transformers.__version__}"


def page(rows: dict[tuple[str, str], Found]) -> str:
    counts = Counter(found.retrieval.split(":")[0] for found in rows.values())
    packed = sum(found.packing == "yes" for found in rows.values())
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in (SHARED, ROWS, GROUPS, "refused", "not built"))
    table = "\n".join(line(*key, found) for key, found in sorted(rows.items()))
    return f"""# Models

This page lists which causal and encoder-decoder classes of transformers the retriever and the trainer accept.
{heading()}: {len(rows)} classes; {summary}; {packed} can be packed.

Settings can change an answer: another attention, adapters, a shorter window. The retriever and `verify_packing` check
your model each time, and what they find counts.

How the retriever ([serving](serving.md)) runs a model:

- **{SHARED}**: all beams of a prompt share its keys and values. This is the fastest way. Prompts longer than the
  model's window, and models with flash attention, use one cache row per beam instead.
- **{ROWS}**: the cache has one row per beam, reordered every step. Every encoder-decoder runs in this way.
- **{GROUPS}**: padding would change the scores, so only prompts of one length share a batch. Use few different lengths.
- **refused**: a `TypeError` that names the model. Its cache cannot be reordered with the beams (as in most recurrent
  models), or it gives other scores with the cache than without, or it looks ahead.
- **not built**: no small model could be made, for the reason in the table. The retriever finds out with your model.

"Packing" says whether the trainer packs a session's candidates into one row ([training](training.md#packing)). If it
says no, `verify_packing` and the trainer raise a `ValueError`. Train such a model in
[a loop of your own](howto/own-loop.md) with one row per candidate: `rx.token_logps` of its own logits, then
`rx.rad_dpo_loss`.

Sparse attention that keeps the best `index_topk` tokens (DeepSeek V3.2 and similar models) may keep any of the tokens
that score exactly 0. Beyond that many tokens such a model gives other logits with a cache than without, in `generate`
too.

How this was found: each class was built small from its own default config, with random weights, and checked. Wherever
the retriever accepts a model, its scores for two prompts of unequal length, in one padded batch and each by itself,
equal those of plain forwards without a cache to {LIMIT:g} in float32 (Zamba2, whose scan rounds more, to
{LIMITS["zamba2"]:g}). `make test` repeats the check. `python -m python_tests.support.model_families` also checks eager
attention, and writes this page anew.

| Family | Class | Retrieval | Packing |
|---|---|---|---|
{table}
"""


def main() -> int:
    """Writes the page, and looks with eager attention too: some go other ways with it, all must be right."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows, faults = {}, 0
    for family, name in FAMILIES:
        rows[family, name] = look(family, name)
        for attention in (None, "eager"):
            start = time.perf_counter()
            found = look(family, name, attention) if attention else rows[family, name]
            faults += not right(family, found)
            print(
                f"{time.perf_counter() - start:6.2f} s",
                line(family, name, found),
                attention or "",
                found.error,
                "" if right(family, found) else "WRONG",
                flush=True,
            )
    PAGE.write_text(page(rows))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
