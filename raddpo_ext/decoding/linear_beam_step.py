"""One step of the constrained beam search from hidden states; logits are computed only for the tokens it needs."""

from __future__ import annotations

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._autograd import refuse_transforms
from raddpo_ext._matmul import linear
from raddpo_ext.decoding.beam_step import LOGIT_TYPES, BeamState, check_state, is_extended
from raddpo_ext.decoding.row_lse import row_lse
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.logps.head import Head, checked_head

_WEIGHT_BYTES = 1 << 22  # rows of the weight per tile on the CPU: they fit its cache and keep a product efficient
_LOGIT_BYTES = 1 << 30  # all logits held at once on CUDA
_TILE_BYTES = 1 << 28  # logits of a tile on CUDA; tiles that stay in the L2 cache are slower, see docs/gpu.md
_BLOCK = (128, 256)  # rows and columns of a product that a CUDA multiprocessor computes at a time
_ROWS_A_READ = 128  # about how many rows a GPU multiplies by a row of the weight in the time of reading that row


def linear_beam_step(
    hidden: Tensor,
    weight: Tensor,
    state: BeamState,
    index: TrieIndex,
    beam_width: int,
    *,
    bias: Tensor | None = None,
    normalize: str = "vocab",
    length_penalty: float = 0.0,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    level: int | None = None,
    check: bool = False,
) -> BeamState:
    """Run :func:`raddpo_ext.beam_step` on the logits ``hidden @ weight.T + bias`` without materialising most of them.

    ``normalize="level"`` multiplies only the level's rows of ``weight``, ``"trie"`` only those of the live beams'
    children. ``"vocab"`` needs every row, for the log-sum-exp. On the CPU the log-sum-exp is computed tile by tile
    while a tile's logits are in cache, and no logits are kept. On a GPU all logits are computed, for as many queries at
    a time as fit 1 GiB; if a query does not fit, in tiles of 256 MiB. The children's logits are float32 if only
    they are computed. If more are computed (under ``"level"``, and mostly on a GPU), they have the product's type.

    Args:
        hidden: ``[B, W, H]`` float32, bfloat16 or float16: the states that predict each beam's next token.
        weight: ``[V, H]``, the weight of the language model's head, of the same dtype.
        state, index, beam_width, normalize, length_penalty: see :func:`raddpo_ext.beam_step`.
        bias: ``[V]``, the bias of the head.
        temperature: divides the logits.
        logit_softcap: caps the logits before that, ``softcap * tanh(logit / softcap)``.
        level: depth in tokens of the beams to extend, which is the same for all beams of a search. Default: read from
            the state, which synchronises on CUDA.
        check: also raise ValueError for NaN in ``hidden`` (synchronises on CUDA).

    Returns:
        The next state, ``[B, beam_width]``, without gradient.

    Raises:
        ValueError, TypeError: naming the argument and the value; also for a state whose beams are of several levels.

    Example:
        >>> index = rx.TrieIndex.build([[0, 1], [0, 2], [1, 0]])
        >>> hidden, weight = torch.ones(1, 1, 2), torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.0, 0.0]])
        >>> state = rx.linear_beam_step(hidden, weight, rx.BeamState.start(index, 1), index, beam_width=2)
        >>> state.tokens, state.scores
        (tensor([[0, 1]]), tensor([[-0.4076, -1.4076]]))
    """
    head = checked_head(weight, bias, temperature, logit_softcap)
    return head_beam_step(
        hidden,
        head,
        state,
        index,
        beam_width,
        normalize=normalize,
        length_penalty=length_penalty,
        level=level,
        check=check,
    )


@torch.no_grad()
def head_beam_step(
    hidden: Tensor,
    head: Head,
    state: BeamState,
    index: TrieIndex,
    beam_width: int,
    *,
    normalize: str,
    length_penalty: float,
    level: int | None,
    check: bool,
) -> BeamState:
    """:func:`linear_beam_step` with a checked head."""
    # Check the arguments.
    check_hidden(hidden, head)
    refuse_transforms("linear_beam_step", hidden, head.weight, head.bias)
    support = check_state(hidden, "hidden", state, index, normalize, length_penalty)
    _check.width(beam_width, "beam_width")
    level = checked_level(hidden, head, state, index, level, check)
    # On a GPU, "vocab" computes all logits, as its log-sum-exp needs them anyway.
    scores, nodes = state.scores.contiguous(), state.nodes.contiguous()
    tail = (beam_width, support, length_penalty)
    queries = _queries_at_once(hidden, head.weight) if normalize == "vocab" else 0
    if queries:
        return _step_of_all_logits(hidden, head, scores, nodes, index, queries, tail)
    # Otherwise compute the level's logits or only the children's, and under "vocab" the log-sum-exp apart.
    rows = hidden.reshape(-1, hidden.shape[2])
    logits = level_logits(rows, head, scores, nodes, index, level, whole=normalize == "level")
    lse = _vocab_lse(rows, head) if normalize == "vocab" else None
    return BeamState(
        *torch.ops.raddpo.beam_step(
            logits.view(*nodes.shape, -1),
            scores,
            nodes,
            *index.block,
            lse,
            level,
            *tail,
        )
    )


def level_logits(
    rows: Tensor, head: Head, scores: Tensor, nodes: Tensor, index: TrieIndex, level: int, *, whole: bool = False
) -> Tensor:
    """Logits ``[N, columns]`` of a level's symbols, for rows of hidden states ``[N, H]``: all of them if ``whole``.

    Otherwise at least those of each beam's children.
    """
    if whole or _level_is_cheaper(rows, index, level):
        head = head.rows(index.level_tokens(level))
        return head.transform_(head.product(rows))
    return _child_logits(rows, head, scores, nodes, index, level)


def _child_logits(rows: Tensor, head: Head, scores: Tensor, nodes: Tensor, index: TrieIndex, level: int) -> Tensor:
    """The logits of each beam's children; only their rows of the weight are read."""
    return torch.ops.raddpo.child_logits(
        rows if rows.stride(1) == 1 else rows.contiguous(),
        head.weight if head.weight.stride(1) == 1 else head.weight.contiguous(),
        None if head.bias is None else head.bias.contiguous(),
        scores.view(-1),
        nodes.view(-1),
        *index.block,
        head.scale,
        head.softcap,
        level,
        index.num_symbols[level],
    )


def _queries_at_once(hidden: Tensor, weight: Tensor) -> int:
    """How many queries' logits are computed at once on a GPU; 0 means that the log-sum-exp is computed in tiles."""
    if hidden.device.type == "cpu":
        return 0
    return min(len(hidden), _LOGIT_BYTES // max(1, hidden.shape[1] * len(weight) * hidden.element_size()))


def _step_of_all_logits(
    hidden: Tensor,
    head: Head,
    scores: Tensor,
    nodes: Tensor,
    index: TrieIndex,
    queries: int,
    tail: tuple[int, int, float],
) -> BeamState:
    """Run the step from full rows of logits, for at most ``queries`` queries at a time."""
    parts = -(-len(hidden) // queries)
    steps = []
    for states, *beams in zip(*(x.tensor_split(parts) for x in (hidden, scores, nodes)), strict=True):
        logits = head.transform_(head.product(states))
        steps.append(torch.ops.raddpo.beam_step(logits, *beams, *index.block, None, -1, *tail))
    return BeamState(*(steps[0] if parts == 1 else map(torch.cat, zip(*steps, strict=True))))


def _level_is_cheaper(hidden: Tensor, index: TrieIndex, level: int) -> bool:
    """Whether multiplying all the level's rows of the weight is faster than reading the rows of each beam's children.

    On a GPU one read serves many beams, until the matrix units are busy.
    """
    work = index.num_symbols[level] * max(1, len(hidden) / _ROWS_A_READ)
    return hidden.device.type != "cpu" and len(hidden) * index.mean_children[level] >= work


def _vocab_lse(hidden: Tensor, head: Head) -> Tensor:
    """The log-sum-exp of all logits of each row: float32 ``[N]`` from ``[N, H]``."""
    weight, bias = head.weight, head.bias
    rows, vocab = len(hidden), len(weight)
    step = min(vocab, max(1024, _tile_columns(hidden)))
    # One log-sum-exp per tile of the vocabulary and row, in two launches; all tiles use one buffer.
    buffer = hidden.new_empty(rows * step)
    parts = hidden.new_empty((-(-vocab // step), rows), dtype=torch.float32)
    for part, begin in zip(parts, range(0, vocab, step), strict=True):
        tile = weight[begin : begin + step]
        logits = buffer[: rows * len(tile)].view(rows, len(tile))
        linear(hidden, tile, None if bias is None else bias[begin : begin + step], out=logits)
        row_lse(head.transform_(logits), out=part)
    # The log-sum-exp of the tiles' log-sum-exps is that of all logits.
    return parts[0] if len(parts) == 1 else row_lse(parts.T.contiguous())


def _tile_columns(hidden: Tensor) -> int:
    """How many columns of the vocabulary a tile has for these rows of states ``[N, H]``."""
    size = hidden.element_size()
    if hidden.device.type == "cpu":
        return _WEIGHT_BYTES // (hidden.shape[1] * size)
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    return whole_waves(len(hidden), _TILE_BYTES // max(1, len(hidden) * size), processors)


def whole_waves(rows: int, columns: int, processors: int) -> int:
    """At most so many columns of a product on a GPU that no multiprocessor waits for others at its end."""
    blocks = -(-max(1, rows) // _BLOCK[0])  # of a column of blocks
    waves = columns // _BLOCK[1] * blocks // processors
    return waves * processors // blocks * _BLOCK[1] or columns


def checked_level(
    hidden: Tensor, head: Head, state: BeamState, index: TrieIndex, level: int | None, check: bool
) -> int:
    """The level of the beams, as given or read from the state, after checking that the head has its tokens."""
    level = _given_level(level, state, index)
    if len(head.weight) <= index.max_tokens[level]:
        raise ValueError(
            f"weight must have more than {index.max_tokens[level]} rows, the level's largest token id, got shape "
            f"{tuple(head.weight.shape)}"
        )
    if check:
        bad = hidden.isnan().any(2) & is_extended(state, index)
        if bool(bad.any()):
            query, beam = bad.nonzero()[0].tolist()
            raise ValueError(f"hidden[{query}, {beam}] holds NaN")
    return level


def _given_level(level: int | None, state: BeamState, index: TrieIndex) -> int:
    if level is None:
        return _level_of(state, index)
    if not 0 <= _check.integer(level, "level") < index.levels:
        raise ValueError(f"level must be in [0, {index.levels}), the index's levels, got {level}")
    return level


def _level_of(state: BeamState, index: TrieIndex) -> int:
    """The depth of the beams to extend; raises ValueError if they differ in it."""
    levels = index.depths(state.nodes[is_extended(state, index)]).unique().tolist()
    if len(levels) > 1:
        raise ValueError(f"state must hold beams of one level, got levels {levels}")
    return levels[0] if levels else 0


def check_hidden(hidden: Tensor, head: Head) -> None:
    """Check the states: their type and shape, and that they fit the head."""
    if _check.float_tensor(hidden, "hidden", LOGIT_TYPES).dim() != 3:
        raise ValueError(f"hidden must have 3 dimensions, got shape {tuple(hidden.shape)}")
    head.check_dtype(hidden)
    head.check_hidden(hidden)


@torch.library.register_fake("raddpo::child_logits")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scores: Tensor,
    nodes: Tensor,
    trie: Tensor,
    header: Tensor,
    live: Tensor | None,
    scale: float,
    softcap: float,
    level: int,
    columns: int,
) -> Tensor:
    return scores.new_empty((hidden.shape[0], columns))
