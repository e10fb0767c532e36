"""The draws of a step with replacement in plain torch, for devices that have no kernel for it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext.index.trie import TrieIndex

_WORD = 0xFFFFFFFF


def split_draws(
    logits: Tensor,
    scores: Tensor,
    draws: Tensor,
    nodes: Tensor,
    keys: Tensor,
    seed: Tensor,
    index: TrieIndex,
    level: int,
    beam_width: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operator ``sample_step`` returns with ``replacement``, for beams of any level; arguments as there.

    Holds a few tensors ``[B, W, children of the largest node]`` and one ``[B, W, beam_width]``; does not synchronise.
    """
    if not index.num_nodes:
        empty = scores.new_full((len(nodes), beam_width), -math.inf)
        none = nodes.new_full(empty.shape, -1)
        return empty, none, torch.zeros_like(none), none.clone(), empty.clone(), torch.zeros_like(empty)
    # The children of each beam. A finished beam has itself as its only one.
    batch, width = nodes.shape
    live = (scores > -math.inf) & (nodes >= 0)
    first, count = index.child_ranges(nodes)
    place = torch.arange(max(index.num_symbols), device=nodes.device)
    inside = live[..., None] & (place < count[..., None])
    place = torch.where(inside, first[..., None] + place, 0)
    tokens, child = index.node_tokens[place].long(), index.nodes_at(place.view(-1)).view(place.shape)
    column = tokens if level < 0 else torch.searchsorted(_level_tokens(index, level, nodes.device), tokens)
    column = torch.where(inside, column, 0).clamp(max=logits.shape[2] - 1)
    values = torch.where(inside, logits.gather(2, column).float() * scale, -math.inf)
    lse = values.logsumexp(2, keepdim=True)
    logps = torch.where(inside & lse.isfinite(), (values - lse).clamp(max=0), -math.inf)
    # The draws through a beam, by the inverse of its distribution function.
    sums = logps.double().exp().cumsum(2)
    number = torch.arange(beam_width, device=nodes.device).expand(batch, width, -1)
    at = (_noise(nodes[..., None], 1 + number, keys[:, None, None], seed) + 0.5) * 2.0**-32 * sums[..., -1:]
    chosen = torch.searchsorted(sums, at, right=True).clamp(max=sums.shape[2] - 1)
    drawn = (number < draws[..., None]) & (sums[..., -1:] > 0)
    counts = torch.zeros_like(sums).scatter_add_(2, chosen, drawn.double())
    finished = live & (index.depths(nodes) > 0) & (count == 0)
    counts[..., 0] = torch.where(finished, draws.double(), counts[..., 0])
    # The rows: most draws first, ties to the lower parent and then the lower token, which the sort keeps in order.
    best, order = counts.flatten(1).sort(dim=1, descending=True, stable=True)
    best, order = best[:, :beam_width], order[:, :beam_width]
    missing = beam_width - order.shape[1]
    best, order = (F.pad(x, (0, missing)) for x in (best, order))
    found, parents = best > 0, order // place.shape[2]

    def pick(per_child: Tensor, of_finished: Tensor, empty: float) -> Tensor:
        value = torch.where(
            finished.gather(1, parents), of_finished.gather(1, parents), per_child.flatten(1).gather(1, order)
        )
        return torch.where(found, value, empty)

    zeros = torch.zeros_like(scores)
    return (
        pick(scores[..., None] + logps, scores, -math.inf),
        pick(tokens, torch.full_like(nodes, -1), -1),
        torch.where(found, parents, 0),
        pick(child, nodes, -1),
        torch.where(found, best.float(), -math.inf),
        pick(logps, zeros, 0.0),
    )


def _level_tokens(index: TrieIndex, level: int, device: torch.device) -> Tensor:
    """The token ids of a level's symbols, ascending."""
    ids = index.level_tokens(level)
    return torch.arange(ids.start, ids.stop, device=device) if isinstance(ids, slice) else ids.long()


def _noise(low: Tensor, high: Tensor, key: Tensor, seed: Tensor) -> Tensor:
    """The first word of Philox 4x32-10, see ``csrc/sample_step/sample_step_math.h``; int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = low & _WORD, high & _WORD, key & _WORD, key >> 32 & _WORD
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0.expand(torch.broadcast_shapes(low.shape, high.shape, key.shape))
