"""What the integrations must know about a transformers model: the model without wrappers, its head, its windows."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from raddpo_ext.integrations.onednn import is_linear
from raddpo_ext.logps.head import Head, checked_head

_T5_FAMILY = ("t5", "longt5", "pop2piano", "switch_transformers", "umt5")
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")


def base_model(model: Any) -> Any:
    """The transformers model behind ``torch.compile`` and PEFT adapters; raises for what is not one."""
    if type(model).__name__ in _WRAPPERS:
        raise ValueError(
            f"model is wrapped in {type(model).__name__}, which averages gradients only if called itself: call "
            "accept_sessions on the model before wrapping it, then call wrapped(packed=packed)"
        )
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"model has adapters of type {model.active_peft_config.peft_type.value}, which put tokens before the "
                "prompt and cannot be packed; use adapters of single layers, such as LoRA"
            )
        model = model.get_base_model()
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    return model


def logits_map(model: Any) -> dict[str, float]:
    """Return how a model turns its head's output into logits: ``temperature`` and ``logit_softcap``, if it has them.

    They are arguments of :class:`raddpo_ext.RADDPOLoss`, :func:`raddpo_ext.linear_token_logps` and
    :func:`raddpo_ext.linear_beam_step`.

    Example:
        >>> from transformers import Gemma2Config, Gemma2ForCausalLM
        >>> from raddpo_ext.integrations.transformers import logits_map
        >>> config = Gemma2Config(
        ...     vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     num_key_value_heads=1, head_dim=8
        ... )
        >>> logits_map(Gemma2ForCausalLM(config))
        {'logit_softcap': 30.0}
    """
    config = base_model(model).config.get_text_config(decoder=True)
    found = {}
    if getattr(config, "final_logit_softcapping", None) is not None:  # Gemma
        found["logit_softcap"] = float(config.final_logit_softcapping)
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        found["temperature"] = float(config.logits_scaling)
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        found["temperature"] = 1 / float(config.logit_scale)
    return found


def model_head(model: Any) -> Head | None:
    """A model's head, or None if only the model can run it.

    That is so for a compiled model, and for a head with adapters, quantized weights or sharded weights.
    """
    if hasattr(model, "_orig_mod"):
        return None
    head = base_model(model).get_output_embeddings()
    if not is_linear(head) or hasattr(head.weight, "placements"):
        return None
    return checked_head(head.weight, head.bias, **logits_map(model))


def context(config: Any) -> int | None:
    """Maximum number of positions of a text config; None if it names no limit or a negative one (XLNet's -1)."""
    positions = getattr(config, "max_position_embeddings", None)
    return None if positions is None or positions < 0 else positions


_SLOT_WINDOW = re.compile(r"window|chunk_size|topk|local_attention")
_NO_WINDOW = re.compile(
    r"max_window_layers|pattern|topk_group|topk_method|moe_topk|^(mamba|ssm|conv|time|audio|vision|speech)"
)
_POSITION_WINDOWS = ("sliding_window", "attention_chunk_size")


def windows(model: Any) -> dict[str, int]:
    """The windows that a model's settings count in positions, by name.

    These are the context, sliding and chunked windows, and the length beyond which a rope changes its frequencies.
    """
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "layer_types", None) or ("sliding_attention",)
    found = {"max_position_embeddings": context(config)}
    if "sliding_attention" in layers:
        found["sliding_window"] = getattr(config, "sliding_window", None)
    if "chunked_attention" in layers:
        found["attention_chunk_size"] = getattr(config, "attention_chunk_size", None)
    found["original_max_position_embeddings"] = changing_rope(model)
    return {name: window for name, window in found.items() if window is not None}


def changing_rope(model: Any) -> int | None:
    """The length up to which a model's rope keeps its frequencies; None if it always does.

    Beyond that length LongRoPE and dynamic scaling use other frequencies for all tokens, but the keys in a cache keep
    the former ones.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("longrope", "dynamic"):
            name = "original_max_position_embeddings"
            return part.get(name) or getattr(config, name, None) or config.max_position_embeddings
    return None


def slot_windows(model: Any) -> dict[str, int]:
    """The windows that count columns of the cache or of a packed row, not positions, by name.

    Every setting whose name suggests a window counts as one, except those of :func:`windows`: up to that length, what
    the setting means makes no difference. Square masks among the model's buffers count too, such as GPT-Neo's causal
    mask.
    """
    found = {
        name: value
        for name, value in model.config.get_text_config(decoder=True).to_dict().items()
        if type(value) is int and value > 0 and name not in _POSITION_WINDOWS
        if _SLOT_WINDOW.search(name) and not _NO_WINDOW.search(name)
    }
    for name, buffer in model.named_buffers():
        # A mask is bool or has dimensions of 1 for batch and heads; square matrices of adapters do not.
        is_mask = buffer.dtype == torch.bool or buffer.shape[:-2] == (1, 1)
        if is_mask and buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2] > 1:
            found[name] = buffer.shape[-1]
    return found


def expert_capacities(model: Any) -> dict[str, float]:
    """Settings that limit the tokens of an expert, which drops the others: a number, or a share of the batch."""
    config = model.config.get_text_config(decoder=True).to_dict()
    return {k: v for k, v in config.items() if "capacity" in k and type(v) in (int, float)}


def head_scale(model: Any) -> float:
    """The factor by which the T5 family multiplies its decoder's states before the head; 1 for other models."""
    config = model.config
    if config.model_type not in _T5_FAMILY:
        return 1.0
    scales = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
    return model.model_dim**-0.5 if scales else 1.0


def decoder_start(model: Any) -> int:
    """The start token of the decoder's input, found as ``generate`` does."""
    for config in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            token = getattr(config, name, None)
            if token is not None:
                return int(token)
    raise ValueError("model has no decoder_start_token_id, set it in model.generation_config")


def forward_parameters(model: Any) -> set[str]:
    """Names of the arguments of a model's forward, without the wrappers of ``torch.compile`` and PEFT."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return set(inspect.signature(model.forward).parameters)
