"""Pages of a SessionCollator: the tokens to predict, and the weight of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.data.pack_pages import IGNORED, pack_pages
from raddpo_ext.data.pack_sessions import PackedSessions, pack_sessions
from raddpo_ext.losses.session import SessionBatch

KINDS = ("set", "sequence")
TIERS = "tiers"  # the optional column


class SessionPages:
    """Packs rows for next-token prediction of their positives: see :class:`SessionCollator`, which has the arguments.

    Raises:
        ValueError, TypeError: naming the argument and the value.
    """

    def __init__(
        self,
        kind: str,
        separator: int | None,
        supervise_separator: bool,
        max_items: int | None,
        level_weights: Sequence[float] | None,
    ) -> None:
        self.is_sequence = KINDS[_check.choice(kind, "page", KINDS)] == "sequence"
        if separator is not None and not self.is_sequence:
            raise ValueError(f"separator must be None with page = 'set', got {separator!r}")
        self.separator = None if separator is None else _check.integer(separator, "separator", 0)
        self.has_targets = separator is not None and supervise_separator
        self.max_items = None if max_items is None else _check.integer(max_items, "max_items", 1)
        given = () if level_weights is None else level_weights
        self.level_weights = [_check.not_negative(w, f"level_weights[{i}]") for i, w in enumerate(given)]

    def num_separators(self, items: int) -> int:
        """The number of separators on a page."""
        return 0 if self.separator is None else max(0, items - 1)

    def cut(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        """A row with its first ``max_items`` positives, and the tier of each; ``name`` is for errors."""
        positives = row["positives"]
        if not hasattr(positives, "__len__") or isinstance(positives, (str, dict)):
            return row  # refused with other bad candidates
        tiers, name = row.get(TIERS), f"{name}[{TIERS!r}]"
        if tiers is None:
            tiers = [1.0] * len(positives)
        tiers = tiers.tolist() if hasattr(tiers, "tolist") else tiers
        if not isinstance(tiers, (list, tuple)) or len(tiers) != len(positives):
            raise ValueError(f"{name} must have one number per positive ({len(positives)}), got {tiers!r}")
        tiers = [_check.not_negative(tier, f"{name}[{i}]") for i, tier in enumerate(tiers)]
        return row | {"positives": positives[: self.max_items], TIERS: tiers[: self.max_items]}

    def pack(
        self, rows: list[dict[str, Any]], sessions: SessionBatch, options: dict[str, Any]
    ) -> tuple[PackedSessions, dict[str, Tensor]]:
        """The packed rows, and ``tokens``, ``rows`` and ``weights`` of what is to be predicted."""
        prompts = [row["prompt_ids"] for row in rows]
        if self.is_sequence:
            packed, tokens, states = pack_pages(prompts, sessions, self.separator, **options)
        else:
            packed = pack_sessions(prompts, sessions, embeddings=False, **options)
            tokens, states = sessions.tokens.masked_fill(~sessions.mask(), IGNORED), packed.rows
        # A SID's token has the weight of its level, a separator 1; each is multiplied by its item's tier.
        levels = sessions.tokens.shape[1]
        if self.level_weights and len(self.level_weights) < levels:
            raise ValueError(
                f"level_weights must have one entry per token of an item ({levels}), got {self.level_weights}"
            )
        of_levels = torch.tensor(self.level_weights[:levels] or [1.0] * levels)
        weights = torch.full(tokens.shape, float(self.has_targets))
        weights[:, :levels] = torch.where(sessions.mask(), of_levels, weights[:, :levels])
        weights *= torch.tensor([tier for row in rows for tier in row[TIERS]])[:, None]
        weights[tokens == IGNORED] = 0
        tokens = tokens.masked_fill(weights == 0, IGNORED)
        width = tokens.shape[1] if self.has_targets else levels
        page = {"tokens": tokens, "rows": states, "weights": weights}
        return packed, {name: table[:, :width].contiguous() for name, table in page.items()}
