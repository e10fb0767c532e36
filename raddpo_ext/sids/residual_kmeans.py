"""Residual k-means: codes that name an item's cluster, then the cluster of what is left, and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext._matmul import linear
from raddpo_ext.sids import embeddings
from raddpo_ext.sids.codebooks import Codebooks, check_codes

_ITERATIONS = 25
_ROWS_PER_CODE = 256  # more do not move the means by much


def fit_residual_kmeans(
    x: Tensor | np.ndarray,
    sizes: Sequence[int],
    *,
    seed: int,
    forced: Tensor | None = None,
    progress: Callable[[float], None] | None = None,
) -> Codebooks:
    """Codebooks, each by k-means on what the levels before it leave of the embeddings.

    K-means runs on at most 256 rows per code, drawn by ``seed``: by faiss where it is installed, else in torch. The
    result is the same for the same seed, versions and number of threads. Codes that no row of the sample is nearest to,
    which duplicates can cause, stay unused.

    Args:
        x: floating-point ``[N, D]`` on the CPU, such as ``numpy.load(path, mmap_mode="r")``; read in chunks.
        sizes: codes per level, each at most ``N``.
        seed: of the draw of rows and of the first means; at least 0.
        forced: int64 ``[N, L]``, codes that are given, such as a category; -1 where they are not. A level's codes are
            given for all rows or for none. The vector of a given code is the mean of its rows; of a code without a row
            it is 0.
        progress: called with the share of the work that is done, from 0 to 1.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0]])
        >>> books = rx.sids.fit_residual_kmeans(x, [4, 2], seed=0)
        >>> sids = rx.sids.encode(x, books)
        >>> len(sids[:, 0].unique()), torch.allclose(books.decode(sids), x)
        (4, True)
    """
    embeddings.check_embeddings(x)
    counts = [_check.integer(size, f"sizes[{level}]", 1) for level, size in enumerate(sizes)]
    if not counts:
        raise ValueError("sizes must have at least one level")
    if max(counts) > len(x):
        raise ValueError(f"sizes must be at most the number of rows of x, {len(x)}, got {max(counts)}")
    _check.integer(seed, "seed", 0, 2**31 - 1)
    given = _given_levels(forced, len(x), counts)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator)[: _ROWS_PER_CODE * max(counts)].sort().values
    residual = embeddings.rows_of(x, rows)
    books: list[Tensor] = []
    for level, size in enumerate(counts):
        if given[level]:
            assert forced is not None
            books.append(_means(x, books, forced, level, size))
        else:
            books.append(_kmeans(residual, size, seed + level))
        residual -= books[-1][Level.of(books[-1]).codes(residual, None if forced is None else forced[rows, level])]
        if progress is not None:
            progress((level + 1) / len(counts))
    return Codebooks(tuple(books))


def encode(x: Tensor | np.ndarray, codebooks: Codebooks, forced: Tensor | None = None) -> Tensor:
    """The codes of each row: level by level the nearest to what is left, ties to the lower code.

    Distances are float32. New items are encoded by the codebooks of the old ones.

    Args:
        x: floating-point ``[N, D]`` on the CPU; read in chunks.
        codebooks: of ``L`` levels.
        forced: int64 ``[N, L]``, codes that are taken as they are, -1 where the nearest is; their vectors are
            subtracted all the same.

    Returns:
        int64 ``[N, L]``.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> books = rx.sids.Codebooks((torch.tensor([[0.0], [10.0]]), torch.tensor([[-1.0], [0.0], [1.0]])))
        >>> rx.sids.encode(torch.tensor([[9.0], [0.2]]), books)
        tensor([[1, 0],
                [0, 1]])
    """
    embeddings.check_embeddings(x)
    _check.instance(codebooks, "codebooks", Codebooks)
    if x.shape[1] != codebooks.dim:
        raise ValueError(f"x must have the codebooks' {codebooks.dim} columns, got {x.shape[1]}")
    if forced is not None:
        _check_forced(forced, len(x), codebooks.sizes)
    sids = torch.empty(len(x), len(codebooks.sizes), dtype=torch.int64)
    levels = [*map(Level.of, codebooks.levels)]
    # The residuals of every chunk use the same memory: fresh memory would cost more than the subtraction.
    left, vectors = torch.empty(2, min(embeddings.CHUNK, len(x)), codebooks.dim)
    for rows, residual in embeddings.chunks(x):
        count = len(residual)
        for number, level in enumerate(levels):
            codes = level.codes(residual, None if forced is None else forced[rows, number])
            sids[rows, number] = codes
            if number + 1 < len(levels):
                torch.index_select(level.book, 0, codes, out=vectors[:count])
                residual = torch.sub(residual, vectors[:count], out=left[:count])
    return sids


class Level(NamedTuple):
    """A level's vectors, -2 times them, their squares, and room for any number of rows.

    ``[K, D]``, ``[K, D]``, ``[K]`` and ``[1, K]``.
    """

    book: Tensor
    scaled: Tensor
    squares: Tensor
    room: Tensor

    @classmethod
    def of(cls, book: Tensor) -> Level:
        return cls(book, -2 * book, book.square().sum(1), torch.full((1, len(book)), 2**31 - 1, dtype=torch.int32))

    def distances(self, residual: Tensor) -> Tensor:
        """Squared distances ``[n, K]`` less each row's own square, which changes no comparison."""
        return linear(residual, self.scaled, self.squares)

    def codes(self, residual: Tensor, forced: Tensor | None = None) -> Tensor:
        """The nearest code of each row, the first of equal ones, or the one of ``forced``, int64 ``[n]``, if it is not
        -1."""
        if forced is None:
            # With room in every code this is argmin, in a third of its time.
            codes: Tensor = torch.ops.raddpo.assign_balanced(self.distances(residual), self.room, None)
            return codes
        codes = forced.clone()
        free = (codes < 0).nonzero()[:, 0]
        codes[free] = self.codes(residual[free])
        return codes


def _means(x: Tensor | np.ndarray, books: list[Tensor], forced: Tensor, level: int, size: int) -> Tensor:
    """The mean, per given code of a level, of what the levels before it leave of all rows."""
    sums, counts = torch.zeros(size, x.shape[1], dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    levels = [*map(Level.of, books)]
    for rows, residual in embeddings.chunks(x):
        for number, before in enumerate(levels):
            residual = residual - before.book[before.codes(residual, forced[rows, number])]
        sums.index_add_(0, forced[rows, level], residual.double())
        counts += torch.bincount(forced[rows, level], minlength=size)
    return (sums / counts.clamp(min=1)[:, None]).float()


def _given_levels(forced: Tensor | None, rows: int, sizes: Sequence[int]) -> list[bool]:
    if forced is None:
        return [False] * len(sizes)
    _check_forced(forced, rows, tuple(sizes))
    given = (forced >= 0).all(0)
    for level in range(len(sizes)):
        if not given[level] and bool((forced[:, level] >= 0).any()):
            raise ValueError(f"forced[:, {level}] must give the codes of all rows or, as -1, of none")
    return given.tolist()


def _check_forced(forced: Tensor, rows: int, sizes: tuple[int, ...]) -> None:
    check_codes(forced, "forced", sizes, minimum=-1)
    if len(forced) != rows:
        raise ValueError(f"forced must have one row per row of x ({rows}), got {len(forced)}")


def _kmeans(x: Tensor, size: int, seed: int) -> Tensor:
    """The means of ``size`` clusters: float32 ``[size, D]``."""
    try:
        import faiss
    except ImportError:
        return _lloyd(x, size, seed)
    kmeans = faiss.Kmeans(
        x.shape[1],
        size,
        niter=_ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x),
    )
    kmeans.train(x.numpy())
    return torch.tensor(kmeans.centroids)


def _lloyd(x: Tensor, size: int, seed: int) -> Tensor:
    """Lloyd's algorithm from rows drawn at random. An empty cluster gets the row farthest from its mean."""
    book = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:size]].clone()
    for _ in range(_ITERATIONS):
        distances, codes = Level.of(book).distances(x).min(1)
        counts = torch.bincount(codes, minlength=size)
        sums = torch.zeros_like(book).index_add_(0, codes, x)
        book = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], book)
        empty = (counts == 0).nonzero()[:, 0]
        farthest = (distances + x.square().sum(1)).topk(len(empty)).indices
        book[empty] = x[farthest]
    return book
