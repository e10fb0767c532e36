"""Sampling from the trie, top down, one child at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import raddpo_ext.index.trie as fused
from raddpo_ext.decoding.sample_search import SampleResult
from raddpo_ext.decoding.sample_step import SampleState
from raddpo_ext.reference.beam_search import row_lse
from raddpo_ext.reference.trie import TrieIndex


def philox(counter: tuple[int, int, int, int], seed: int) -> tuple[int, int, int, int]:
    """Philox 4x32-10 (Salmon et al., 2011): four random words of 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF
        c2, c3 = (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def child_uniform(seed: int, key: int, child: int) -> float:
    """The uniform number of a child node, in (0, 1): four nodes share a block of random words."""
    key &= 2**64 - 1
    return (philox((child // 4, 0, key & 0xFFFFFFFF, key >> 32), seed)[child % 4] + 0.5) / 2**32


def draw_uniform(seed: int, key: int, node: int, draw: int) -> float:
    """The uniform number of one of the draws that pass through a node."""
    key &= 2**64 - 1
    return (philox((node, 1 + draw, key & 0xFFFFFFFF, key >> 32), seed)[0] + 0.5) / 2**32


def sample_step(
    logits: Tensor,
    state: SampleState,
    index: TrieIndex | fused.TrieIndex,
    beam_width: int,
    *,
    seed: int,
    keys: Tensor | None = None,
    temperature: float = 1.0,
    replacement: bool = False,
) -> SampleState:
    """See :func:`raddpo_ext.sample_step`; with ``replacement`` ``state.perturbed`` is the number of draws in each beam.

    Scores are float64 for float64 logits, else float32. A restricted fused index is refused, see :func:`beam_step`.
    """
    if isinstance(index, fused.TrieIndex) and index.live is not None:
        raise ValueError("index must be a reference.TrieIndex or unrestricted, got a restricted raddpo_ext.TrieIndex")
    trie = TrieIndex.of(index)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    shape = (len(logits), beam_width)
    out = SampleState(
        scores=logits.new_full(shape, -math.inf),
        tokens=state.nodes.new_full(shape, -1),
        parents=state.nodes.new_zeros(shape),
        nodes=state.nodes.new_full(shape, -1),
        perturbed=logits.new_full(shape, -math.inf),
        logps=logits.new_zeros(shape),
    )
    for query, rows in enumerate(logits):
        key = query if keys is None else int(keys[query])
        # Every live beam offers its children or, if it is a leaf, itself.
        offered: list[tuple[Tensor, Tensor, int, int, int, Tensor]] = []
        for beam, node in enumerate(state.nodes[query].tolist()):
            score, perturbed = (x[query, beam].to(logits.dtype) for x in (state.scores, state.perturbed))
            if not 0 <= node < trie.num_nodes or not score > -math.inf:
                continue
            children = trie.child_nodes[node]
            if children:
                tokens = [trie.prefixes[child][-1] for child in children]
                logps = (rows[beam, tokens] - row_lse(rows[beam, tokens])).clamp(max=0)
                if replacement:
                    split = _split(logps, node, int(perturbed), seed, key)
                else:
                    split = _perturb(logps, score, perturbed, children, seed, key)
                offered += [
                    (split[i], score + logps[i], token, beam, child, logps[i])
                    for i, (token, child) in enumerate(zip(tokens, children, strict=True))
                ]
            elif trie.node_items[node]:
                offered.append((perturbed, score, -1, beam, node, torch.zeros_like(score)))
        # Keep the best. The sort is stable, so ties go to the lower parent, then to the lower token.
        offered = [one for one in offered if one[0] > -math.inf]  # neither -inf nor NaN
        drawn = sorted(offered, key=lambda one: -float(one[0]))[:beam_width]
        for slot, (rank, score, token, beam, node, logp) in enumerate(drawn):
            out.perturbed[query, slot], out.scores[query, slot], out.logps[query, slot] = rank, score, logp
            out.tokens[query, slot], out.parents[query, slot], out.nodes[query, slot] = token, beam, node
    return out


def _perturb(logps: Tensor, score: Tensor, perturbed: Tensor, children: list[int], seed: int, key: int) -> Tensor:
    """The children's perturbed scores, given that the largest is their parent's; the root has none."""
    uniform = torch.tensor([child_uniform(seed, key, child) for child in children], dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform)).to(logps)
    own = score + logps + gumbel
    if perturbed == math.inf:
        return own
    largest = own[own > -math.inf].max() if (own > -math.inf).any() else own.new_tensor(-math.inf)
    v = perturbed - own + torch.log1p(-(own - largest).exp())
    given = perturbed - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
    return torch.where(own == largest, perturbed, given)


def _split(logps: Tensor, node: int, draws: int, seed: int, key: int) -> Tensor:
    """How many of a node's draws each child gets; ``-inf`` for none."""
    counts = torch.full_like(logps, -math.inf)
    if logps.isnan().any():
        return counts
    sums = logps.exp().double().cumsum(0)
    for draw in range(draws):
        chosen = int((sums <= draw_uniform(seed, key, node, draw) * sums[-1]).sum())
        counts[chosen] = counts[chosen].clamp(min=0) + 1
    return counts


def sample_search(
    step_fn: Callable[[Tensor, Tensor, int], Tensor],
    index: TrieIndex | fused.TrieIndex,
    *,
    batch_size: int,
    samples: int,
    seed: int,
    keys: Tensor | None = None,
    replacement: bool = False,
    temperature: float = 1.0,
) -> SampleResult:
    """See :func:`raddpo_ext.sample_search`. Nothing is pruned: every SID of the catalogue gets its perturbed score."""
    trie = TrieIndex.of(index)
    zeros = torch.zeros(batch_size, 1, dtype=torch.int64, device=trie.device)
    start = torch.full_like(zeros.double(), samples if replacement else math.inf)
    state = SampleState(zeros.double(), zeros - 1, zeros, zeros, start, zeros.double())
    width = max(trie.num_nodes, samples + 1)
    most_levels = trie.sid_levels + (trie.vocab is not None and trie.vocab.eos is not None)
    token_logps = start.new_zeros(batch_size, 1, most_levels)
    for level in range(trie.levels):
        logits = step_fn(state.tokens, state.parents, level)
        state = sample_step(
            logits, state, trie, width, seed=seed, keys=keys, temperature=temperature, replacement=replacement
        )
        token_logps = token_logps.gather(1, state.parents[..., None].expand(-1, -1, most_levels))
        token_logps[..., level] = state.logps
    # The first rows are drawn, and the next one's perturbed score is the threshold.
    logps, nodes = state.scores[:, :samples], state.nodes[:, :samples]
    threshold = state.perturbed[:, samples].double()
    items = [[trie.node_items[node][0] if node >= 0 else -1 for node in row] for row in nodes.tolist()]
    if replacement:
        counts = state.perturbed[:, :samples].clamp(min=0).long()
        log_weights = (counts / samples).log()
        threshold = torch.full_like(threshold, -math.inf)
    else:
        counts = (nodes >= 0).long()
        included = -torch.expm1(-(logps - threshold[:, None]).exp())  # the probability to be above the threshold
        log_weights = torch.where(nodes >= 0, logps - included.log(), -math.inf)
    sids, _ = trie.paths(nodes)
    return SampleResult(
        sids,
        torch.tensor(items),
        logps,
        token_logps[:, :samples].masked_fill((nodes < 0)[..., None], 0),
        log_weights,
        counts,
        threshold,
    )
