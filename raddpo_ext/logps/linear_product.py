"""The matrix products behind linear_token_logps: a part's logits, whole or in tiles, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raddpo_ext._matmul import FRESH, empty, linear
from raddpo_ext.logps.linear_parts import Part
from raddpo_ext.logps.token_logps import Options, logps_and_lse, overwrite_by_gradient

# Minimum columns and rows of a tile, unless there are fewer: smaller products are slow.
_MIN_COLUMNS, _MIN_ROWS = 1024, 256
#: Multiplications above which skipping rows saves more time than finding them costs.
MIN_SKIP_FLOPS = 1 << 26


class Plan(NamedTuple):
    """The settings that all parts have in common."""

    dtype: torch.dtype  # of the products
    scale: float
    softcap: float
    ignore_index: int
    budget: int  # bytes of logits
    needs_grad: bool
    accumulate: bool  # whether the weight's gradient is added to weight.grad directly
    skip_ignored: bool  # whether ignored rows are skipped, which reads values


class Product:
    """``hidden @ weight.T + bias`` of one part."""

    def __init__(
        self, part: Part, plan: Plan, hidden: Tensor, weight: Tensor, bias: Tensor | None, budget_left: int
    ) -> None:
        self.part, self.plan = part, plan
        self.hidden = hidden if part.rows is None else hidden.index_select(0, part.rows)
        # The part's rows of the head, without a copy if they are all of them.
        if part.columns is None and part.width == weight.shape[0]:
            self.weight, self.bias = weight, bias
        else:
            chosen = slice(part.first, part.first + part.width) if part.columns is None else part.columns
            self.weight, self.bias = weight[chosen], None if bias is None else bias[chosen]
        # Tiles that fit the budget.
        rows, columns = self.hidden.shape[0], part.width
        budget_left //= plan.dtype.itemsize
        #: Whether the logits need at most ``budget_left`` bytes.
        self.fits = rows * columns <= budget_left
        if not self.fits:
            # Prefer tiles of all rows: a tile's rows of the weight's gradient are then a single product.
            if part.lists is None:
                columns = min(columns, max(_MIN_COLUMNS, budget_left // rows))
            rows = min(rows, max(_MIN_ROWS, budget_left // columns))
        self.row_tiles, self.column_tiles = _cut(self.hidden.shape[0], rows), _cut(part.width, columns)
        self._tile_size = rows * columns

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, log-sum-exps in float64, and the last tile's logits."""
        buffer = self._buffer()
        logps: list[Tensor] = []
        lses: list[Tensor] = []
        for rows in self.row_tiles:
            for columns in self.column_tiles:
                logits = self._logits(rows, columns, buffer)
                tile_targets = _cut_out(self.part.targets, rows)
                tile_logp, tile_lse = logps_and_lse(logits, tile_targets, self._options(rows, columns))
                # Merge the tiles of a row: log-sum-exps add up, and the log-probs shift to the common one.
                if columns.start == 0:
                    logp, lse = tile_logp, tile_lse
                else:  # a target's log-prob is -inf in all tiles but one
                    both = torch.logaddexp(lse, tile_lse)
                    shift = both.masked_fill(both == -torch.inf, 0.0)  # -inf: every logit so far is -inf
                    merged = torch.maximum(logp + (lse - shift), tile_logp + (tile_lse - shift))
                    logp = merged.to(tile_logp.dtype)
                    lse = both
            logps.append(logp)
            lses.append(lse)
        if len(logps) > 1:
            logp, lse = torch.cat(logps), torch.cat(lses)
        # Merging has shifted the zeros of ignored targets too.
        if len(self.column_tiles) > 1:
            logp = logp.masked_fill(self.part.targets == self.part.ignored, 0.0)
        if self.part.outside is not None:
            logp = logp.masked_fill(self.part.outside, -torch.inf)
        return logp, lse, logits

    def backward(self, grad: Tensor, lse: Tensor, kept: Tensor | None, gradients: Gradients) -> None:
        """Add this part's contribution to the gradients, given the gradient of its log-probs.

        Overwrites the kept logits.
        """
        buffer = self._buffer() if kept is None else None
        for columns in self.column_tiles:
            weight_sum = None
            for rows in self.row_tiles:
                logits = self._logits(rows, columns, buffer) if kept is None else kept
                # The tile's logits are overwritten by their gradient.
                tile_grad, targets, tile_lse = (_cut_out(x, rows) for x in (grad, self.part.targets, lse))
                live = self._live(tile_grad)
                overwrite_by_gradient(tile_grad, logits, targets, tile_lse, self._options(rows, columns), live)
                hidden = _cut_out(self.hidden, rows)
                if live is not None:
                    logits, hidden = logits[: len(live)], hidden[live]
                # Two matrix products per tile: for the states, and for the weight.
                if gradients.needs_hidden:
                    gradients.add_hidden(self.part, rows, live, logits, _cut_out(self.weight, columns))
                if gradients.bias is not None:
                    gradients.add_bias(self.part, columns, logits.sum(0, dtype=gradients.bias.dtype))
                if gradients.weight is None:
                    continue
                if len(self.row_tiles) == 1:
                    gradients.add_weight(self.part, columns, logits.T, hidden)
                else:
                    piece = linear(logits.T, hidden.T).to(gradients.sum_dtype)
                    weight_sum = piece if weight_sum is None else weight_sum.add_(piece)
            if weight_sum is not None:
                gradients.add_weight(self.part, columns, weight_sum)

    def _buffer(self) -> Tensor | None:
        """A buffer that all tiles reuse: two exceed the budget, and malloc maps fresh pages for each large one."""
        alone = self.fits and self._tile_size * self.plan.dtype.itemsize < FRESH
        return None if alone or torch.compiler.is_compiling() else empty(self.hidden, (self._tile_size,))

    def _logits(self, rows: slice, columns: slice, buffer: Tensor | None) -> Tensor:
        """The logits of a tile before the transform, in the buffer if there is one."""
        hidden, weight = _cut_out(self.hidden, rows), _cut_out(self.weight, columns)
        out = None
        if buffer is not None:
            shape = hidden.shape[0], weight.shape[0]
            out = _cut_out(buffer, slice(0, shape[0] * shape[1])).view(shape)
        return linear(hidden, weight, None if self.bias is None else _cut_out(self.bias, columns), out=out)

    def _options(self, rows: slice, columns: slice) -> Options:
        """The operator's options for a tile."""
        plan, part, numbers, begins, counts = self.plan, self.part, None, None, None
        if part.lists is not None:
            numbers, begins, counts = part.lists.columns, part.lists.begins[rows], part.lists.counts[rows]
        limit = part.width if part.num_targets is None else part.num_targets
        return Options(numbers, begins, counts, plan.scale, plan.softcap, part.ignored, columns.start, limit)

    def _live(self, grad: Tensor) -> Tensor | None:
        """The rows with a gradient, or None where skipping the other rows would not save time."""
        if grad.device.type != "cpu" or self.part.lists is not None or torch.compiler.is_compiling():
            return None
        if grad.shape[0] * self.weight.numel() < MIN_SKIP_FLOPS:
            return None
        live = grad.nonzero()[:, 0]
        return live if 10 * len(live) < 9 * grad.shape[0] else None


class Gradients:
    """Accumulates the gradients of hidden states, weight and bias, as far as they are needed."""

    def __init__(
        self,
        products: Sequence[Product],
        plan: Plan,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs_grad: Sequence[bool],
    ) -> None:
        self.needs_hidden, needs_weight, needs_bias = needs_grad[:3]
        low = plan.dtype in (torch.bfloat16, torch.float16)
        self.sum_dtype = torch.float32 if low else plan.dtype
        self._hidden = hidden
        self._hidden_dtype = self.sum_dtype if any(len(p.column_tiles) > 1 for p in products) else plan.dtype
        self._hidden_grad: Tensor | None = None
        self.bias = bias.new_zeros(bias.shape, dtype=self.sum_dtype) if bias is not None and needs_bias else None
        self._bias_dtype = None if bias is None else bias.dtype
        # A single part with all rows of the weight writes each row of the gradient once: no zeros are needed.
        self._once = len(products) == 1 and products[0].part.columns is None and products[0].part.width == len(weight)
        self._adds_to = weight if plan.accumulate else None
        self.weight: Tensor | None = None
        if needs_weight and plan.accumulate and weight.grad is not None:
            self.weight, self._once = weight.grad, False
        elif needs_weight:
            self.weight = empty(weight, weight.shape)
            if not self._once:
                self.weight.zero_()

    def add_hidden(self, part: Part, rows: slice, live: Tensor | None, left: Tensor, right: Tensor) -> None:
        """Add ``left @ right`` to the gradient of the hidden states."""
        # The first product of all rows is the gradient itself, without zeros to add to.
        whole = part.rows is None and live is None
        if whole and self._hidden_grad is None and left.shape[0] == self._hidden.shape[0]:
            self._hidden_grad = linear(left, right.T).to(self._hidden_dtype)
            return
        if self._hidden_grad is None:
            self._hidden_grad = self._hidden.new_zeros(self._hidden.shape, dtype=self._hidden_dtype)
        # Consecutive rows: the product adds to them directly.
        if whole and self._hidden_dtype == left.dtype:
            linear(left, right.T, out=self._hidden_grad[rows], add=True)
            return
        place: slice | Tensor = rows
        if not whole:
            place = torch.arange(rows.start, rows.stop, device=left.device) if part.rows is None else part.rows[rows]
            place = place if live is None else place[live]
        self._hidden_grad[place] += linear(left, right.T)

    def add_bias(self, part: Part, columns: slice, piece: Tensor) -> None:
        """Add ``piece`` to the gradient of these columns of the bias."""
        assert self.bias is not None
        self.bias[_rows_of_weight(part, columns)] += piece

    def add_weight(self, part: Part, columns: slice, left: Tensor, right: Tensor | None = None) -> None:
        """Add ``left @ right``, or ``left`` alone, to the gradient of the weight."""
        assert self.weight is not None
        place = _rows_of_weight(part, columns)
        # Scattered rows, another type, or a finished product: no matrix product can write to the gradient directly.
        if isinstance(place, Tensor) or right is None or self.weight.dtype != left.dtype:
            piece = (left if right is None else linear(left, right.T)).to(self.weight.dtype)
            if isinstance(place, Tensor):
                self.weight.index_add_(0, place, piece)
            elif self._once:
                self.weight[place] = piece
            else:
                self.weight[place] += piece
        else:
            linear(left, right.T, out=_cut_out(self.weight, place), add=not self._once)

    def add_pairs(self, rows: Tensor, columns: Tensor, factors: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Add the contribution of single logits at ``rows`` and ``columns``, whose gradients are ``factors``."""
        if self.needs_hidden:
            if self._hidden_grad is None:
                self._hidden_grad = self._hidden.new_zeros(self._hidden.shape, dtype=self._hidden_dtype)
            add_rows(self._hidden_grad, rows, factors[:, None] * weight.index_select(0, columns))
        if self.bias is not None:
            add_rows(self.bias, columns, factors)
        if self.weight is not None:
            add_rows(self.weight, columns, factors[:, None] * hidden.index_select(0, rows))

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients in the form that autograd expects."""
        hidden, weight = self._hidden_grad, self.weight
        if self.needs_hidden and hidden is None:
            hidden = torch.zeros_like(self._hidden)
        if self._adds_to is not None and weight is not None:
            self._adds_to.grad, weight = weight, None
        return (
            None if hidden is None else hidden.to(self._hidden.dtype),
            weight,
            None if self.bias is None else self.bias.to(self._bias_dtype),
        )


def _cut(size: int, step: int) -> list[slice]:
    """Cut ``[0, size)`` into slices of ``step``."""
    return [slice(begin, min(begin + step, size)) for begin in range(0, size, step)]


def _cut_out(x: Tensor, place: slice) -> Tensor:
    """``x[place]``, or ``x`` itself if that is all of it."""
    return x if place.stop - place.start == x.shape[0] else x[place]


def add_rows(to: Tensor, places: Tensor, values: Tensor) -> None:
    """Add each row of ``values`` at its place. Places may repeat; the result on CUDA is deterministic."""
    to.index_put_((places,), values.to(to.dtype), accumulate=True)


def _rows_of_weight(part: Part, columns: slice) -> slice | Tensor:
    """The rows of the weight that are these columns of a part."""
    if part.columns is not None:
        return part.columns[columns]
    return slice(part.first + columns.start, part.first + columns.stop)
