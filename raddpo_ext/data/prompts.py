"""Prompts of different lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_prompts(prompts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids, 0 beyond a prompt's end, and the mask of real tokens, bool: ``[B, T]`` each, padded on the right."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    input_ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    return input_ids.to(device), (torch.arange(input_ids.shape[1]) < lengths[:, None]).to(device)
