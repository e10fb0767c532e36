"""States, logits and an index that the tests of the CUDA kernels share, by the shim and on a GPU. All on the CPU."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMALIZE = ["vocab", "level", "trie"]


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def state_of(scores: Tensor, nodes: Tensor) -> rx.BeamState:
    return rx.BeamState(scores, torch.full_like(nodes, -1), torch.zeros_like(nodes), nodes)


def random_state(index: rx.TrieIndex, batch: int, width: int, generator: torch.Generator) -> rx.BeamState:
    """Inner nodes, whole SIDs and empty slots of every kind, at any depth and in any order."""
    nodes = torch.randint(-2, index.num_nodes + 2, (batch, width), generator=generator)
    scores = -5 * torch.rand(batch, width, generator=generator)
    empty = torch.rand(batch, width, generator=generator)
    scores[empty < 0.1] = -math.inf
    scores[empty > 0.95] = math.nan
    return state_of(scores, nodes)


def without_dead_slots(state: rx.BeamState, index: rx.TrieIndex) -> rx.BeamState:
    """As the reference takes it: a dead slot has score -inf and node -1."""
    live = (state.scores > -math.inf) & (state.nodes >= 0) & (state.nodes < index.num_nodes)
    return state_of(torch.where(live, state.scores, -math.inf), torch.where(live, state.nodes, -1))


def exact_logits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Log-probs without rounding, so that candidates tie often: the last column, no child's, is the log-sum-exp."""
    logits = torch.randint(-3, 4, shape, generator=generator_of(seed)) / 2
    logits[..., -1] = 200
    return logits.to(dtype)


def wide_index() -> rx.TrieIndex:
    """Six nodes with up to 1500 children each, at scattered token ids."""
    rng = np.random.default_rng(0)
    sids = np.stack([rng.integers(0, 6, 6000), rng.integers(0, 1500, 6000)], 1)
    tokens = [list(range(6)), (7 + rng.permutation(1500)).tolist()]
    return rx.TrieIndex.build(sids, vocab=rx.SIDVocab([6, 1500], token_ids=tokens, eos=6))


@cache
def wide_reference() -> reference.TrieIndex:
    """The same in Python, made once."""
    return reference.TrieIndex.of(wide_index())


def six_beams(batch: int = 2) -> rx.BeamState:
    """One at each node of wide_index's first level."""
    return state_of(-torch.arange(6.0 * batch).reshape(batch, 6) / 2, torch.tensor([[1, 2, 3, 4, 5, 6]] * batch))
