"""Checks of the prompts that a retriever is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.integrations.base_model import context
from raddpo_ext.integrations.merger_checks import merger_of


def checked_prompts(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, index: TrieIndex
) -> tuple[Tensor, Tensor]:
    """Check the prompts of a call.

    Returns:
        The prompts, 0 on padding, and the mask of real tokens, bool ``[B, T]``: both on the CPU, because their values
        are read several times.

    Raises:
        ValueError, TypeError: naming the argument and the value.
    """
    # Types, shapes and devices.
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be an integer tensor, got {type(input_ids).__name__}")
    _check.integer_tensor(input_ids, "input_ids", 2)
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids must hold at least one prompt of one token, got shape {tuple(input_ids.shape)}")
    if not input_ids.device == index.device == model.device:
        raise ValueError(
            f"input_ids, index and model must be on one device, got {input_ids.device}, {index.device}, {model.device}"
        )
    if attention_mask is None:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        mask = _as_mask(attention_mask, input_ids)
    # Values, after one copy to the CPU.
    input_ids, mask = input_ids.long().cpu(), mask.cpu()
    lengths = mask.sum(1)
    _check.none(lengths == 0, lambda row: f"attention_mask[{row}] must keep at least one token, got none")
    _check_tokens(model, input_ids, mask)
    # The last token of a SID is never fed; an encoder reads only the prompt.
    window = context(model.config.get_text_config())
    if window is not None:
        steps = 0 if model.config.is_encoder_decoder else index.levels - 1
        _check.none(
            lengths + steps > window,
            lambda row: (
                f"input_ids[{row}] has {int(lengths[row])} tokens, and with {steps} more of the SID exceeds the "
                f"model's window of {window} (max_position_embeddings)"
            ),
        )
    return input_ids.masked_fill(~mask, 0), mask


def _as_mask(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """Check ``attention_mask``, and return it as bool."""
    if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
        got = attention_mask.dtype if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise TypeError(f"attention_mask must be a bool or integer tensor, got {got}")
    if attention_mask.shape != input_ids.shape or attention_mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask must have the shape and device of input_ids, {tuple(input_ids.shape)} on "
            f"{input_ids.device}, got {tuple(attention_mask.shape)} on {attention_mask.device}"
        )
    return attention_mask != 0


def _check_tokens(model: Any, input_ids: Tensor, mask: Tensor) -> None:
    """Raise ValueError for a token that the model's embeddings do not have: a token of its own, or a merged SID."""
    vocab_size: int = model.config.get_text_config().vocab_size
    outside = mask & ((input_ids < 0) | (input_ids >= vocab_size))
    why = f"is outside [0, {vocab_size}), the model's vocabulary"
    merger = merger_of(model)
    if merger is not None:
        outside &= (input_ids < merger.ids.vocab_size) | merger.ids.wrong(input_ids)
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        token = int(input_ids[row, column])
        if merger is not None and token >= merger.ids.vocab_size:
            why = merger.ids.why_not(token)
        raise ValueError(f"input_ids[{row}, {column}] = {token} {why}")
