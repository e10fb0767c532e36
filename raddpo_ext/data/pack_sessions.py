"""pack_sessions: one row per session, with its prompt once and its candidates after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.index.vocab import SIDVocab
from raddpo_ext.losses.session import SessionBatch

LAYOUTS = ("candidates", "trie")
_SIDES = ("right", "left")


@dataclass(frozen=True)
class PackedSessions:
    """The result of :func:`pack_sessions`: ``S`` rows of ``T`` positions, which a model reads in one pass.

    Attributes:
        sessions: the candidates.
        input_ids: int64 ``[S, T]`` token ids.
        position_ids: int64 ``[S, T]``: those of a prompt start at 0, and those of each candidate at the prompt's end.
        ends: int64 ``[S, T]``: position ``q`` of a row attends to position ``k`` if and only if ``k <= q < ends[k]``.
        distinct: int64 ``[U]``: the indices, among the ``S * T`` states, of those that predict candidates' tokens, each
            once and ascending. One state may predict several tokens: the first token of every candidate, or
            the tokens after a shared prefix.
        rows: int64 ``[C, L]``: for each token of a candidate, the index in ``distinct`` of the state that predicts it;
            beyond the lengths, and for tokens that ``skip_forced`` left out, that of the prompt's last token.
        last_tokens: int64 ``[C]``: the index, among the ``S * T`` states, of that at a candidate's last token; for a
            candidate of length 0, at the prompt's last token. None without ``embeddings``.
        prompt_starts: int64 ``[S]``: the position of each prompt's first token.
        prompt_lengths: int64 ``[S]``.
        num_truncated: number of prompts that lost their first tokens.

    Example:
        >>> sessions = rx.SessionBatch(
        ...     torch.tensor([[3, 7], [3, 8]]), torch.tensor([2, 2]), torch.tensor([0, 2]), torch.tensor([1])
        ... )
        >>> packed = rx.pack_sessions([[1, 2]], sessions)
        >>> packed.hidden(torch.randn(1, 6, 16)).shape  # of candidates, tokens, hidden size
        torch.Size([2, 2, 16])
        >>> packed.mask()[0, 0, 5].tolist()  # the last token sees the prompt and its own candidate
        [True, True, False, False, True, True]
    """

    sessions: SessionBatch
    input_ids: Tensor
    position_ids: Tensor
    ends: Tensor
    distinct: Tensor
    rows: Tensor
    last_tokens: Tensor | None
    prompt_starts: Tensor
    prompt_lengths: Tensor
    num_truncated: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedSessions:
        """The same rows on another device."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedSessions:
        """The same rows in page-locked memory, from which copies to a GPU can be asynchronous."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Any) -> PackedSessions:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: change(v) for k, v in parts.items() if isinstance(v, (Tensor, SessionBatch))})

    def mask(self, dtype: torch.dtype | None = None) -> Tensor:
        """The attention mask ``[S, 1, T, T]`` (query, key) for a decoder-only model.

        Args:
            dtype: None for a bool mask, True where a query attends to a key, as ``scaled_dot_product_attention`` takes
                it. A float type for a mask of 0 and the type's minimum, which eager attention adds to the scores.
        """
        columns = torch.arange(self.ends.shape[1], device=self.ends.device)
        seen = (columns <= columns[:, None]) & (columns[:, None] < self.ends[:, None, None, :])
        if dtype is None:
            return seen
        return torch.zeros((), dtype=dtype, device=seen.device).where(seen, torch.finfo(dtype).min)

    def block_mask(self) -> Any:
        """The attention mask as a ``BlockMask`` for FlexAttention, whose backward pass needs CUDA."""
        from torch.nn.attention.flex_attention import create_block_mask

        ends = self.ends

        def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends[row, key])

        rows, columns = ends.shape
        return create_block_mask(sees, rows, None, columns, columns, device=str(ends.device))

    @property
    def predictors(self) -> Tensor:
        """The index, among the ``S * T`` states, of that which predicts each token of a candidate: int64 ``[C, L]``."""
        return self.distinct[self.rows]

    def hidden(self, states: Tensor) -> Tensor:
        """The states that predict the candidates' tokens, ``[C, L, H]``, from the model's states ``[S, T, H]``."""
        predictors = self.predictors
        return self._flat(states).index_select(0, predictors.flatten()).view(*predictors.shape, states.shape[-1])

    def distinct_hidden(self, states: Tensor) -> Tensor:
        """The distinct states that predict tokens, ``[U, H]``. ``rows`` says which of them predicts which token."""
        return self._flat(states).index_select(0, self.distinct)

    def embeddings(self, states: Tensor) -> Tensor:
        """The states at the candidates' last tokens, ``[C, H]``, from the model's states ``[S, T, H]``."""
        if self.last_tokens is None:
            raise ValueError("embeddings need pack_sessions(embeddings=True): these rows have no last tokens")
        return self._flat(states).index_select(0, self.last_tokens)

    def prompts(self) -> tuple[Tensor, Tensor]:
        """The prompts alone, padded on the right: ``input_ids`` and ``attention_mask``, int64 ``[S, P]``."""
        columns = torch.arange(
            int(self.prompt_lengths.max()) if len(self.prompt_lengths) else 0, device=self.ends.device
        )
        mask = columns < self.prompt_lengths[:, None]
        places = (self.prompt_starts[:, None] + columns).clamp(max=self.input_ids.shape[1] - 1)
        return torch.where(mask, self.input_ids.gather(1, places), 0), mask.long()

    def _flat(self, states: Tensor) -> Tensor:
        """The model's states ``[S, T, H]`` as ``[S * T, H]``."""
        if states.dim() != 3 or states.shape[:2] != self.input_ids.shape:
            expected = tuple(self.input_ids.shape)
            raise ValueError(f"states must have shape [S, T, H] with [S, T] = {expected}, got {tuple(states.shape)}")
        return states.flatten(0, 1)


def pack_sessions(
    prompts: Sequence[Any],
    sessions: SessionBatch,
    *,
    layout: str = "candidates",
    padding_side: str = "right",
    pad_token_id: int = 0,
    pad_to_multiple_of: int | None = None,
    max_length: int | None = None,
    vocab: SIDVocab | None = None,
    embeddings: bool = True,
    skip_forced: TrieIndex | None = None,
) -> PackedSessions:
    """Pack each session's prompt and candidates into one row, so that a model reads the prompt once.

    A candidate attends to the prompt and to itself, and its positions start at the prompt's end. Log-probs and
    gradients equal those of one row per candidate, each with its own copy of the prompt.

    Args:
        prompts: ``S`` sequences of token ids (lists, arrays or tensors of one dimension), of at least one token each.
        sessions: the candidates, on the CPU.
        layout: ``"candidates"`` holds every candidate's tokens, ``"trie"`` every distinct prefix of a session
            once.
        padding_side: where shorter rows are padded, ``"right"`` or ``"left"``.
        pad_token_id: token id of the padding; no token attends to it.
        pad_to_multiple_of: pad rows so that ``T`` is a multiple of this.
        max_length: maximum number of tokens of a prompt with its longest candidate, such as the model's context window.
            A longer prompt loses its first tokens; candidates lose none.
        vocab: start a truncated prompt at a token of the first level, so that it has only whole SIDs. If no such token
            is left, the prompt is truncated as without ``vocab``.
        embeddings: also give the candidates' last tokens positions. Only :class:`SimilarityWeighting` reads their
            states.
        skip_forced: the catalogue, for log-probs with ``normalize="trie"``: a token without siblings in it has log-prob
            0 and no gradient, whatever the model says. Tokens that only predict such tokens get no position, and
            ``rows`` of the predicted ones is the prompt's last state. Needs ``embeddings=False``.

    Returns:
        :class:`PackedSessions`, on the CPU.

    Raises:
        ValueError: a prompt is empty or has a negative token id, a candidate leaves its prompt no token within
            ``max_length``, the number of prompts is not that of the sessions, or ``skip_forced`` without its needs.
        TypeError: the prompts do not hold integers.

    Example:
        >>> sessions = rx.SessionBatch(
        ...     torch.tensor([[3, 7], [3, 8]]), torch.tensor([2, 2]), torch.tensor([0, 2]), torch.tensor([1])
        ... )
        >>> rx.pack_sessions([[1, 2]], sessions).input_ids
        tensor([[1, 2, 3, 7, 3, 8]])
        >>> rx.pack_sessions([[1, 2]], sessions, layout="trie").input_ids
        tensor([[1, 2, 3, 7, 8]])

    Source: RAD-DPO (arXiv 2602.23964), label packing.
    """
    _check.instance(sessions, "sessions", SessionBatch)
    if sessions.device.type != "cpu":
        raise ValueError(f"sessions must be on the CPU, where batches are packed, got {sessions.device}")
    trie = _check.choice(layout, "layout", LAYOUTS) == 1
    left = _check.choice(padding_side, "padding_side", _SIDES) == 1
    pad_token_id = _check.integer(pad_token_id, "pad_token_id", 0)
    multiple_of = 1 if pad_to_multiple_of is None else _check.integer(pad_to_multiple_of, "pad_to_multiple_of", 1)
    if vocab is not None:
        _check.instance(vocab, "vocab", SIDVocab)
    read = sessions.lengths
    if skip_forced is not None:
        _check.instance(skip_forced, "skip_forced", TrieIndex)
        read = _unforced_lengths(sessions, skip_forced)
        if embeddings:
            raise ValueError("skip_forced needs embeddings=False: candidates' last tokens may have no position")
    # The prompts as one vector of tokens, truncated to max_length.
    tokens, starts, lengths = _flatten(prompts, sessions.num_sessions)
    num_truncated = 0
    if max_length is not None:
        starts, lengths, num_truncated = _truncate(
            tokens, starts, lengths, sessions, _check.integer(max_length, "max_length", 1), vocab
        )
    # The padded rows, and for each token of a candidate the state that predicts it.
    prompt_lengths = torch.from_numpy(lengths)
    input_ids, position_ids, ends, predictors, last_tokens, prompt_starts = torch.ops.raddpo.pack_sessions(
        torch.from_numpy(tokens),
        torch.from_numpy(starts),
        prompt_lengths,
        sessions.tokens.contiguous(),
        read.contiguous(),
        sessions.offsets.contiguous(),
        trie,
        embeddings,
        left,
        pad_token_id,
        multiple_of,
    )
    # Shared states once each, so that a head multiplies them once.
    distinct, rows = predictors.unique(return_inverse=True)
    return PackedSessions(
        sessions=sessions,
        input_ids=input_ids,
        position_ids=position_ids,
        ends=ends,
        distinct=distinct,
        rows=rows,
        last_tokens=last_tokens if embeddings else None,
        prompt_starts=prompt_starts,
        prompt_lengths=prompt_lengths,
        num_truncated=num_truncated,
    )


def _flatten(prompts: Sequence[Any], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens of all prompts, and each prompt's begin and length."""
    if not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
        raise TypeError(f"prompts must be a sequence of sequences of token ids, got {type(prompts).__name__}")
    if len(prompts) != count:
        raise ValueError(f"prompts must have one entry per session ({count}), got {len(prompts)}")
    # Lists are the usual case and chain fast; arrays and tensors are concatenated.
    tokens: np.ndarray = np.empty(0, np.int64)
    lengths: np.ndarray = np.empty(0, np.int64)
    try:
        if count:
            lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        if count and all(isinstance(prompt, list) for prompt in prompts):
            tokens = np.array(list(chain.from_iterable(prompts)))
        elif count:
            tokens = np.concatenate([np.asarray(prompt) for prompt in prompts])
    except (TypeError, ValueError):
        raise TypeError(f"prompts must hold token ids of one dimension: {_culprit(prompts)}") from None
    # Every prompt has a token, and all of them are ids.
    if not lengths.all():
        raise ValueError(
            f"prompts[{int(lengths.argmin())}] must have at least one token, whose state predicts the first code"
        )
    if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
        raise TypeError(f"prompts must hold token ids of one dimension: {_culprit(prompts)}")
    tokens = tokens.astype(np.int64, copy=False)
    starts = np.cumsum(lengths) - lengths
    if count and tokens.min() < 0:
        place = int(tokens.argmin())
        row = int(np.searchsorted(starts, place, "right")) - 1
        raise ValueError(f"prompts[{row}][{place - starts[row]}] must be at least 0, got {tokens[place]}")
    return tokens, starts, lengths


def _unforced_lengths(sessions: SessionBatch, index: TrieIndex) -> Tensor:
    """The candidates' lengths up to their last token that has siblings in the index, int64 ``[C]``."""
    if index.device.type != "cpu":
        raise ValueError(f"skip_forced must be on the CPU, where batches are packed, got {index.device}")
    mask = sessions.mask()
    if mask.shape[1] == 0:
        return sessions.lengths
    nodes = index.nodes(F.pad(sessions.tokens.masked_fill(~mask, -1), (0, 1), value=-1))
    # A token that is not in the index has log-prob -inf, also where it stands for an only child.
    forced = (index.child_ranges(nodes[:, :-1])[1] == 1) & (nodes[:, 1:] >= 0)
    places = torch.arange(1, mask.shape[1] + 1)
    return (places * (mask & ~forced)).amax(1)


def _culprit(prompts: Sequence[Any]) -> str:
    """The error of the first prompt that is not a vector of integers."""
    for row, prompt in enumerate(prompts):
        try:
            _check.integer_array(prompt, f"prompts[{row}]", 1)
        except (TypeError, ValueError) as error:
            return str(error)
    return "the prompts have incompatible types"


def _truncate(
    tokens: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    sessions: SessionBatch,
    max_length: int,
    vocab: SIDVocab | None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Begins and lengths of the prompts after truncation to ``max_length``, and the number of truncated prompts."""
    # The tokens that each session's longest candidate leaves its prompt.
    longest = np.zeros(len(lengths), np.int64)
    np.maximum.at(longest, sessions.owners().numpy(), sessions.lengths.numpy())
    budget = max_length - longest  # tokens for each prompt
    if len(budget) and budget.min() < 1:
        row = int(budget.argmin())
        raise ValueError(
            f"max_length = {max_length} leaves prompts[{row}] no token beside a candidate of {longest[row]} tokens"
        )
    # Drop first tokens.
    cut = lengths > budget
    ends = starts + lengths
    starts = np.where(cut, ends - budget, starts)
    # Move the begin to the next token of the first level, where there is one, so that no SID is cut.
    if vocab is not None and cut.any():
        first = np.flatnonzero(np.isin(tokens, vocab.token_ids[0][vocab.token_ids[0] >= 0].numpy()))
        after = np.append(first, len(tokens))[np.searchsorted(first, starts)]
        starts = np.where(cut & (after < ends), after, starts)
    return starts, ends - starts, int(cut.sum())


@torch.library.register_fake("raddpo::pack_sessions")
def _(
    prompts: Tensor,
    prompt_begins: Tensor,
    prompt_lengths: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    offsets: Tensor,
    trie: bool,
    last_token: bool,
    pad_left: bool,
    pad_token_id: int,
    multiple_of: int,
) -> tuple[Tensor, ...]:
    width = torch.library.get_ctx().new_dynamic_size()
    rows = [tokens.new_empty((len(prompt_lengths), width)) for _ in range(3)]
    return (*rows, torch.empty_like(tokens), torch.empty_like(lengths), torch.empty_like(prompt_lengths))
