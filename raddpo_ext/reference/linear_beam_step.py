"""One step of the beam search from hidden states; every logit is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import raddpo_ext.index.trie as fused
from raddpo_ext.decoding.beam_step import BeamState
from raddpo_ext.reference.beam_search import beam_step
from raddpo_ext.reference.trie import TrieIndex


def linear_beam_step(
    hidden: Tensor,
    weight: Tensor,
    state: BeamState,
    index: TrieIndex | fused.TrieIndex,
    beam_width: int,
    *,
    bias: Tensor | None = None,
    normalize: str = "vocab",
    length_penalty: float = 0.0,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
) -> BeamState:
    """See :func:`raddpo_ext.linear_beam_step`. Scores are float64 for float64 states, else float32."""
    logits = F.linear(hidden, weight, bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return beam_step(logits / temperature, state, index, beam_width, normalize=normalize, length_penalty=length_penalty)
