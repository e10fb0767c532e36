"""Exact samples of a catalogue's SIDs, with and without replacement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.decoding.beam_search import followed, forced_logits, unforced_tokens
from raddpo_ext.decoding.beam_step import check_level_columns
from raddpo_ext.decoding.sample_step import (
    Noise,
    SampleState,
    check_support,
    checked_noise,
    head_sample_step,
    logits_sample_step,
)
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.logps.head import Head, checked_head

_MOST_SAMPLES = 2**24  # counts of draws are kept in float32


class SampleResult(NamedTuple):
    """Samples of :func:`sample_search`, one row per distinct SID, ``R = samples`` rows per query.

    Without replacement rows are in the order of the draws, with replacement the SID that was drawn most often comes
    first. An empty row, where there are fewer distinct SIDs, has item and codes -1, log-prob and weight ``-inf``, and
    count 0. Access the parts by name, for example ``drawn.items``.

    Attributes:
        sids: int64 ``[B, R, L]`` codes, padded with -1.
        items: int64 ``[B, R]``, the first item of each SID.
        logps: float32 ``[B, R]`` log-probs over the catalogue, at the temperature of the draw.
        token_logps: float32 ``[B, R, T]``, which add up to ``logps``; 0 after a SID's last token. ``T`` is
            ``index.most_levels``: ``L``, and one more where SIDs end in ``eos``.
        log_weights: float32 ``[B, R]``: ``(log_weights.exp() * f).sum(1)`` estimates ``E f`` without bias. With
            replacement ``log(counts / samples)``.
        counts: int64 ``[B, R]``, how often each SID was drawn. They add up to ``samples`` with replacement, unless NaN
            logits ended a beam; without it they are 1.
        threshold: float32 ``[B]``, the largest perturbed score that was not drawn; ``-inf`` where there is none.

    Example:
        >>> index = rx.TrieIndex.build([[0], [1]])
        >>> drawn = rx.sample_search(lambda *_: torch.zeros(1, 1, 2), index, batch_size=1, samples=2, seed=0)
        >>> drawn.log_weights.exp().tolist()  # all of the catalogue: the weights are the probabilities
        [[0.5, 0.5]]
    """

    sids: Tensor
    items: Tensor
    logps: Tensor
    token_logps: Tensor
    log_weights: Tensor
    counts: Tensor
    threshold: Tensor


def sample_search(
    step_fn: Callable[[Tensor, Tensor, int], Tensor],
    index: TrieIndex,
    *,
    batch_size: int,
    samples: int,
    seed: int | Tensor,
    keys: Tensor | None = None,
    replacement: bool = False,
    temperature: float = 1.0,
    normalize: str = "trie",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    logit_softcap: float | None = None,
    skip_forced: bool = False,
    on_step: Callable[[int, SampleState], None] | None = None,
    check: bool = False,
) -> SampleResult:
    """Draw SIDs from the model's distribution over the catalogue; ``step_fn`` runs the model.

    Without replacement: ``samples`` distinct SIDs, as if drawn one after another, each from what is left, by one search
    of width ``samples + 1`` (stochastic beam search, see :func:`sample_step`). The first ``k`` rows are the draw of
    ``samples=k``. A catalogue of at most ``samples`` SIDs is returned whole, and its probabilities add up to 1.

    With replacement: ``samples`` independent draws. A beam's draws are split among its children, so that each distinct
    prefix is decoded once.

    The noise is a function of ``seed``, the query's key and the node, so a draw does not depend on the rest of the
    batch, nor on threads. One backend repeats it bit for bit; backends agree to rounding.

    Args:
        step_fn: ``(tokens [B, W], parents [B, W], level) -> logits [B, W, V]``, or with ``weight`` hidden states
            ``[B, W, H]``; see :func:`beam_search`.
        index: the catalogue.
        batch_size: ``B``.
        samples: draws per query, from 1 to ``2**24``; may exceed the catalogue.
        seed: integer in ``[0, 2**63)``, or an int64 tensor of one number on the device. Take another one per step.
        keys: int64 ``[B]``, the key of each query; default the row number. Queries of one key share their noise.
        replacement: draw independently. On CUDA in plain torch, without a fused kernel.
        temperature: divides the logits. ``logps`` and weights are those of the divided logits.
        normalize: only ``"trie"``, see :func:`sample_step`.
        weight, bias, logit_softcap: the language model's head, see :func:`linear_beam_step`. Only the logits of
            children are computed.
        skip_forced: leave beams that begin one SID only out of ``step_fn``; the same draws, see :func:`beam_search`.
            Synchronises on CUDA.
        on_step: called with each level and the state after it, whose ``perturbed`` holds counts with replacement.
        check: see :func:`beam_step`.

    Returns:
        :class:`SampleResult`, without gradient.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [0, 2], [1, 0]], item_ids=[70, 71, 72])
        >>> table = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])  # logits of each level, whatever the prefix
        >>> def step_fn(tokens, parents, level):
        ...     return table[level].expand(*tokens.shape, 3)
        >>> drawn = rx.sample_search(step_fn, index, batch_size=1, samples=3, seed=0)
        >>> sorted(drawn.items[0].tolist()), round(float(drawn.logps.exp().sum()), 4)
        ([70, 71, 72], 1.0)
    """
    noise = checked_noise(seed, keys, _check.integer(batch_size, "batch_size", 0), index)
    check_support(normalize)
    # Without a weight, step_fn returns logits, and the head's options would have no effect.
    head = None
    if weight is not None:
        head = checked_head(weight, bias, temperature, logit_softcap)
    elif bias is not None or logit_softcap is not None:
        raise ValueError("bias and logit_softcap need weight: without weight, step_fn returns final logits")
    return head_sample_search(
        step_fn,
        index,
        head,
        noise,
        samples=samples,
        replacement=replacement,
        temperature=temperature,
        skip_forced=skip_forced,
        on_step=on_step,
        check=check,
    )


def sample_width(samples: int, replacement: bool, index: TrieIndex) -> int:
    """Check ``samples``; returns the width of its search: one more beam for the threshold, as far as there are SIDs."""
    samples = _check.integer(samples, "samples", 1, _MOST_SAMPLES)
    return min(samples + (not replacement), max(1, index.num_sids))


def head_sample_search(
    step_fn: Callable[[Tensor, Tensor, int], Tensor],
    index: TrieIndex,
    head: Head | None,
    noise: Noise,
    *,
    samples: int,
    replacement: bool,
    temperature: float,
    skip_forced: bool = False,
    on_step: Callable[[int, SampleState], None] | None = None,
    check: bool = False,
) -> SampleResult:
    """:func:`sample_search` with checked noise. Without a head ``temperature`` divides the logits of ``step_fn``."""
    width = sample_width(samples, replacement, index)
    options: dict[str, Any] = {"replacement": replacement, "check": check}
    state = SampleState.start(index, len(noise.keys))
    if replacement:
        state = replace(state, perturbed=torch.full_like(state.perturbed, samples))
    token_logps = state.logps.new_zeros(*state.logps.shape, index.most_levels)
    for level in range(index.levels):
        tokens = unforced_tokens(state, index) if skip_forced else state.tokens
        forced = tokens is None
        output = forced_logits(state, index) if tokens is None else step_fn(tokens, state.parents, level)
        if head is None or forced:
            # A model with one head per level may have fewer columns than the whole vocabulary.
            check_level_columns(output, index, level)
            state = logits_sample_step(output, state, index, width, noise, temperature=temperature, **options)
        else:
            state = head_sample_step(output, head, state, index, width, noise, level=level, **options)
        token_logps = followed(token_logps, state, state.logps, level)
        if on_step is not None:
            on_step(level, state)
    return _result(state, token_logps, index, samples, replacement)


def _result(state: SampleState, token_logps: Tensor, index: TrieIndex, samples: int, replacement: bool) -> SampleResult:
    """Turn the beams after the last step into ``samples`` rows."""
    # The first beam that was not drawn, if there is one.
    threshold = state.perturbed.new_full(state.perturbed.shape[:1], -math.inf)
    if state.perturbed.shape[1] > samples:
        threshold = state.perturbed[:, samples].clone()
    # The rows, and empty ones to make up the number.
    logps, perturbed, nodes = (x[:, :samples] for x in (state.scores, state.perturbed, state.nodes))
    missing = samples - nodes.shape[1]
    logps = F.pad(logps, (0, missing), value=-math.inf)
    perturbed = F.pad(perturbed, (0, missing), value=-math.inf)
    nodes = F.pad(nodes, (0, missing), value=-1)
    found = nodes >= 0
    token_logps = F.pad(token_logps[:, :samples], (0, 0, 0, missing)).masked_fill(~found[..., None], 0.0)
    sids, _ = index.paths(nodes)
    first, _ = index.item_ranges(nodes)
    items = torch.where(found, index.items_at(torch.where(found, first, 0)), -1)
    # The weights: 1 / the probability of a perturbed score above the threshold, times that of the SID.
    if replacement:
        counts = torch.where(found, perturbed, 0).long()
        log_weights = (counts / samples).log()
    else:
        counts = found.long()
        log_weights = logps - (-torch.expm1(-(logps - threshold[:, None]).exp())).log()
        log_weights = torch.where(found, log_weights, -math.inf)
    return SampleResult(sids, items, logps, token_logps, log_weights, counts, threshold)
