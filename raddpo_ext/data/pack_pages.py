"""pack_pages: a session's candidates as one page, in which each sees the prompt and the candidates before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext.data.pack_sessions import PackedSessions, pack_sessions
from raddpo_ext.losses.session import SessionBatch

IGNORED = -100  # a target that the loss leaves out, as in linear_token_logps


def pack_pages(
    prompts: Sequence[Any], sessions: SessionBatch, separator: int | None, **options: Any
) -> tuple[PackedSessions, Tensor, Tensor]:
    """Pack each session's prompt and its page, ``item <separator> item ...``, into one row.

    Args:
        prompts: see :func:`raddpo_ext.pack_sessions`.
        sessions: the items of the pages in their order, each of at least one token, on the CPU.
        separator: token id between two items, or None to put them side by side.
        options: see :func:`raddpo_ext.pack_sessions`; a page is one candidate there.

    Returns:
        The rows, whose ``sessions`` are the items: the state that predicts an item's token has seen the page before it.
        There are no last tokens. Then, for the items and the separators behind them, the token ids ``[C, L + 1]``,
        -100 beyond, and the index in ``distinct`` of the state that predicts each: int64 ``[C, L + 1]``.

    Raises:
        ValueError, TypeError: see :func:`raddpo_ext.pack_sessions`.
    """
    # Where each item begins in its page; all but the last have a separator behind them.
    owners, sizes = sessions.owners(), sessions.offsets.diff()
    separated = torch.ones(sessions.num_candidates, dtype=torch.bool)
    separated[sessions.offsets[1:][sizes > 0] - 1] = False
    if separator is None:
        separated[:] = False
    widths = sessions.lengths + separated
    ends = F.pad(widths.cumsum(0), (1, 0))
    page_begins, page_lengths = ends[sessions.offsets[:-1]], ends[sessions.offsets].diff()
    columns = torch.arange(sessions.tokens.shape[1] + 1)
    places = (ends[:-1] - page_begins[owners])[:, None] + columns
    # The items with their separators, and the pages, which are the candidates of a batch. An empty one is none.
    within = columns < widths[:, None]
    tokens = F.pad(sessions.tokens, (0, 1))
    if separator is not None:
        tokens[separated, sessions.lengths[separated]] = separator
    has_page = sizes > 0
    page = (has_page.cumsum(0) - 1)[owners][:, None].expand_as(places)
    pages = torch.zeros((int(has_page.sum()), max(1, int(page_lengths.max()) if len(sizes) else 1)), dtype=torch.int64)
    pages[page[within], places[within]] = tokens[within]
    batch = SessionBatch(pages, page_lengths[has_page], F.pad(has_page.cumsum(0), (1, 0)), has_page.long())
    packed = pack_sessions(prompts, batch, embeddings=False, **options)
    # The states that predict the items' tokens and the separators; beyond, the prompt's last one.
    predictors = packed.predictors
    last_of_prompt = predictors[page[:, :1], 0]
    found = torch.where(within, predictors[page, places.clamp(max=pages.shape[1] - 1)], last_of_prompt)
    distinct, rows = torch.cat((found, last_of_prompt), 1).unique(return_inverse=True)
    item_rows = torch.where(sessions.mask(), rows[:, :-2], rows[:, -1:])
    packed = replace(packed, sessions=sessions, distinct=distinct, rows=item_rows, last_tokens=None)
    return packed, tokens.masked_fill(~within, IGNORED), rows[:, :-1]
