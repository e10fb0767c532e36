"""Residual k-means: codebooks, and the codes of embeddings."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.beam_cases import generator_of
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext.sids import embeddings

BOOKS = rx.sids.Codebooks((torch.tensor([[0.0, 0.0], [4.0, 4.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])))


def blobs(rows: int, dim: int, seed: int, centres: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    middle = 4 * torch.randn(centres, dim, generator=generator)
    return middle[torch.arange(rows) % centres] + torch.randn(rows, dim, generator=generator)


@pytest.fixture(params=["faiss", "torch"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """K-means by faiss, and as if faiss were not installed."""
    if request.param == "faiss":
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    return str(request.param)


@pytest.mark.parametrize("chunk", [7, 1 << 14])
@pytest.mark.parametrize("forced", [False, True])
def test_codes_are_the_nearest_level_by_level(chunk: int, forced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "CHUNK", chunk)
    x = blobs(50, 6, 0)
    books = rx.sids.Codebooks((blobs(5, 6, 1), blobs(9, 6, 2), blobs(3, 6, 3)))
    given = torch.randint(-1, 3, (50, 3), generator=torch.Generator().manual_seed(0)) if forced else None
    sids = rx.sids.encode(x, books, given)
    for row, codes in zip(x.double(), sids.tolist(), strict=True):
        index = len(sids) and next(i for i in range(50) if torch.equal(x[i].double(), row))
        for level, (book, code) in enumerate(zip(books.levels, codes, strict=True)):
            wanted = -1 if given is None else int(given[index, level])
            distances = (row - book.double()).square().sum(1)
            assert code == (wanted if wanted >= 0 else int(distances.argmin()))
            row = row - book[code].double()
    assert torch.equal(rx.sids.encode(x.numpy(), books, given), sids)
    assert rx.sids.encode(x[:0], books).shape == (0, 3)


@pytest.mark.parametrize("kind", ["tensor", "array", "read-only"])
def test_embeddings_are_not_written_to(kind: str) -> None:
    x = blobs(60, 3, 0)
    x[30:] = x[:30]  # so that items collide
    kept: Any = x.clone() if kind == "tensor" else x.numpy().copy()
    if kind == "read-only":
        kept.setflags(write=False)
    forced = torch.full((60, 2), -1)
    forced[:, 1] = torch.arange(60) % 3
    books = rx.sids.fit_residual_kmeans(kept, [4, 3], seed=0, forced=forced)
    sids = rx.sids.encode(kept, books)
    for mode in ("nearest_free", "extra_level"):
        rx.sids.resolve_collisions(sids, kept, books, mode)
    rx.sids.assign_balanced(kept, books.levels[0], 15)
    assert np.array_equal(np.asarray(kept), x.numpy())


def test_ties_go_to_the_lower_code() -> None:
    books = rx.sids.Codebooks((torch.tensor([[1.0], [-1.0], [1.0]]),))
    assert rx.sids.encode(torch.tensor([[0.0], [1.0], [-2.0]]), books).tolist() == [[0], [0], [1]]


def test_each_level_lowers_the_error_and_a_seed_gives_the_same() -> None:
    x = blobs(3000, 8, 0)
    books = rx.sids.fit_residual_kmeans(x, [40, 16, 8], seed=3)
    sids = rx.sids.encode(x, books)
    left, errors = x.clone(), [float(x.var(0).sum())]
    for level, book in enumerate(books.levels):
        left -= book[sids[:, level]]
        errors.append(float(left.square().sum(1).mean()))
    assert errors[1] < 0.5 * errors[0]
    assert errors == sorted(errors, reverse=True)
    again = rx.sids.fit_residual_kmeans(x.numpy(), [40, 16, 8], seed=3)
    assert all(map(torch.equal, again.levels, books.levels))
    other = rx.sids.fit_residual_kmeans(x, [40, 16, 8], seed=4)
    assert not torch.equal(other.levels[0], books.levels[0])


def test_means_are_those_of_the_clusters() -> None:
    """As many codes as far-apart blobs: each vector is the mean of its rows."""
    random = generator_of(0)
    x = torch.cat([torch.full((10, 2), float(100 * k)) + torch.rand(10, 2, generator=random) for k in range(3)])
    book = rx.sids.fit_residual_kmeans(x, [3], seed=1).levels[0]
    codes = rx.sids.encode(x, rx.sids.Codebooks((book,)))[:, 0]
    for code in codes.unique():
        torch.testing.assert_close(book[code], x[codes == code].mean(0), rtol=1e-4, atol=1e-3)


def test_given_codes_have_the_means_of_all_their_rows() -> None:
    x = blobs(3000, 4, 0)
    categories = torch.arange(3000) % 3
    forced = torch.stack([categories, torch.full((3000,), -1)], 1)
    books = rx.sids.fit_residual_kmeans(x, [4, 8], seed=0, forced=forced)
    expected = torch.stack([x[categories == code].double().mean(0) for code in range(3)] + [torch.zeros(4).double()])
    torch.testing.assert_close(books.levels[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rx.sids.encode(x, books, forced)[:, 0], categories)
    behind = rx.sids.fit_residual_kmeans(x, [8, 4], seed=0, forced=forced.flip(1))
    left = x - behind.levels[0][rx.sids.encode(x, behind, forced.flip(1))[:, 0]]
    torch.testing.assert_close(behind.levels[1][0], left[categories == 0].mean(0), rtol=1e-4, atol=1e-4)


def test_given_codes_are_subtracted_though_others_are_nearer() -> None:
    x = torch.tensor([0.0, 10.0, 6.0, 16.0])[:, None].repeat(10, 1)  # two categories, at 5 and 11 on average
    x += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    forced = torch.tensor([[0, -1], [0, -1], [1, -1], [1, -1]]).repeat(10, 1)
    books = rx.sids.fit_residual_kmeans(x, [2, 2], seed=0, forced=forced)
    torch.testing.assert_close(books.decode(rx.sids.encode(x, books, forced)), x, rtol=0, atol=0.5)


def test_duplicates_and_zero_rows_leave_codes_unused() -> None:
    x = torch.zeros(20, 3)
    x[10:] = 1
    books = rx.sids.fit_residual_kmeans(x, [4], seed=0)
    sids = rx.sids.encode(x, books)
    assert len(sids.unique()) == 2
    torch.testing.assert_close(books.decode(sids), x, rtol=0, atol=1e-3)


def test_progress_runs_to_1() -> None:
    seen: list[float] = []
    rx.sids.fit_residual_kmeans(blobs(20, 2, 0), [2, 2], seed=0, progress=seen.append)
    assert seen == [0.5, 1.0]


NAN = torch.tensor([[0.0, 0.0], [0.0, float("nan")]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=[[0.0]]), TypeError, "x must be a tensor or a numpy array, got list"),
        (dict(x=torch.zeros(4, 2, dtype=torch.int64)), TypeError, "x must be a float32"),
        (dict(x=np.zeros((4, 2), int)), TypeError, "x must hold floating-point numbers, got int64"),
        (dict(x=torch.zeros(4)), ValueError, r"x must have shape [N, D] with D at least 1, got (4,)"),
        (dict(x=NAN), ValueError, "x[1] must be finite in float32"),
        (dict(x=np.array([[1e300, 0.0], [0.0, 0.0]])), ValueError, "x[0] must be finite in float32"),
        (dict(x=torch.full((4, 1), 1e20)), ValueError, "x[0] must be finite in float32, squared too"),
        (dict(x=torch.full((4, 2), 1e20)), ValueError, "x[0] must be finite in float32, squared too"),
        (dict(sizes=[]), ValueError, "sizes must have at least one level"),
        (dict(sizes=[2, 0]), ValueError, "sizes[1] must be at least 1, got 0"),
        (dict(sizes=[5]), ValueError, "sizes must be at most the number of rows of x, 4, got 5"),
        (dict(seed=-1), ValueError, "seed must be at least 0, got -1"),
        (dict(forced=torch.zeros(4, 1)), TypeError, "forced must be an int64 tensor"),
        (dict(forced=torch.full((4, 1), 2)), ValueError, "forced[:, 0] must be in [-1, 1], got 2"),
        (dict(forced=torch.tensor([[0], [0], [-1], [0]])), ValueError, "forced[:, 0] must give the codes of all rows"),
        (dict(forced=torch.zeros(3, 1).long()), ValueError, "forced must have one row per row of x (4), got 3"),
    ],
)
def test_bad_arguments_of_fit(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    usual: dict[str, Any] = dict(x=torch.zeros(4, 2), sizes=[2], seed=0)
    with pytest.raises(error, match=re.escape(message)):
        rx.sids.fit_residual_kmeans(**usual | arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=NAN), ValueError, "x[1] must be finite in float32"),
        (dict(x=torch.zeros(4, 3)), ValueError, "x must have the codebooks' 2 columns, got 3"),
        (dict(codebooks=BOOKS.levels), TypeError, "codebooks must be a Codebooks, got tuple"),
        (dict(forced=torch.zeros(4, 1).long()), ValueError, "forced must have shape [N, 2], got (4, 1)"),
        (dict(forced=torch.full((4, 2), 2)), ValueError, "forced[:, 0] must be in [-1, 1], got 2"),
    ],
)
def test_bad_arguments_of_encode(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rx.sids.encode(**dict(x=torch.zeros(4, 2), codebooks=BOOKS) | arguments)


def test_codebooks_are_saved_whole(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "codebooks.safetensors"
    BOOKS.save(path)
    assert all(map(torch.equal, rx.sids.Codebooks.load(path).levels, BOOKS.levels))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    content = path.read_bytes()
    for damaged in (content[:40], content[:-1], b"", b"x" * 100, content.replace(b"level_1", b"level_2")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{path}: holds no codebooks")):
            rx.sids.Codebooks.load(path)
    path.write_bytes(content[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(ValueError, match=r"must be finite"):
        rx.sids.Codebooks.load(path)
    with pytest.raises(FileNotFoundError):
        rx.sids.Codebooks.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        ((), ValueError, "levels must hold at least one codebook"),
        ((torch.zeros(2, 2).double(),), TypeError, "levels[0] must be a float32 tensor, got torch.float64"),
        ((torch.zeros(2),), ValueError, "levels[0] must have shape [codes, D], got (2,)"),
        ((torch.zeros(2, 2), torch.zeros(2, 3)), ValueError, "levels[1] must have shape [codes, 2], got (2, 3)"),
        ((NAN,), ValueError, "levels[0] must be finite"),
        ((torch.full((1, 1), -1e20),), ValueError, "levels[0] must be finite, squared too"),
    ],
)
def test_bad_codebooks(levels: tuple[Tensor, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rx.sids.Codebooks(levels)


def test_new_items_join_a_live_index() -> None:
    x = blobs(200, 4, 0)
    books = rx.sids.fit_residual_kmeans(x, [8, 8, 8], seed=0)
    vocab = rx.SIDVocab([8, 8, 8])
    index = rx.TrieIndex.build(rx.sids.encode(x, books), vocab=vocab)
    new = rx.sids.encode(x[:3] + 0.01, books)
    grown = index.add(new, item_ids=[1000, 1001, 1002])
    for sid, item in zip(new.tolist(), (1000, 1001, 1002), strict=True):
        assert item in grown.lookup([sid]).items.tolist()
