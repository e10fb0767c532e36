"""Exact beam search constrained to a catalogue's trie."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.decoding.beam_step import BeamState, beam_step, check_level_columns
from raddpo_ext.decoding.linear_beam_step import head_beam_step
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.logps.head import Head, checked_head


class BeamResult(NamedTuple):
    """Results of :func:`beam_search`, best first, ``R`` rows per query; an empty row has score ``-inf`` and item -1.

    Access the parts by name, for example ``found.items``.

    Attributes:
        items: int64 ``[B, R]``.
        scores: float32 ``[B, R]``, divided by ``length ** length_penalty``.
        sids: int64 ``[B, R, L]`` codes, padded with -1.
        token_logps: float32 ``[B, R, L]`` log-probs of the SID's tokens, 0 on padding, with one more column if the
            vocabulary has an ``eos``; None unless they were asked for. Each is a difference of two of the beam's
            float32 sums.

    Example:
        >>> scores = torch.tensor([[-0.5, -torch.inf]])
        >>> found = rx.BeamResult(torch.tensor([[7, -1]]), scores, torch.tensor([[[0], [-1]]]))
        >>> found.items[found.items >= 0]
        tensor([7])
    """

    items: Tensor
    scores: Tensor
    sids: Tensor
    token_logps: Tensor | None = None


def beam_search(
    step_fn: Callable[[Tensor, Tensor, int], Tensor],
    index: TrieIndex,
    *,
    batch_size: int,
    beam_width: int | Sequence[int],
    normalize: str = "vocab",
    length_penalty: float = 0.0,
    top_k: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    skip_forced: bool = False,
    return_token_logps: bool = False,
    on_step: Callable[[int, BeamState], None] | None = None,
    check: bool = False,
) -> BeamResult:
    """Search a catalogue by constrained beam search; ``step_fn`` runs the model.

    If ``beam_width`` is at least the number of live prefixes and finished SIDs at every level, the result equals that
    of scoring the whole catalogue.

    Args:
        step_fn: ``(tokens [B, W], parents [B, W], level) -> logits [B, W, V]``, or with ``weight`` hidden states
            ``[B, W, H]``. At level 0 ``tokens`` is ``[B, 1]`` of -1 and ``parents`` is 0. Later both come from the
            last step: ``parents`` are slots of the same query in the previous call; use them to reorder a KV cache.
            Tokens are -1 in finished and empty slots, whose logits are ignored; with ``skip_forced`` also in beams
            without a choice left, whose logits must only be finite. Called once per level, ``index.levels`` times, or
            less often with ``skip_forced``.
        index: the catalogue.
        batch_size: ``B``.
        beam_width: one width, or one per call. A list may be as long as the vocabulary has levels, including ``eos``,
            even if the catalogue has no SID of that length; widths beyond ``index.levels`` are not used.
        normalize, length_penalty, check: see :func:`beam_step`.
        top_k: return this many items per query; a SID of several items is repeated for each of them. Default: one row
            per SID of the last width, with its first item. A ``top_k`` above the last width warns.
        weight, bias, temperature, logit_softcap: the language model's head, see :func:`linear_beam_step`.
        skip_forced: a beam that begins one SID only has no choice left: its token is -1 for ``step_fn``, which is no
            longer called once no live beam has a choice. Needs ``normalize="trie"``, under which a child without
            siblings has log-prob 0: the result is the same to the bit, if ``step_fn`` returns the same logits for the
            other beams, and no NaN or infinite ones. Synchronises on CUDA.
        return_token_logps: also return the log-prob of each token.
        on_step: called with each level and the state after it: the surviving beams, best first. A beam that is in no
            ``parents`` of the next state was dropped.

    Returns:
        :class:`BeamResult`, without gradient; ``R`` is ``top_k``, or the last width.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [0, 2], [1, 0]], item_ids=[70, 71, 72])
        >>> table = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])  # logits of each level, whatever the prefix
        >>> def step_fn(tokens, parents, level):
        ...     return table[level].expand(*tokens.shape, 3)
        >>> found = rx.beam_search(step_fn, index, batch_size=1, beam_width=3)
        >>> found.items, found.sids[0, 0]
        (tensor([[71, 70, 72]]), tensor([0, 2]))
    """
    widths = _check.widths(beam_width, index.levels, index.most_levels)
    check_top_k(top_k, widths[-1], index)
    # Without a weight, step_fn returns logits, and the head's options would have no effect.
    head = None
    if weight is not None:
        head = checked_head(weight, bias, temperature, logit_softcap)
    elif bias is not None or temperature != 1 or logit_softcap is not None:
        raise ValueError(
            "bias, temperature and logit_softcap need weight: without weight, step_fn returns final logits"
        )
    check_skip_forced(skip_forced, normalize)
    return head_beam_search(
        step_fn,
        index,
        head,
        batch_size=batch_size,
        beam_width=widths,
        normalize=normalize,
        length_penalty=length_penalty,
        top_k=top_k,
        skip_forced=skip_forced,
        return_token_logps=return_token_logps,
        on_step=on_step,
        check=check,
    )


def head_beam_search(
    step_fn: Callable[[Tensor, Tensor, int], Tensor],
    index: TrieIndex,
    head: Head | None,
    *,
    batch_size: int,
    beam_width: Sequence[int],
    normalize: str,
    length_penalty: float,
    top_k: int | None,
    skip_forced: bool,
    return_token_logps: bool,
    on_step: Callable[[int, BeamState], None] | None = None,
    check: bool = False,
) -> BeamResult:
    """:func:`beam_search` with checked widths, one per level. Without a head ``step_fn`` returns logits."""
    options: dict[str, Any] = {"normalize": normalize, "length_penalty": length_penalty, "check": check}
    state = BeamState.start(index, batch_size)
    token_logps = state.scores.new_zeros((*state.scores.shape, index.most_levels)) if return_token_logps else None
    for level, width in enumerate(beam_width):
        before = state
        tokens = unforced_tokens(state, index) if skip_forced else state.tokens
        forced = tokens is None
        output = forced_logits(state, index) if tokens is None else step_fn(tokens, state.parents, level)
        if head is None or forced:
            # A model with one head per level may have fewer columns than the whole vocabulary.
            check_level_columns(output, index, level)
            state = beam_step(output, state, index, width, **options)
        else:
            state = head_beam_step(output, head, state, index, width, level=level, **options)
        if token_logps is not None:
            logps = state.scores - before.scores.gather(1, state.parents)
            token_logps = followed(token_logps, state, logps, level).masked_fill((state.nodes < 0)[..., None], 0.0)
        if on_step is not None:
            on_step(level, state)
    return _result(state, index, length_penalty, top_k, token_logps)


def check_skip_forced(skip_forced: bool, normalize: str) -> None:
    if skip_forced and normalize != "trie":
        raise ValueError(f"skip_forced = True needs normalize = 'trie', got {normalize!r}")


def unforced_tokens(state: BeamState, index: TrieIndex) -> Tensor | None:
    """The tokens that the model must read: the beams', but -1 for a beam without a choice left. Synchronises.

    Such a beam has at most one child, that has at most one child, and so on. None if no beam has a choice left.
    """
    has_choice = torch.zeros_like(state.nodes, dtype=torch.bool).flatten()
    nodes, beams = state.nodes.flatten(), torch.arange(state.nodes.numel(), device=state.nodes.device)
    while len(nodes):
        first, count = index.child_ranges(nodes)
        has_choice[beams[count > 1]] = True
        nodes, beams = index.nodes_at(first[count == 1]), beams[count == 1]
    has_choice = has_choice.view_as(state.nodes)
    return state.tokens.masked_fill(~has_choice, -1) if bool(has_choice.any()) else None


def forced_logits(state: BeamState, index: TrieIndex) -> Tensor:
    """Logits in place of the model's where each beam has at most one child: any finite ones give the log-prob 0."""
    columns = max(index.max_tokens) + 1
    return state.scores.new_zeros(columns).expand(*state.scores.shape, columns)


def followed(token_logps: Tensor, state: BeamState, logps: Tensor, level: int) -> Tensor:
    """Each beam's token log-probs ``[B, W, L]``, one step on: those of its parent, and the level's ``logps``."""
    token_logps = token_logps.gather(1, state.parents[..., None].expand(-1, -1, token_logps.shape[2]))
    token_logps[..., level] = logps
    return token_logps


def check_top_k(top_k: int | None, width: int, index: TrieIndex) -> None:
    """Raise an error if ``top_k`` is not a positive integer, and warn if it is above the last width."""
    if top_k is None:
        return
    if width < min(_check.width(top_k, "top_k"), index.num_sids) and index.num_items == index.num_sids:
        warnings.warn(
            f"top_k = {top_k} is above the last beam_width, {width}: a search finds at most {width} items, and the "
            "other rows stay empty (item -1)",
            stacklevel=3,
        )


def _result(
    state: BeamState, index: TrieIndex, length_penalty: float, top_k: int | None, token_logps: Tensor | None
) -> BeamResult:
    """Turn the beams after the last step into rows of SIDs, or of ``top_k`` items."""
    nodes, scores = state.nodes, state.scores
    # One row per SID, with its first item.
    if top_k is None:
        items = index.top_items(nodes.reshape(-1, 1), 1)[0].view(nodes.shape)
    # One row per item, those of a beam one after another.
    else:
        items, beams = index.top_items(nodes, top_k)
        missing, beams = beams < 0, beams.clamp(min=0)
        nodes = nodes.gather(1, beams).masked_fill_(missing, -1)
        scores = scores.gather(1, beams).masked_fill_(missing, -math.inf)
        if token_logps is not None:
            token_logps = token_logps.gather(1, beams[..., None].expand(-1, -1, token_logps.shape[2]))
            token_logps = token_logps.masked_fill(missing[..., None], 0.0)
    sids, depths = index.paths(nodes)
    # Scores, divided by the lengths.
    if length_penalty:
        scores = scores / depths.clamp(min=1).to(torch.float64).pow(length_penalty).to(torch.float32)
    return BeamResult(items, scores, sids, token_logps)
