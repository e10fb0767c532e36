"""Exact beam search constrained to a catalogue's trie, one fused step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.trie import TrieIndex

_LOGIT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BeamState:
    """The beams of every query, best first; ``[B, W]`` each, ``[B, 1]`` at the start.

    An empty slot has score ``-inf``, parent 0, token and node -1.

    Attributes:
        scores: float32 sums of log-probs, no length penalty applied.
        tokens: int64 last token ids; -1 at the start and for a SID that was already finished a step before.
        parents: int64 slots of the same query in the step before.
        nodes: int64 trie nodes.
    """

    scores: Tensor
    tokens: Tensor
    parents: Tensor
    nodes: Tensor

    @classmethod
    def start(cls, index: TrieIndex, batch_size: int, device: torch.device | str | None = None) -> BeamState:
        """One beam a query, at the root."""
        shape = (_check.integer(batch_size, "batch_size", 0), 1)
        device = index.device if device is None else device
        zeros = torch.zeros(shape, dtype=torch.int64, device=device)
        return cls(torch.zeros(shape, device=device), torch.full_like(zeros, -1), zeros, zeros.clone())


class BeamResult(NamedTuple):
    """What :func:`beam_search` found, best first, ``R`` rows a query; an empty row has score ``-inf`` and item -1.

    Attributes:
        scores: float32 ``[B, R]``, divided by ``length ** length_penalty``.
        sids: int64 ``[B, R, L]`` codes, padded with -1.
        items: int64 ``[B, R]``.
    """

    scores: Tensor
    sids: Tensor
    items: Tensor


def beam_step(
    logits: Tensor,
    state: BeamState,
    index: TrieIndex,
    beam_width: int,
    *,
    normalize: str = "vocab",
    length_penalty: float = 0.0,
    check: bool = False,
) -> BeamState:
    """Extends every live beam by every child it has in the trie and keeps the best ``beam_width``, in one fused op.

    A child's score is its parent's plus ``min(logit - logsumexp, 0)``, in float32; the log-sum-exp runs over the
    softmax's support. A finished beam (a leaf) keeps its score and its node, with token -1 and its own slot as parent.
    Candidates compete by ``score / length ** length_penalty``, length in tokens; ties go to the lower parent, then to
    the lower token id. A candidate whose score is ``-inf`` or NaN is not kept, so a row of logits with a NaN, or all
    ``-inf``, ends its beam.

    Args:
        logits: ``[B, W, V]`` float32, bfloat16 or float16, of the state's beams. Any strides with a contiguous last
            dimension are read in place.
        state: the beams before, ``[B, W]``.
        index: on the device of ``logits``.
        beam_width: beams kept, at least 1; may exceed the catalogue.
        normalize: support of the softmax. ``"vocab"``: all of ``V``. ``"level"``: the level's codes, and ``eos`` after
            the first level (needs an index with a vocab). ``"trie"``: the children only.
        length_penalty: finite exponent.
        check: also raise ValueError for NaN logits, and on CUDA for the values of ``state.nodes`` (synchronises).

    Returns:
        The next state, ``[B, beam_width]``.

    Raises:
        ValueError, TypeError: naming the argument and the value.
    """
    support = _check_step(logits, state, index, normalize, length_penalty)
    _check.integer(beam_width, "beam_width", 1)
    if check:
        _check_values(logits, state, index)
    cheap = logits.device.type == "cpu" and not torch.compiler.is_compiling()  # a graph cannot depend on values
    if logits.shape[2] <= max(index.max_tokens) and (check or cheap):
        _check_columns(logits, state, index)
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    return BeamState(
        *torch.ops.raddpo.beam_step(
            logits,
            state.scores.contiguous(),
            state.nodes.contiguous(),
            index.data,
            index.header,
            beam_width,
            support,
            length_penalty,
        )
    )


def beam_search(
    step_fn: Callable[[Tensor, Tensor, int], Tensor],
    index: TrieIndex,
    *,
    batch_size: int,
    beam_width: int | Sequence[int],
    normalize: str = "vocab",
    length_penalty: float = 0.0,
    top_k: int | None = None,
    check: bool = False,
) -> BeamResult:
    """Constrained beam search with a model behind ``step_fn``.

    With ``beam_width`` at least the number of live prefixes and finished SIDs at every level, the result is that of
    scoring the whole catalogue.

    Args:
        step_fn: ``(tokens [B, W], parents [B, W], level) -> logits [B, W, V]``. At level 0 ``tokens`` is ``[B, 1]`` of
            -1 and ``parents`` 0; later they are the last step's, ``parents`` the slots of the same query in the call
            before, by which a KV cache is reordered. Tokens are -1 in finished and empty slots; their logits are
            ignored. Called once a level, ``index.levels`` times.
        index: the catalogue.
        batch_size: ``B``.
        beam_width: one width, or one for each call.
        normalize, length_penalty, check: see :func:`beam_step`.
        top_k: return this many items a query, a collided SID repeated for each of its items. Default: one row a SID
            of the last width, with its first item.

    Returns:
        :class:`BeamResult`; ``R`` is ``top_k``, or the last width.
    """
    widths = _check.widths(beam_width, index.levels)
    if top_k is not None:
        _check.integer(top_k, "top_k", 1)
    state = BeamState.start(index, batch_size)
    for level, width in enumerate(widths):
        logits = step_fn(state.tokens, state.parents, level)
        if isinstance(logits, Tensor) and logits.dim() == 3:
            _check_level_columns(logits, index, level)
        state = beam_step(logits, state, index, width, normalize=normalize, length_penalty=length_penalty, check=check)
    return _result(state, index, length_penalty, top_k)


def _result(state: BeamState, index: TrieIndex, length_penalty: float, top_k: int | None) -> BeamResult:
    sids, depths = index.paths(state.nodes)
    scores = state.scores
    if length_penalty:
        scores = scores / depths.clamp(min=1).to(torch.float64).pow(length_penalty).to(torch.float32)
    first, count = index.item_ranges(state.nodes)
    if top_k is None:
        items = torch.where(count > 0, index.items[first].long(), -1)
        return BeamResult(scores, sids, items)
    # Item k of a query lies in the first beam whose items, added up, exceed k.
    ends = count.cumsum(1)
    rank = torch.arange(top_k, device=scores.device).expand(len(scores), top_k).contiguous()
    beam = torch.searchsorted(ends, rank, right=True)
    found = beam < scores.shape[1]
    beam = beam.clamp(max=scores.shape[1] - 1)
    position = first.gather(1, beam) + rank - (ends - count).gather(1, beam)
    items = torch.where(found, index.items[torch.where(found, position, 0)].long(), -1)
    sids = sids.gather(1, beam[..., None].expand(-1, -1, sids.shape[2]))
    return BeamResult(
        torch.where(found, scores.gather(1, beam), -math.inf), torch.where(found[..., None], sids, -1), items
    )


def _check_step(logits: Tensor, state: BeamState, index: TrieIndex, normalize: str, length_penalty: float) -> int:
    _check.instance(state, "state", BeamState)
    _check.instance(index, "index", TrieIndex)
    if not isinstance(logits, Tensor) or logits.dtype not in _LOGIT_TYPES:
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a float32, bfloat16 or float16 tensor, got {got}")
    if logits.dim() != 3 or logits.shape[:2] != state.nodes.shape:
        raise ValueError(
            f"logits must have shape [B, W, V] with [B, W] = {tuple(state.nodes.shape)}, the state's, got "
            f"{tuple(logits.shape)}"
        )
    if state.scores.shape != state.nodes.shape:
        raise ValueError(f"state.scores must have shape {tuple(state.nodes.shape)}, got {tuple(state.scores.shape)}")
    if state.scores.dtype != torch.float32 or state.nodes.dtype != torch.int64:
        raise TypeError(
            f"state must hold float32 scores and int64 nodes, got {state.scores.dtype}, {state.nodes.dtype}"
        )
    if not logits.device == state.nodes.device == state.scores.device == index.data.device:
        raise ValueError(
            f"logits, state and index must be on one device, got {logits.device}, {state.nodes.device}, "
            f"{state.scores.device}, {index.data.device}"
        )
    _check.number(length_penalty, "length_penalty")
    if abs(length_penalty) * math.log(index.levels) > 80:  # the factor would leave float32
        raise ValueError(f"length_penalty = {length_penalty} is too large for SIDs of {index.levels} tokens")
    support = _check.choice(normalize, "normalize", _check.NORMALIZE)
    if normalize == "level" and index.vocab is None:
        raise ValueError("normalize = 'level' needs an index built with a vocab")
    return support


def _inner(state: BeamState, index: TrieIndex) -> Tensor:
    """The beams whose logits a step reads: bool ``[B, W]``."""
    _, children = index.child_ranges(state.nodes)
    return (children > 0) & (state.scores > -math.inf)


def _check_columns(logits: Tensor, state: BeamState, index: TrieIndex) -> None:
    """A model with one head a level has as many columns as the level needs; any other has enough for all levels."""
    for level in set(index.depths(state.nodes[_inner(state, index)]).tolist()):
        _check_level_columns(logits, index, level)


def _check_level_columns(logits: Tensor, index: TrieIndex, level: int) -> None:
    if logits.shape[2] <= index.max_tokens[level]:
        raise ValueError(
            f"logits of level {level} must have more than {index.max_tokens[level]} columns, the level's largest token "
            f"id, got shape {tuple(logits.shape)}"
        )


def _check_values(logits: Tensor, state: BeamState, index: TrieIndex) -> None:
    bad = logits.isnan().any(2) & _inner(state, index)
    if bool(bad.any()):
        query, beam = bad.nonzero()[0].tolist()
        raise ValueError(f"logits[{query}, {beam}] holds NaN")
    outside = (state.nodes < -1) | (state.nodes >= index.num_nodes)
    if bool(outside.any()):
        query, beam = outside.nonzero()[0].tolist()
        raise ValueError(
            f"state.nodes[{query}, {beam}] = {int(state.nodes[query, beam])} is no node of the index, which has "
            f"{index.num_nodes}"
        )


@torch.library.register_fake("raddpo::beam_step")
def _(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    trie: Tensor,
    header: Tensor,
    beam_width: int,
    normalize: int,
    length_penalty: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], beam_width)
    return scores.new_empty(shape), nodes.new_empty(shape), nodes.new_empty(shape), nodes.new_empty(shape)
