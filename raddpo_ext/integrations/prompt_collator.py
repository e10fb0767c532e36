"""PromptCollator: batches of prompts whose candidates the policy will draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.integrations.preference_rows import TEXT, TOKENS
from raddpo_ext.integrations.rollouts import kept_rows
from raddpo_ext.integrations.session_collator import SessionCollator
from raddpo_ext.losses.session import SessionBatch

_SEEN = 4096  # SIDs of the index that stand-ins are chosen from


class Rows:
    """The rows of a batch. Not a container, so that no loader takes it apart or moves what is in it."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows


class PromptCollator(SessionCollator):
    """A :class:`SessionCollator` for rows of a prompt and, if known, its ground truth.

    A row holds ``prompt_ids``, or with a ``tokenizer`` the text ``prompt``. A column ``positives`` (``chosen`` as text)
    is its ground truth. Other columns are for the reward. Each row is packed with SIDs of the catalogue in the place of
    its rollouts. Its size, and the tokens that its prompt loses to ``max_length``, are thus known before they are
    drawn.

    Args:
        index: the catalogue.
        rollouts: number of rollouts per prompt.
        options: see :class:`SessionCollator`.
    """

    def __init__(self, index: TrieIndex, rollouts: int, **options: Any) -> None:
        self.stand_ins = _stand_ins(index, rollouts)
        if options["max_length"] is not None:  # a rollout may be longer than all stand-ins
            options["max_length"] -= index.levels - len(self.stand_ins[0])
        super().__init__(layout="trie", embeddings=False, **options)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of :class:`SessionCollator`, and the rows themselves as ``rows``."""
        return {**super().__call__(rows), "rows": Rows(list(rows))}

    def named_candidates(
        self, sessions: SessionBatch, rows: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[str, list[int]]]:
        """Overridden to leave the stand-ins out, which no row names."""
        return super().named_candidates(kept_rows(sessions, sessions.is_positive())[0], rows)

    def _tokens(self, row: Any, name: str) -> dict[str, Any]:
        if isinstance(row, dict) and TOKENS[0] not in row and TEXT[0] in row:
            row = super()._tokens({TEXT[1]: [], **row, TEXT[2]: []}, name)
        if isinstance(row, dict) and TOKENS[0] in row:
            return {TOKENS[1]: [], **row, TOKENS[2]: self.stand_ins}
        return super()._tokens(row, name)


def _stand_ins(index: TrieIndex, count: int) -> list[list[int]]:
    """Some SIDs as token ids, the longest first, evenly spread so that they share little."""

    def spread(size: int, number: int) -> torch.Tensor:
        return torch.linspace(0, size - 1, min(size, number)).long()

    index = index.to("cpu")
    codes = index.sids_of(index.items[spread(index.num_items, _SEEN)])
    lengths = (codes >= 0).sum(1)
    longest = codes[lengths == lengths.max()].unique(dim=0)
    codes = longest[spread(len(longest), count)]
    ends = (codes >= 0).sum(1)
    tokens = codes if index.vocab is None else index.vocab.lookup(codes, ends)
    return [[token for token in sid if token >= 0] for sid in tokens.tolist()]
