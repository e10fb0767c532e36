"""The same purchases under SIDs of our own: the items' embeddings come from what is bought together."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext.data.catalogue import Catalogue, load_catalogue

SIZES = (256, 256, 256, 256)  # as the given SIDs of Instruments
DIMENSIONS = 64
REACH = 5  # purchases that count as together with one, on each side
ROOM = 1.25  # codes of a level that balanced ones may have, over an even share
SEED = 0


@cache
def catalogue(folder: Path, kind: str) -> Catalogue:
    """``kind``: ``"given"``, ``"own"`` (residual k-means), or ``"balanced"`` (the same, no code much used)."""
    given = load_catalogue(folder)
    if kind == "given":
        return given
    x = embeddings(given.train, len(given.sids))
    books = rx.sids.fit_residual_kmeans(x, SIZES, seed=SEED)
    sids = rx.sids.encode(x, books) if kind == "own" else _balanced(x, books)
    resolved = rx.sids.resolve_collisions(sids, x, books)
    if resolved.lengths is not None:
        raise ValueError(f"{folder}: SIDs of {kind} codes need a further level, which the experiment's model lacks")
    return replace(given, sids=resolved.sids.numpy(), sizes=SIZES)


def embeddings(sequences: list[list[int]], items: int) -> Tensor:
    """Factors of the items' positive pointwise mutual information within ``REACH`` purchases: float32 ``[N, 64]``."""
    from scipy.sparse import coo_matrix
    from sklearn.decomposition import TruncatedSVD

    pairs = [
        np.stack((items_[:-reach], items_[reach:]))
        for items_ in map(np.array, sequences)
        for reach in range(1, min(REACH, len(items_) - 1) + 1)
    ]
    one, other = np.concatenate(pairs, 1)
    counts = coo_matrix((np.ones(len(one)), (one, other)), (items, items))
    counts = (counts + counts.T).tocoo()
    counts.sum_duplicates()
    totals = np.asarray(counts.sum(1))[:, 0]
    information = np.log(counts.data * totals.sum() / (totals[counts.row] * totals[counts.col]))
    table = coo_matrix((np.maximum(information, 0), (counts.row, counts.col)), counts.shape)
    return torch.from_numpy(TruncatedSVD(DIMENSIONS, random_state=SEED).fit_transform(table.tocsr())).float()


def _balanced(x: Tensor, books: rx.sids.Codebooks) -> Tensor:
    """Codes of which none has more than ``ROOM`` times its even share of the items: int64 ``[N, L]``."""
    left, codes = x.clone(), []
    for book in books.levels:
        codes.append(rx.sids.assign_balanced(left, book, int(ROOM * len(x) / len(book)) + 1))
        left -= book[codes[-1]]
    return torch.stack(codes, 1)
