"""One fused step of sampling from the trie: stochastic beam search, which draws without replacement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._autograd import refuse_transforms
from raddpo_ext._choices import NORMALIZE
from raddpo_ext.decoding.beam_step import LOGIT_TYPES, BeamState, check_state, checked_logits
from raddpo_ext.decoding.linear_beam_step import check_hidden, checked_level, level_logits
from raddpo_ext.decoding.split_draws import split_draws
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.logps.head import Head


@dataclass(frozen=True)
class SampleState(BeamState):
    """The beams of every query while sampling, first drawn first; each tensor is ``[B, W]``, ``[B, 1]`` at the start.

    An empty slot has score and perturbed score ``-inf``, log-prob 0, parent 0, token -1 and node -1.

    Attributes:
        scores: float32 log-probs of the prefixes.
        tokens, parents, nodes: see :class:`BeamState`.
        perturbed: float32 perturbed scores, by which beams compete: each is the largest of those of the SIDs below.
            ``inf`` at the start, where nothing has been drawn.
        logps: float32 log-probs of the last tokens; 0 for a SID that was finished before the last step.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [0, 2], [1, 0]])
        >>> rx.SampleState.start(index, batch_size=1).perturbed
        tensor([[inf]])
    """

    perturbed: Tensor
    logps: Tensor

    @classmethod
    def start(cls, index: TrieIndex, batch_size: int, device: torch.device | str | None = None) -> SampleState:
        """The state before the first step: one beam per query, at the root."""
        start = BeamState.start(index, batch_size, device)
        none = torch.full_like(start.scores, math.inf)
        return cls(**vars(start), perturbed=none, logps=torch.zeros_like(none))


class Noise(NamedTuple):
    """What the noise of a draw depends on, beside nodes: int64 ``keys [B]`` and ``seed []``, on the device."""

    keys: Tensor
    seed: Tensor


@torch.no_grad()
def sample_step(
    logits: Tensor,
    state: SampleState,
    index: TrieIndex,
    beam_width: int,
    *,
    seed: int | Tensor,
    keys: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str = "trie",
    check: bool = False,
) -> SampleState:
    """Extend every live beam by all its children in the trie and keep the ``beam_width`` that are drawn first.

    A child ``c`` of a beam with perturbed score ``T`` has the log-prob ``phi_c`` of its prefix and ``g_c = phi_c +
    Gumbel_c``. With ``Z = max_c g_c`` and ``v = T - g_c + log1p(-exp(g_c - Z))`` its perturbed score is ``T_c = T -
    max(v, 0) - log1p(exp(-|v|))``: that of the best child is ``T`` itself, bit for bit. At the root ``T_c = g_c``. So
    each SID's perturbed score is its log-prob and a Gumbel noise of its own, and the ``k`` SIDs of the largest ones are
    ``k`` draws without replacement (Kool et al., 2019). The softmax runs over the children, as under
    ``normalize="trie"``. Ties, finished beams, empty slots and rows without log-probs are as in
    :func:`raddpo_ext.beam_step`.

    The noise of a child is a function of ``seed``, the query's key and the child's node (Philox 4x32-10, 32 bits), so a
    smaller ``beam_width`` gives the first beams of a larger one. Node numbers are those of the index:
    :meth:`TrieIndex.restrict` and :meth:`TrieIndex.discard` keep them, :meth:`TrieIndex.add` and a new build do not.

    Args:
        logits: ``[B, W, V]`` float32, bfloat16 or float16, of the state's beams.
        state: the beams before the step, ``[B, W]``.
        index: the catalogue, on the device of ``logits``.
        beam_width: number of beams to keep, from 1 to ``2**31 - 1``; may exceed the catalogue.
        seed: integer in ``[0, 2**63)``, or an int64 tensor of one number on the device, which a captured graph reads.
        keys: int64 ``[B]``, the key of each query; default the row number. Queries of one key share their noise.
        temperature: divides the logits.
        normalize: only ``"trie"``. The log-probs over the vocabulary or the level do not add up to the parent's.
        check: also raise ValueError for NaN logits, and on CUDA for the values of ``state.nodes`` (synchronises).

    Returns:
        The next state, ``[B, beam_width]``, without gradient.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [0, 2], [1, 0]])
        >>> state = rx.SampleState.start(index, batch_size=1)
        >>> state = rx.sample_step(torch.tensor([[[2.0, 1.0, 0.0]]]), state, index, beam_width=2, seed=0)
        >>> sorted(state.tokens[0].tolist()), state.perturbed.tolist()[0] == sorted(state.perturbed.tolist()[0])[::-1]
        ([0, 1], True)
    """
    noise = checked_noise(seed, keys, state.nodes.shape[0] if isinstance(state, SampleState) else 0, index)
    check_support(normalize)
    return logits_sample_step(logits, state, index, beam_width, noise, temperature=temperature, check=check)


def logits_sample_step(
    logits: Tensor,
    state: SampleState,
    index: TrieIndex,
    beam_width: int,
    noise: Noise,
    *,
    temperature: float,
    replacement: bool = False,
    check: bool = False,
) -> SampleState:
    """:func:`sample_step` with checked noise.

    With ``replacement`` ``state.perturbed`` holds the number of draws in each beam, which are split independently among
    its children. ``beam_width`` must then be at least the number of draws of a query, so that none is lost.
    """
    _check.float_tensor(logits, "logits", LOGIT_TYPES)
    refuse_transforms("sample_step", logits, state.scores if isinstance(state, SampleState) else None)
    _check_state(logits, "logits", state, index)
    _check.width(beam_width, "beam_width")
    scale = 1 / _check.positive(temperature, "temperature")
    logits = checked_logits(logits, state, index, check)
    return _run(logits, state, index, noise, -1, beam_width, scale, replacement)


@torch.no_grad()
def head_sample_step(
    hidden: Tensor,
    head: Head,
    state: SampleState,
    index: TrieIndex,
    beam_width: int,
    noise: Noise,
    *,
    level: int,
    replacement: bool = False,
    check: bool = False,
) -> SampleState:
    """:func:`logits_sample_step` from hidden states ``[B, W, H]``; only the children's logits are computed."""
    check_hidden(hidden, head)
    refuse_transforms("sample_step", hidden, head.weight, head.bias)
    _check_state(hidden, "hidden", state, index)
    checked_level(hidden, head, state, index, level, check)
    rows = hidden.reshape(-1, hidden.shape[2])
    logits = level_logits(rows, head, state.scores.contiguous(), state.nodes.contiguous(), index, level)
    return _run(logits.view(*state.nodes.shape, -1), state, index, noise, level, beam_width, 1.0, replacement)


def checked_noise(seed: int | Tensor, keys: Tensor | None, batch: int, index: TrieIndex) -> Noise:
    """Check ``seed`` and ``keys``, and put them on the index's device."""
    _check.instance(index, "index", TrieIndex)
    device = index.device
    if isinstance(seed, Tensor):
        _check.int64_tensor(seed, "seed")
        if seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed must be one number on the index's device, {device}, got shape {tuple(seed.shape)} on "
                f"{seed.device}"
            )
    else:
        seed = torch.full((), _check.integer(seed, "seed", 0), dtype=torch.int64, device=device)
    if keys is None:
        return Noise(torch.arange(batch, device=device), seed)
    _check.int64_tensor(keys, "keys")
    if keys.shape != (batch,) or keys.device != device:
        raise ValueError(
            f"keys must have shape [B] = ({batch},) on the index's device, {device}, got {tuple(keys.shape)} on "
            f"{keys.device}"
        )
    return Noise(keys.contiguous(), seed)


def check_support(normalize: str) -> None:
    if _check.choice(normalize, "normalize", NORMALIZE) != NORMALIZE.index("trie"):
        raise ValueError(
            f"normalize must be 'trie' for sampling, got {normalize!r}: only the log-probs over the children add up to "
            "their parent's"
        )


def _check_state(rows: Tensor, name: str, state: SampleState, index: TrieIndex) -> None:
    _check.instance(state, "state", SampleState)
    check_state(rows, name, state, index, "trie", 0.0)
    if state.perturbed.shape != state.nodes.shape or state.perturbed.dtype != torch.float32:
        raise ValueError(
            f"state.perturbed must be float32 {tuple(state.nodes.shape)}, got {state.perturbed.dtype} "
            f"{tuple(state.perturbed.shape)}"
        )


def _run(
    logits: Tensor,
    state: SampleState,
    index: TrieIndex,
    noise: Noise,
    level: int,
    beam_width: int,
    scale: float,
    replacement: bool,
) -> SampleState:
    beams = (state.scores.contiguous(), state.perturbed.contiguous(), state.nodes.contiguous())
    if replacement and logits.device.type == "cuda":  # the kernel draws without replacement only
        return SampleState(*split_draws(logits, *beams, *noise, index, level, beam_width, scale))
    return SampleState(
        *torch.ops.raddpo.sample_step(
            logits,
            *beams,
            *noise,
            *index.block,
            level,
            beam_width,
            scale,
            replacement,
        )
    )


@torch.library.register_fake("raddpo::sample_step")
def _(
    logits: Tensor,
    scores: Tensor,
    perturbed: Tensor,
    nodes: Tensor,
    keys: Tensor,
    seed: Tensor,
    trie: Tensor,
    header: Tensor,
    live: Tensor | None,
    level: int,
    beam_width: int,
    scale: float,
    replacement: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], beam_width)
    return (
        scores.new_empty(shape),
        nodes.new_empty(shape),
        nodes.new_empty(shape),
        nodes.new_empty(shape),
        scores.new_empty(shape),
        scores.new_empty(shape),
    )
