"""Constrained beam search, one query and one beam at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import raddpo_ext.index.trie as fused
from raddpo_ext.decoding.beam_search import BeamResult
from raddpo_ext.decoding.beam_step import BeamState
from raddpo_ext.reference.trie import TrieIndex


def row_lse(logits: Tensor) -> Tensor:
    """``torch.logsumexp`` over the last dimension, NaN where it is ``+inf``: such a row has no log-probs."""
    lse = logits.logsumexp(-1)
    return lse.masked_fill(lse == math.inf, math.nan)


def beam_step(
    logits: Tensor,
    state: BeamState,
    index: TrieIndex | fused.TrieIndex,
    beam_width: int,
    *,
    normalize: str = "vocab",
    length_penalty: float = 0.0,
) -> BeamState:
    """See :func:`raddpo_ext.beam_step`. Scores are float64 for float64 logits, else float32.

    A restricted fused index is refused: its node numbers have gaps, and those of the plain copy do not.
    """
    if isinstance(index, fused.TrieIndex) and index.live is not None:
        raise ValueError("index must be a reference.TrieIndex or unrestricted, got a restricted raddpo_ext.TrieIndex")
    trie = TrieIndex.of(index)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = state.scores.to(logits.dtype)
    queries = [
        _step_query(rows, scores[query], state.nodes[query], trie, beam_width, normalize, length_penalty)
        for query, rows in enumerate(logits)
    ]
    if not queries:
        empty = state.nodes.new_empty(0, beam_width)
        return BeamState(scores.new_empty(0, beam_width), empty, empty, empty)
    return BeamState(*map(torch.stack, zip(*queries, strict=True)))


def _step_query(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    trie: TrieIndex,
    beam_width: int,
    normalize: str,
    length_penalty: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next ``scores, tokens, parents, nodes [beam_width]`` from logits ``[W, V]``, scores and nodes ``[W]``."""
    # Every live beam offers its children or, if it is a leaf, itself.
    offered_scores, offered_keys = [scores.new_empty(0)], [scores.new_empty(0)]
    offered: list[tuple[int, int, int]] = []  # (token, parent, node), by ascending parent, then token
    for beam, node in enumerate(nodes.tolist()):
        if not 0 <= node < trie.num_nodes:
            continue
        length = len(trie.prefixes[node])
        children = trie.child_nodes[node]
        if children:
            length += 1
            tokens = [trie.prefixes[child][-1] for child in children]
            lse = row_lse(logits[beam, _support(trie, normalize, length - 1, tokens)])
            child_scores = scores[beam] + (logits[beam, tokens] - lse).clamp(max=0)
            offered += [(token, beam, child) for token, child in zip(tokens, children, strict=True)]
        elif trie.node_items[node]:
            child_scores = scores[beam : beam + 1]
            offered.append((-1, beam, node))
        else:  # the root of an empty catalogue
            continue
        offered_scores.append(child_scores)
        offered_keys.append(child_scores / _length_factor(length, length_penalty, child_scores))
    # Keep the best. The sort is stable, so ties go to the lower parent, then to the lower token.
    score, key = torch.cat(offered_scores), torch.cat(offered_keys)
    kept = ((score > -math.inf) & (key > -math.inf)).nonzero()[:, 0]  # neither -inf nor NaN
    best = kept[key[kept].argsort(descending=True, stable=True)][:beam_width]
    # The rest of the slots stay empty.
    slots = torch.tensor([(-1, 0, -1)] * beam_width, dtype=torch.int64, device=nodes.device)
    out = scores.new_full((beam_width,), -math.inf)
    if len(best):
        slots[: len(best)] = torch.tensor(offered, device=nodes.device)[best]
        out[: len(best)] = score[best]
    return out, slots[:, 0], slots[:, 1], slots[:, 2]


def _support(trie: TrieIndex, normalize: str, level: int, children: list[int]) -> list[int] | slice:
    """Columns of the logits that the softmax of a level runs over."""
    if normalize == "vocab":
        return slice(None)
    if normalize == "trie":
        return children
    assert trie.vocab is not None
    codes = trie.vocab.token_ids[level].tolist() if level < trie.vocab.levels else []
    eos = [trie.vocab.eos] if trie.vocab.eos is not None and level > 0 else []
    return [token for token in codes if token >= 0] + eos


def _length_factor(length: int | Tensor, length_penalty: float, like: Tensor) -> Tensor:
    """``length ** length_penalty``, rounded once to the type of ``like``."""
    return torch.as_tensor(length, dtype=torch.float64, device=like.device).pow(length_penalty).to(like.dtype)


def beam_search(
    step_fn: Callable[[Tensor, Tensor, int], Tensor],
    index: TrieIndex | fused.TrieIndex,
    *,
    batch_size: int,
    beam_width: int | Sequence[int],
    normalize: str = "vocab",
    length_penalty: float = 0.0,
    top_k: int | None = None,
) -> BeamResult:
    """See :func:`raddpo_ext.beam_search`. Scores are float64 for float64 logits, else float32."""
    trie = TrieIndex.of(index)
    # One beam per query, at the root.
    zeros = torch.zeros(batch_size, 1, dtype=torch.int64, device=trie.device)
    state = BeamState(zeros.float(), zeros - 1, zeros, zeros)
    for level in range(trie.levels):
        width = beam_width if isinstance(beam_width, int) else beam_width[level]
        logits = step_fn(state.tokens, state.parents, level)
        state = beam_step(logits, state, trie, width, normalize=normalize, length_penalty=length_penalty)
    # The length penalty divides the final scores, too.
    sids, depths = trie.paths(state.nodes)
    scores = state.scores / _length_factor(depths.clamp(min=1), length_penalty, state.scores)
    return _rows(trie, scores, sids, state.nodes, top_k)


def _rows(trie: TrieIndex, scores: Tensor, sids: Tensor, nodes: Tensor, top_k: int | None) -> BeamResult:
    """One row per SID with its first item, or with ``top_k`` one row per item and ``top_k`` rows in all."""
    rows = nodes.shape[1] if top_k is None else top_k
    out = BeamResult(
        items=nodes.new_full((len(nodes), rows), -1),
        scores=scores.new_full((len(nodes), rows), -math.inf),
        sids=sids.new_full((len(nodes), rows, trie.sid_levels), -1),
    )
    for query, beams in enumerate(nodes.tolist()):
        found = [
            (slot, item)
            for slot, node in enumerate(beams)
            if node >= 0
            for item in (trie.node_items[node][:1] if top_k is None else trie.node_items[node])
        ]
        for row, (slot, item) in enumerate(found[:rows]):
            out.scores[query, row] = scores[query, slot]
            out.sids[query, row] = sids[query, slot]
            out.items[query, row] = item
    return out
