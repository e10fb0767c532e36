"""Similarity weighting (RDRW): the more similar a negative is to its positive, the lower the weight of their pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raddpo_ext import _check
from raddpo_ext._autograd import refuse_transforms
from raddpo_ext.losses.session import SessionBatch

_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Embedding entries multiplied at a time: few enough for a CPU's cache, and enough for a GPU launch.
_CHUNK = {"cpu": 2**18, "cuda": 2**24}


class SimilarityWeighting(nn.Module):
    """Weigh pairs by the cosine similarity of their embeddings, relative to the quantiles of recent similarities.

    Let ``s`` be the cosine similarity of a pair's embeddings (the last-layer hidden states at the candidates' last
    tokens), and ``q_lo <= q_mid <= q_hi`` quantiles (linear interpolation) of the ``window`` most recent similarities::

        w = 1                                                                 s <= q_lo, or s is not finite
        w = min_weight                                                        s >= q_hi
        w = min_weight + (1 - min_weight) * sigmoid(-u * steepness / 2)       between them
        u = (s - q_mid) / (q_mid - q_lo) below q_mid, (s - q_mid) / (q_hi - q_mid) from q_mid on

    ``w = 1`` until ``window`` similarities have been seen. A call in training mode computes weights and then appends
    its finite similarities, except for pairs that the losses drop (a length of 0, equal SIDs). In eval mode a call only
    computes weights.

    Appended similarities take effect at the next :meth:`commit`. A trainer that commits once per optimizer step, after
    the step's last call, gets the same weights from accumulated and from distributed batches as from one big batch.
    Until the first :meth:`commit`, every call in training mode commits by itself. To defer the calls of the first step
    too, commit once before it.

    If ``torch.distributed`` is initialised, a commit gathers the similarities of all ranks and appends them in rank
    order. All ranks must commit equally often; they then hold the same state. Nothing synchronises with a GPU.

    The state is in buffers: ``state_dict`` restores it bit for bit, and ``half()`` leaves it float32. In a module
    wrapped by ``DistributedDataParallel``, ``broadcast_buffers`` overwrites every rank's ``pending`` by that of rank 0
    before each forward. Accumulate under ``no_sync()``, or keep this module outside of the wrapped one.

    Args:
        window: number of similarities behind the quantiles, at least 2.
        quantiles: the levels of ``q_lo, q_mid, q_hi`` in ``[0, 1]``, non-decreasing.
        steepness: steepness of the logistic, positive.
        min_weight: the minimum weight, in ``(0, 1]``.
        process_group: the ranks that share the state; default: all.

    Attributes:
        history: float32 ``[window]`` committed similarities, newest last, padded in front with NaN.
        pending: float32 ``[window]`` similarities appended since the last commit, padded likewise.
        thresholds: float32 ``[3]``: ``q_lo, q_mid, q_hi`` of ``history``, NaN until it is full.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Source: RDRW of RAD-DPO (arXiv 2602.23964).

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2]])  # a positive and two negatives
        >>> sessions = rx.SessionBatch(tokens, torch.tensor([2, 2, 2]), torch.tensor([0, 3]), torch.tensor([1]))
        >>> weighting = rx.SimilarityWeighting(window=2)
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # the first negative is like the positive
        >>> weighting(embeddings, sessions)  # too few similarities so far
        tensor([1., 1.])
        >>> weighting(embeddings, sessions)
        tensor([0.5000, 1.0000])
    """

    history: Tensor
    pending: Tensor
    thresholds: Tensor

    def __init__(
        self,
        window: int = 4096,
        quantiles: Sequence[float] = (0.5, 0.7, 0.9),
        steepness: float = 12.0,
        min_weight: float = 0.5,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.window = _check.integer(window, "window", 2)
        self.quantiles = _levels(quantiles)
        self.steepness = _check.positive(steepness, "steepness")
        self.min_weight = _check.number(min_weight, "min_weight")
        if not 0 < self.min_weight <= 1:
            raise ValueError(f"min_weight must be in (0, 1], got {min_weight}")
        self.process_group = process_group
        self._commits_by_itself = True
        for name, size in (("history", self.window), ("pending", self.window), ("thresholds", 3)):
            self.register_buffer(name, torch.full((size,), math.nan, dtype=torch.float32))

    @torch.no_grad()
    def forward(self, embeddings: Tensor, sessions: SessionBatch) -> Tensor:
        """Compute the weight of each pair.

        Args:
            embeddings: ``[C, D]`` float32, bfloat16, float16 or float64, one row per candidate. Pairs with
                a row that is zero or not finite have weight 1 and are not appended.
            sessions: the candidates.

        Returns:
            ``[M]`` weights in the order of ``sessions.pairs()``, float32 (float64 for float64), without gradient.

        Raises:
            ValueError, TypeError: naming the argument and the value.
        """
        self._check_arguments(embeddings, sessions)
        refuse_transforms("SimilarityWeighting", embeddings)
        # Weights come from what was committed before this call.
        positives, negatives = sessions.pairs()
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        similarities = _cosine(embeddings.to(dtype, copy=True), positives, negatives)
        weights = self._weigh(similarities.to(dtype))
        # What the losses drop is NaN, which is not appended.
        if self.training:
            kept = similarities.masked_fill(~sessions.kept_pairs("each"), math.nan)
            self.pending.copy_(_appended(self.pending, kept))
            if self._commits_by_itself:
                self._commit()
        return weights

    @torch.no_grad()
    def commit(self) -> None:
        """End an optimizer step: similarities that its calls appended on any rank take effect from now on."""
        self._commits_by_itself = False
        self._commit()

    def _commit(self) -> None:
        # Every rank appends what all ranks saw, in rank order, and so holds the same state.
        arrived = [self.pending]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.process_group) > 1:
            arrived = [torch.empty_like(self.pending) for _ in range(dist.get_world_size(self.process_group))]
            dist.all_gather(arrived, self.pending, group=self.process_group)
        self.history.copy_(_appended(self.history, torch.cat(arrived)))
        self.pending.fill_(math.nan)
        self.thresholds.copy_(_quantiles(self.history, self.quantiles))

    def _weigh(self, similarities: Tensor) -> Tensor:
        low, middle, high = self.thresholds.unbind()
        below = (similarities - middle) / (middle - low)
        above = (similarities - middle) / (high - middle)
        # Equal thresholds divide by 0 here, but only for similarities that one of the masks below overwrites.
        logistic = torch.sigmoid(torch.where(similarities < middle, below, above) * (-self.steepness / 2))
        weights = self.min_weight + (1 - self.min_weight) * logistic
        weights = weights.masked_fill(similarities >= high, self.min_weight)
        return weights.masked_fill(~(similarities > low), 1.0)  # also where the similarity or the threshold is NaN

    def _check_arguments(self, embeddings: Tensor, sessions: SessionBatch) -> None:
        _check.instance(sessions, "sessions", SessionBatch)
        _check.instance(embeddings, "embeddings", Tensor)
        if embeddings.dtype not in _TYPES:
            raise TypeError(f"embeddings must be float32, bfloat16, float16 or float64, got {embeddings.dtype}")
        if embeddings.dim() != 2 or embeddings.shape[0] != sessions.num_candidates or embeddings.shape[1] == 0:
            raise ValueError(
                f"embeddings must have one row per candidate ({sessions.num_candidates}) and at least one column, got "
                f"shape {tuple(embeddings.shape)}"
            )
        if embeddings.device != self.history.device:
            raise ValueError(
                f"embeddings must be on the device of the module, {self.history.device}, got {embeddings.device}"
            )
        if sessions.device != self.history.device:
            raise ValueError(
                f"sessions must be on the device of the module, {self.history.device}, got {sessions.device}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SimilarityWeighting:
        """Apply ``fn`` to the buffers, but keep them float32."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def get_extra_state(self) -> Tensor:
        """Whether :meth:`commit` has been called. It is a tensor, because some file formats hold only tensors."""
        return torch.tensor(not self._commits_by_itself)

    def set_extra_state(self, state: Tensor) -> None:
        self._commits_by_itself = not bool(state)

    def extra_repr(self) -> str:
        return (
            f"window={self.window}, quantiles={self.quantiles}, steepness={self.steepness}, "
            f"min_weight={self.min_weight}"
        )


def _levels(quantiles: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(quantiles, Sequence) or isinstance(quantiles, str):
        raise TypeError(f"quantiles must be a sequence of three numbers, got {quantiles!r}")
    levels = tuple(_check.number(level, f"quantiles[{i}]") for i, level in enumerate(quantiles))
    if len(levels) != 3 or not 0 <= levels[0] <= levels[1] <= levels[2] <= 1:
        raise ValueError(f"quantiles must be three non-decreasing numbers in [0, 1], got {quantiles}")
    return levels


def _cosine(embeddings: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """The cosine of each pair's rows in float32, the dtype of the history; NaN if a row is zero or not finite.

    Overwrites ``embeddings``.
    """
    # Dividing each row by its largest entry first keeps its squares from overflow and underflow.
    embeddings /= torch.maximum(embeddings.amax(-1, keepdim=True), -embeddings.amin(-1, keepdim=True))
    embeddings /= torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    rows = max(1, _CHUNK.get(embeddings.device.type, _CHUNK["cuda"]) // embeddings.shape[1])
    cosines = embeddings.new_empty(len(positives))
    for start in range(0, len(positives), rows):
        chunk = slice(start, start + rows)
        products = embeddings.index_select(0, positives[chunk]).mul_(embeddings.index_select(0, negatives[chunk]))
        torch.sum(products, -1, out=cosines[chunk])
    return cosines.float()


def _appended(old: Tensor, new: Tensor) -> Tensor:
    """The last finite values of ``old`` followed by ``new``: as many as ``old`` holds, padded in front with NaN."""
    window = len(old)
    values = torch.cat((old, new))
    finite = values.isfinite()
    # Each finite value moves so far to the right that the last one ends the window.
    count = finite.cumsum(0)
    place = count + (window - 1 - count[-1])
    place = place.masked_fill(~finite | (place < 0), window)  # discarded values go to one extra place at the end
    return values.new_full((window + 1,), math.nan).scatter_(0, place, values)[:window]


def _quantiles(history: Tensor, levels: Sequence[float]) -> Tensor:
    """The quantiles of a full history, NaN if it is not full."""
    ascending = history.double().sort().values  # in float64, rounding cannot reorder the quantiles
    found = []
    for level in levels:
        # Linear interpolation between the two nearest ranks.
        rank = level * (len(history) - 1)
        below = math.floor(rank)
        low, high = ascending[below], ascending[math.ceil(rank)]
        found.append(low + (rank - below) * (high - low))
    return torch.stack(found).float().masked_fill(history[0].isnan(), math.nan)
