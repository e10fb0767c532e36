"""assign_balanced against a plain loop."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext.sids import embeddings


def slow(x: Tensor, codebook: Tensor, capacity: int) -> list[int]:
    taken = [0] * len(codebook)
    codes = []
    for row in x.double():
        distances = (row - codebook.double()).square().sum(1).tolist()
        code = min((d, k) for k, d in enumerate(distances) if taken[k] < capacity)[1]
        taken[code] += 1
        codes.append(code)
    return codes


@given(
    rows=st.integers(0, 60),
    codes=st.integers(1, 19) | st.sampled_from([32, 33, 70]),
    spare=st.integers(0, 3),
    chunk=st.sampled_from([5, 100]),
)
def test_equals_a_loop(isa: str, rows: int, codes: int, spare: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(1000 * rows + codes)
    x, book = torch.randint(-3, 4, (2, max(rows, codes), 3), generator=generator).float()  # with ties, exactly
    x, book = x[:rows], book[:codes]
    capacity = max(1, -(-rows // codes) + spare)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "CHUNK", chunk)
        found = rx.sids.assign_balanced(x, book, capacity)
    assert found.tolist() == slow(x, book, capacity)
    assert torch.bincount(found, minlength=codes).max() <= capacity


def test_infinite_distances_are_distances_too(isa: str) -> None:
    distances = torch.full((3, 40), torch.inf)
    distances[1, 35] = 1
    room = torch.ones(1, 40, dtype=torch.int32)
    room[0, 0] = 0
    assert torch.ops.raddpo.assign_balanced(distances, room, None).tolist() == [1, 35, 2]
    assert torch.ops.raddpo.assign_balanced(distances, torch.zeros_like(room), None).tolist() == [-1, -1, -1]


def test_without_need_it_is_encode() -> None:
    x, book = torch.randn(2, 100, 5, generator=torch.Generator().manual_seed(0))
    codes = rx.sids.encode(x, rx.sids.Codebooks((book,)))[:, 0]
    assert torch.equal(rx.sids.assign_balanced(x, book, 100), codes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(capacity=1), ValueError, "capacity must be at least 2 for 4 rows, got 1"),
        (dict(capacity=0), ValueError, "capacity must be at least 1, got 0"),
        (dict(codebook=torch.zeros(3, 3)), ValueError, "x must have the codebook's 3 columns, got 2"),
        (dict(x=torch.full((4, 2), torch.inf)), ValueError, "x[0] must be finite"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    usual: dict[str, Any] = dict(x=torch.zeros(4, 2), codebook=torch.zeros(3, 2), capacity=2)
    with pytest.raises(error, match=re.escape(message)):
        rx.sids.assign_balanced(**usual | arguments)


@pytest.mark.parametrize(
    ("distances", "room", "groups", "message"),
    [
        (torch.zeros(2, 3), torch.ones(1, 2).int(), None, "distances must have shape"),
        (torch.zeros(2, 3).double(), torch.ones(1, 3).int(), None, "distances must be contiguous"),
        (torch.zeros(2, 3), torch.ones(1, 3), None, "room must be contiguous"),
        (torch.zeros(2, 3), torch.ones(1, 3).int(), torch.tensor([0, 1]), "groups[1] must be in [0, 1), got 1"),
        (torch.zeros(2, 3), torch.ones(1, 3).int(), torch.tensor([0]), "groups must be contiguous"),
    ],
)
def test_the_operator_refuses(distances: Tensor, room: Tensor, groups: Tensor | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.ops.raddpo.assign_balanced(distances, room, groups)
