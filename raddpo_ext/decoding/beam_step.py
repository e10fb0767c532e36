"""One fused step of the constrained beam search, from the logits of every beam."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._autograd import refuse_transforms
from raddpo_ext._choices import NORMALIZE
from raddpo_ext.index.trie import TrieIndex

LOGIT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class BeamState:
    """The beams of every query, best first; each tensor is ``[B, W]``, and ``[B, 1]`` at the start.

    An empty slot has score ``-inf``, parent 0, token -1 and node -1.

    Attributes:
        scores: float32 sums of log-probs, without length penalty.
        tokens: int64 last token ids; -1 at the start and for a SID that was finished before the last step.
        parents: int64 slots of the same query in the previous step.
        nodes: int64 trie nodes.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [0, 2], [1, 0]])
        >>> rx.BeamState.start(index, batch_size=2).nodes  # one beam per query, at the root
        tensor([[0],
                [0]])
    """

    scores: Tensor
    tokens: Tensor
    parents: Tensor
    nodes: Tensor

    @classmethod
    def start(cls, index: TrieIndex, batch_size: int, device: torch.device | str | None = None) -> BeamState:
        """The state before the first step: one beam per query, at the root."""
        shape = (_check.integer(batch_size, "batch_size", 0), 1)
        device = index.device if device is None else device
        zeros = torch.zeros(shape, dtype=torch.int64, device=device)
        scores = torch.zeros(shape, dtype=torch.float32, device=device)
        return cls(scores, torch.full_like(zeros, -1), zeros, zeros.clone())


@torch.no_grad()
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
    """Extend every live beam by all its children in the trie and keep the best ``beam_width``, in one fused op.

    A child's score is its parent's score plus ``min(logit - logsumexp, 0)``, in float32; the log-sum-exp runs over the
    softmax's support. A finished beam (a leaf) keeps its score and its node; its token is -1 and its parent is its own
    slot. Candidates are ranked by ``score / length ** length_penalty``, length in tokens; ties go to the lower parent,
    then to the lower token id. A candidate whose score is ``-inf`` or NaN is dropped, so a row of logits that holds a
    NaN, or only ``-inf``, ends its beam.

    Args:
        logits: ``[B, W, V]`` float32, bfloat16 or float16, of the state's beams. Any strides with a contiguous last
            dimension are read without a copy.
        state: the beams before the step, ``[B, W]``.
        index: the catalogue, on the device of ``logits``.
        beam_width: number of beams to keep, from 1 to ``2**31 - 1``; may exceed the catalogue.
        normalize: support of the softmax. ``"vocab"``: all of ``V``. ``"level"``: the level's codes, and ``eos`` after
            the first level (needs an index with a vocab). ``"trie"``: the children only.
        length_penalty: finite exponent.
        check: also raise ValueError for NaN logits, and on CUDA for the values of ``state.nodes`` (synchronises).

    Returns:
        The next state, ``[B, beam_width]``, without gradient.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [0, 2], [1, 0]])
        >>> state = rx.BeamState.start(index, batch_size=1)
        >>> state = rx.beam_step(torch.tensor([[[2.0, 1.0, 0.0]]]), state, index, beam_width=2)
        >>> state.tokens, state.scores
        (tensor([[0, 1]]), tensor([[-0.4076, -1.4076]]))
    """
    _check.float_tensor(logits, "logits", LOGIT_TYPES)
    refuse_transforms("beam_step", logits, state.scores if isinstance(state, BeamState) else None)
    # Shapes, types and devices are always checked, values only where reading them is free or asked for.
    support = check_state(logits, "logits", state, index, normalize, length_penalty)
    _check.width(beam_width, "beam_width")
    logits = checked_logits(logits, state, index, check)
    return BeamState(
        *torch.ops.raddpo.beam_step(
            logits,
            state.scores.contiguous(),
            state.nodes.contiguous(),
            *index.block,
            None,
            -1,
            beam_width,
            support,
            length_penalty,
        )
    )


def check_state(
    rows: Tensor, name: str, state: BeamState, index: TrieIndex, normalize: str, length_penalty: float
) -> int:
    """Check a step's arguments; returns the number of its softmax support. Errors call ``rows`` by ``name``."""
    _check.instance(state, "state", BeamState)
    _check.instance(index, "index", TrieIndex)
    # One row per beam of the state.
    if rows.dim() != 3 or rows.shape[:2] != state.nodes.shape:
        raise ValueError(
            f"{name} must have shape [B, W, {'H' if name == 'hidden' else 'V'}] with [B, W] = "
            f"{tuple(state.nodes.shape)}, the state's, got {tuple(rows.shape)}"
        )
    if state.scores.shape != state.nodes.shape:
        raise ValueError(f"state.scores must have shape {tuple(state.nodes.shape)}, got {tuple(state.scores.shape)}")
    if state.scores.dtype != torch.float32 or state.nodes.dtype != torch.int64:
        raise TypeError(
            f"state must hold float32 scores and int64 nodes, got {state.scores.dtype}, {state.nodes.dtype}"
        )
    if not rows.device == state.nodes.device == state.scores.device == index.data.device:
        raise ValueError(
            f"{name}, state and index must be on one device, got {rows.device}, {state.nodes.device}, "
            f"{state.scores.device}, {index.data.device}"
        )
    # Options.
    _check.number(length_penalty, "length_penalty")
    if abs(length_penalty) * math.log(index.levels) > 80:  # the factor would leave float32
        raise ValueError(f"length_penalty = {length_penalty} is too large for SIDs of {index.levels} tokens")
    support = _check.choice(normalize, "normalize", NORMALIZE)
    if normalize == "level" and index.vocab is None:
        raise ValueError("normalize = 'level' needs an index built with a vocab")
    return support


def checked_logits(logits: Tensor, state: BeamState, index: TrieIndex, check: bool) -> Tensor:
    """Check the values and columns of a step's logits; returns them with a contiguous last dimension."""
    if check:
        _check_values(logits, state, index)
    cheap = logits.device.type == "cpu" and not torch.compiler.is_compiling()  # a graph cannot depend on values
    # Fewer columns than the largest token id are right if no beam of this step needs them.
    if logits.shape[2] <= max(index.max_tokens) and (check or cheap):
        _check_columns(logits, state, index)
    # The kernels read rows of any stride, but within a row consecutive logits.
    return logits if logits.stride(2) == 1 else logits.contiguous()


def is_extended(state: BeamState, index: TrieIndex) -> Tensor:
    """The beams that have children: bool ``[B, W]``."""
    _, children = index.child_ranges(state.nodes)
    return (children > 0) & (state.scores > -math.inf)


def _check_columns(logits: Tensor, state: BeamState, index: TrieIndex) -> None:
    """Check the columns per level: a model with one head per level has as many as that level needs."""
    for level in set(index.depths(state.nodes[is_extended(state, index)]).tolist()):
        check_level_columns(logits, index, level)


def check_level_columns(logits: Tensor, index: TrieIndex, level: int) -> None:
    """Check that a step's logits have the level's columns; what is no ``[B, W, V]`` tensor is left to the step."""
    if isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[2] <= index.max_tokens[level]:
        raise ValueError(
            f"logits of level {level} must have more than {index.max_tokens[level]} columns, the level's largest token "
            f"id, got shape {tuple(logits.shape)}"
        )


def _check_values(logits: Tensor, state: BeamState, index: TrieIndex) -> None:
    bad = logits.isnan().any(2) & is_extended(state, index)
    if bool(bad.any()):
        query, beam = bad.nonzero()[0].tolist()
        raise ValueError(f"logits[{query}, {beam}] holds NaN")
    outside = (state.nodes < -1) | (state.nodes >= index.node_bound)
    if bool(outside.any()):
        query, beam = outside.nonzero()[0].tolist()
        raise ValueError(
            f"state.nodes[{query}, {beam}] must be in [-1, {index.node_bound}), the nodes of the index, got "
            f"{int(state.nodes[query, beam])}"
        )


@torch.library.register_fake("raddpo::beam_step")
def _(
    logits: Tensor,
    scores: Tensor,
    nodes: Tensor,
    trie: Tensor,
    header: Tensor,
    live: Tensor | None,
    lse: Tensor | None,
    level: int,
    beam_width: int,
    normalize: int,
    length_penalty: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], beam_width)
    return scores.new_empty(shape), nodes.new_empty(shape), nodes.new_empty(shape), nodes.new_empty(shape)
