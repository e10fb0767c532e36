"""Metrics of constrained retrieval for packed sessions: searches with their prompts, compares with their positives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from raddpo_ext.data.metrics import retrieval_metrics
from raddpo_ext.data.pack_sessions import PackedSessions
from raddpo_ext.index.trie import TrieIndex
from raddpo_ext.integrations.retriever import SIDRetriever
from raddpo_ext.losses.session import SessionBatch


def retrieval_names(ks: Sequence[int]) -> list[str]:
    """The names of the metrics of :func:`retrieval_rows`: those of SIDs, then those of items."""
    names = [f"{kind}@{k}" for k in ks for kind in ("recall", "ndcg")] + ["mrr"]
    return [f"{level}_{name}" for level in ("sid", "item") for name in names]


def retrieval_rows(retriever: SIDRetriever, packed: PackedSessions, items: Tensor | None, ks: Sequence[int]) -> Tensor:
    """Search with each prompt, and compare the results with the session's positives.

    Args:
        retriever: a retriever whose model is in evaluation mode.
        packed: the sessions.
        items: int64 ``[S, P]`` item ids of the positives, padded with -1, or None.
        ks: see :func:`raddpo_ext.data.metrics.retrieval_metrics`.

    Returns:
        float64 ``[S, 2 * len(retrieval_names(ks))]``: each metric and 1, or 0 and 0 for a session without positives.
    """
    # The SIDs found, as token ids.
    index, found = retriever.index, retriever.retrieve(*packed.prompts())
    lengths = (found.sids >= 0).sum(-1)
    codes, ends = found.sids.flatten(0, 1), lengths.flatten()
    tokens = codes if index.vocab is None else index.vocab.lookup(codes, ends)
    tokens = tokens.masked_fill(ends[:, None] == 0, -1).unflatten(0, lengths.shape)
    # Compared with the positives by SID: both padded to one number of levels.
    wanted = _positives(packed.sessions)
    width = max(tokens.shape[-1], wanted.shape[-1])
    found_sids, wanted = (F.pad(sids, (0, width - sids.shape[-1]), value=-1) for sids in (tokens, wanted))
    columns = _columns("sid", found_sids, wanted, (wanted >= 0).any(-1).any(-1), ks)
    # Compared by item.
    if items is None:
        items = torch.full((packed.sessions.num_sessions, 1), -1, device=codes.device)
    columns |= _columns("item", _items(index, codes, ends, lengths), items, (items >= 0).any(-1), ks)
    return torch.stack([part for name in retrieval_names(ks) for part in columns[name]], 1)


def _columns(
    level: str, found: Tensor, wanted: Tensor, has: Tensor, ks: Sequence[int]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each metric's values and weights ``[S]``, float64. ``has``: bool ``[S]``, which sessions have positives."""
    columns = {}
    for name, values in retrieval_metrics(found[has], wanted[has], ks).items():
        whole = torch.zeros(len(has), dtype=torch.float64, device=has.device)
        whole[has] = values.double()
        columns[f"{level}_{name}"] = whole, has.double()
    return columns


def _positives(sessions: SessionBatch) -> Tensor:
    """The positives' tokens, int64 ``[S, P, L]``, padded with -1."""
    candidates, levels = sessions.tokens.shape
    session, chosen = sessions.owners(), sessions.is_positive()
    place = torch.arange(candidates, device=sessions.device) - sessions.offsets[session]
    most = int(sessions.num_positives.max()) if sessions.num_sessions else 0
    wanted = sessions.tokens.new_full((sessions.num_sessions, most, levels), -1)
    wanted[session[chosen], place[chosen]] = sessions.tokens.masked_fill(~sessions.mask(), -1)[chosen]
    return wanted


def _items(index: TrieIndex, codes: Tensor, ends: Tensor, lengths: Tensor) -> Tensor:
    """The first ``R`` items of the ``R`` SIDs found, in the order of the SIDs: ``[B, R]``, padded with -1."""
    # Where the items of each SID begin among those of its query.
    items, offsets = index.lookup(codes.clamp(min=0), ends)
    counts = torch.where(ends > 0, offsets.diff(), 0).view(lengths.shape)
    begins = counts.cumsum(1) - counts
    owner = torch.repeat_interleave(offsets.diff())  # of each item: the SID, in [0, B * R)
    place = begins.flatten()[owner] + torch.arange(len(items), device=items.device) - offsets[owner]
    # Scatter those that fit into R places.
    kept = (place < lengths.shape[1]) & (ends[owner] > 0)
    found = torch.full_like(lengths, -1)
    found[torch.div(owner[kept], lengths.shape[1], rounding_mode="floor"), place[kept]] = items[kept]
    return found
