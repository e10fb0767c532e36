"""SessionBatch: the ragged candidates of a batch of sessions, the input of the losses and of the packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.losses import session_loss


class SessionBatch:
    """Candidates of ``S`` sessions in ``C`` rows.

    Session ``s`` has the rows ``offsets[s]:offsets[s + 1]``: first ``num_positives[s]`` positives, then negatives. Any
    count may be 0. Every positive and every negative of a session form a pair. Pairs are numbered session by session,
    positive-major.

    Values are checked on the CPU. A batch that is built there and moved by :meth:`to` does not synchronise with a GPU.

    Args:
        tokens: int64 ``[C, L]`` token ids; entries beyond the lengths are not read.
        lengths: int64 ``[C]`` in ``[0, L]``.
        offsets: int64 ``[S + 1]`` from 0 to ``C``, non-decreasing.
        num_positives: int64 ``[S]``, at most the number of the session's candidates.
        num_pairs: number of pairs ``M``. Without it, a batch that is built on a GPU reads it from there (synchronises).
        check: also check values on a GPU (synchronises).

    Attributes:
        pair_offsets: int64 ``[S + 1]``: the pairs of session ``s`` are ``pair_offsets[s]:pair_offsets[s + 1]``.
        num_pairs: ``M``.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2], [5, 6], [5, 7]])
        >>> sessions = rx.SessionBatch(tokens, torch.full((5,), 2), torch.tensor([0, 3, 5]), torch.tensor([1, 1]))
        >>> sessions
        SessionBatch(num_sessions=2, num_candidates=5, num_pairs=3, device='cpu')
        >>> sessions.pairs()
        (tensor([0, 0, 3]), tensor([1, 2, 4]))
    """

    def __init__(
        self,
        tokens: Tensor,
        lengths: Tensor,
        offsets: Tensor,
        num_positives: Tensor,
        *,
        num_pairs: int | None = None,
        check: bool = False,
    ) -> None:
        self.tokens, self.lengths = tokens, lengths
        self.offsets, self.num_positives = offsets, num_positives
        self._check_shapes()
        if check or tokens.device.type == "cpu":
            self._check_values()
        sizes = offsets.diff()
        self.pair_offsets = torch.zeros_like(offsets)
        torch.cumsum(num_positives * (sizes - num_positives), 0, out=self.pair_offsets[1:])
        if num_pairs is not None:
            num_pairs = _check.integer(num_pairs, "num_pairs", 0)
        # The number of pairs shapes the results, so it must be known on the CPU.
        if num_pairs is None or check or tokens.device.type == "cpu":
            counted = int(self.pair_offsets[-1])
            if num_pairs is not None and num_pairs != counted:
                raise ValueError(f"num_pairs must be {counted}, the number of pairs, got {num_pairs}")
            num_pairs = counted
        self.num_pairs = num_pairs

    @property
    def num_sessions(self) -> int:
        return self.num_positives.shape[0]

    @property
    def num_candidates(self) -> int:
        return self.tokens.shape[0]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def layout(self) -> dict[str, Any]:
        """The operators' arguments that describe sessions, by name: contiguous tensors and ``num_pairs``."""
        names = ("tokens", "lengths", "offsets", "num_positives", "pair_offsets")
        return {name: getattr(self, name).contiguous() for name in names} | {"num_pairs": self.num_pairs}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SessionBatch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SessionBatch:
        """The same batch in page-locked memory, which ``to(..., non_blocking=True)`` copies asynchronously."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> SessionBatch:
        changed = object.__new__(SessionBatch)
        for name, value in vars(self).items():
            setattr(changed, name, change(value) if isinstance(value, Tensor) else value)
        return changed

    def select(self, keep: Tensor) -> tuple[SessionBatch, Tensor]:
        """The sessions that ``keep`` marks, in their order.

        To leave sessions out before the model runs, such as groups without an advantage. On a GPU this synchronises
        once, to read how much is left.

        Args:
            keep: bool ``[S]``, on the device of the batch.

        Returns:
            The batch of these sessions, and the rows that its candidates had here: int64 ``[C']``. Values per
            candidate follow as ``values[rows]``.

        Raises:
            ValueError, TypeError: naming the argument and the value.

        Example:
            >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2], [5, 6], [5, 7]])
            >>> sessions = rx.SessionBatch(tokens, torch.full((5,), 2), torch.tensor([0, 3, 5]), torch.tensor([1, 1]))
            >>> sessions.select(torch.tensor([False, True]))
            (SessionBatch(num_sessions=1, num_candidates=2, num_pairs=1, device='cpu'), tensor([3, 4]))
        """
        _check.instance(keep, "keep", Tensor)
        if keep.dtype != torch.bool or keep.shape != self.num_positives.shape:
            raise ValueError(
                f"keep must be bool of shape {tuple(self.num_positives.shape)}, got {keep.dtype} of shape "
                f"{tuple(keep.shape)}"
            )
        if keep.device != self.device:
            raise ValueError(f"keep must be on the device of the batch, {self.device}, got {keep.device}")
        left = keep * torch.stack([torch.ones_like(self.num_positives), self.offsets.diff(), self.pair_offsets.diff()])
        count, candidates, pairs = left.sum(1).tolist()
        kept = keep.logical_not().argsort(stable=True)[:count]  # nonzero() would synchronise again
        sizes = self.offsets.diff()[kept]
        offsets = torch.zeros(count + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(sizes, 0, out=offsets[1:])
        moved = torch.repeat_interleave(self.offsets[kept] - offsets[:-1], sizes, output_size=candidates)
        rows = moved + torch.arange(candidates, device=self.device)
        positives = self.num_positives[kept]
        return SessionBatch(self.tokens[rows], self.lengths[rows], offsets, positives, num_pairs=pairs), rows

    def mask(self) -> Tensor:
        """A mask of the entries of ``tokens`` within the lengths: bool ``[C, L]``."""
        return torch.arange(self.tokens.shape[1], device=self.device) < self.lengths[:, None]

    def owners(self) -> Tensor:
        """The session of each candidate: int64 ``[C]``."""
        return torch.repeat_interleave(self.offsets.diff(), output_size=self.num_candidates)

    def is_positive(self) -> Tensor:
        """A mask of the candidates that are positives: bool ``[C]``."""
        session = self.owners()
        rows = torch.arange(self.num_candidates, device=self.device)
        return rows - self.offsets[session] < self.num_positives[session]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The rows of each pair's positive and negative: int64 ``[M]`` each."""
        # The number of each pair within its session.
        counts = self.pair_offsets.diff()
        session = torch.repeat_interleave(counts, output_size=self.num_pairs)
        number = torch.arange(self.num_pairs, device=self.device) - self.pair_offsets[session]
        # Positive-major: all negatives of the first positive, then those of the second.
        first_negative = self.offsets[:-1] + self.num_positives
        negatives = (self.offsets[1:] - first_negative)[session]
        positive = self.offsets[session] + torch.div(number, negatives, rounding_mode="floor")
        return positive, first_negative[session] + number % negatives

    def kept_pairs(self, positives: str = "winner", pair_weights: Tensor | None = None) -> Tensor:
        """A mask of the pairs in the preference loss: bool ``[M]``.

        Pairs with a member of length 0, with equal SIDs or of weight 0 are dropped. ``positives`` selects from the
        rest.

        Args:
            positives: see :func:`rad_dpo_loss`, whose result has the same mask as ``kept``.
            pair_weights: ``[M]`` finite and at least 0, or None.

        Raises:
            ValueError, TypeError: naming the argument and the value.
        """
        return self._facts(positives, session_loss.pair_weights(pair_weights, self.num_pairs, self.device)).kept

    def counts(self, positives: str = "winner") -> Tensor:
        """The divisors of ``reduction="mean"``: the sessions that keep a pair, and the tokens of all positives.

        Their sums over accumulated batches and ranks, with 0 replaced by 1, are the ``normalizer`` of
        :func:`rad_dpo_loss`.

        Args:
            positives: see :func:`rad_dpo_loss`.

        Returns:
            float64 ``[2]``.
        """
        return self._facts(positives).totals[:2, 1].contiguous()  # for collectives, which ignore strides

    def _facts(self, positives: str, pair_weights: Tensor | None = None) -> session_loss.Results:
        """The operator's results that do not depend on the log-probs."""
        dtype = torch.float32 if pair_weights is None else torch.promote_types(pair_weights.dtype, torch.float32)
        return session_loss.session_loss(
            session_loss.Arguments(
                logps=torch.zeros(self.tokens.shape, dtype=dtype, device=self.device),
                **self.layout(),
                pair_weights=None if pair_weights is None else pair_weights.to(dtype),
                positives=_check.choice(positives, "positives", session_loss.POSITIVES),
            )
        )

    def _check_shapes(self) -> None:
        given: dict[str, tuple[Any, int]] = {
            "tokens": (self.tokens, 2),
            "lengths": (self.lengths, 1),
            "offsets": (self.offsets, 1),
            "num_positives": (self.num_positives, 1),
        }
        for name, (value, dim) in given.items():
            _check.int64_tensor(value, name)
            if value.dim() != dim:
                raise ValueError(f"{name} must have {dim} dimensions, got shape {tuple(value.shape)}")
            if value.device != self.tokens.device:
                raise ValueError(f"{name} must be on the device of tokens, {self.tokens.device}, got {value.device}")
        if len(self.lengths) != len(self.tokens):
            raise ValueError(
                f"lengths must have one entry per row of tokens ({len(self.tokens)}), got {len(self.lengths)}"
            )
        if len(self.offsets) != len(self.num_positives) + 1:
            raise ValueError(
                f"offsets must have one entry more than num_positives ({len(self.num_positives)}), got "
                f"{len(self.offsets)}"
            )

    def _check_values(self) -> None:
        candidates, levels = self.tokens.shape
        lengths, offsets, positives = self.lengths, self.offsets, self.num_positives
        _check.none(
            (lengths < 0) | (lengths > levels), lambda i: f"lengths[{i}] = {int(lengths[i])} is outside [0, {levels}]"
        )
        # The offsets cut the candidates into sessions.
        if int(offsets[0]) != 0:
            raise ValueError(f"offsets must begin with 0, got {int(offsets[0])}")
        if int(offsets[-1]) != candidates:
            raise ValueError(f"offsets must end with the number of candidates ({candidates}), got {int(offsets[-1])}")
        sizes = offsets.diff()
        _check.none(
            sizes < 0,
            lambda s: (
                f"offsets must be non-decreasing: offsets[{s + 1}] = {int(offsets[s + 1])} after {int(offsets[s])}"
            ),
        )
        _check.none(
            (positives < 0) | (positives > sizes),
            lambda s: f"num_positives[{s}] = {int(positives[s])} is outside [0, {int(sizes[s])}]",
        )
        # Tokens beyond the lengths may have any value.
        negative = (self.tokens < 0) & self.mask()
        if bool(negative.any()):
            row, column = negative.nonzero()[0].tolist()
            raise ValueError(f"tokens[{row}, {column}] must be at least 0, got {int(self.tokens[row, column])}")

    def __repr__(self) -> str:
        return (
            f"SessionBatch(num_sessions={self.num_sessions}, num_candidates={self.num_candidates}, "
            f"num_pairs={self.num_pairs}, device='{self.device}')"
        )
