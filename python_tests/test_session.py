"""The layout of sessions: its pairs, its masks and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.session_cases import build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import raddpo_ext as rx
from raddpo_ext import reference
from raddpo_ext.losses import session

Sessions = list[tuple[int, int]]  # positives and negatives of each

COUNTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=6)


def parts(counts: Sessions, levels: int = 3) -> dict[str, Tensor]:
    """Arguments of a batch whose token ids are all different and whose lengths run from 0 to ``levels``."""
    sizes = [positives + negatives for positives, negatives in counts]
    candidates = sum(sizes)
    return {
        "tokens": torch.arange(candidates * levels).reshape(candidates, levels),
        "lengths": torch.arange(candidates) % (levels + 1),
        "offsets": torch.tensor([0, *np.cumsum(sizes).tolist()]),
        "num_positives": torch.tensor([positives for positives, _ in counts], dtype=torch.int64),
    }


def loop_pairs(counts: Sessions) -> tuple[list[tuple[int, int]], list[int]]:
    """The pairs, and how many there are before each session and in all."""
    pairs: list[tuple[int, int]] = []
    before, start = [0], 0
    for positives, negatives in counts:
        for positive in range(positives):
            for negative in range(negatives):
                pairs.append((start + positive, start + positives + negative))
        start += positives + negatives
        before.append(len(pairs))
    return pairs, before


@given(COUNTS)
def test_pairs_equal_the_loop(counts: Sessions) -> None:
    batch = rx.SessionBatch(**parts(counts))
    pairs, before = loop_pairs(counts)
    positives, negatives = batch.pairs()
    assert list(zip(positives.tolist(), negatives.tolist(), strict=True)) == pairs
    assert positives.dtype == negatives.dtype == torch.int64
    assert batch.pair_offsets.tolist() == before
    assert batch.num_pairs == len(pairs)
    assert batch.num_sessions == len(counts)
    assert batch.num_candidates == sum(map(sum, counts))


@given(COUNTS, st.integers(0, 3))
def test_mask_equals_the_loop(counts: Sessions, levels: int) -> None:
    batch = rx.SessionBatch(**parts(counts, levels))
    expected = [[level < length for level in range(levels)] for length in batch.lengths.tolist()]
    assert batch.mask().tolist() == expected
    assert batch.mask().shape == batch.tokens.shape


@given(COUNTS, st.data())
def test_select_equals_the_loop(counts: Sessions, data: st.DataObject) -> None:
    batch = rx.SessionBatch(**parts(counts))
    keep = data.draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)))
    selected, rows = batch.select(torch.tensor(keep, dtype=torch.bool))
    kept = [session for session, keeps in enumerate(keep) if keeps]
    offsets = batch.offsets.tolist()
    expected = [row for session in kept for row in range(offsets[session], offsets[session + 1])]
    assert rows.tolist() == expected
    assert rows.dtype == torch.int64
    assert selected.tokens.tolist() == [batch.tokens[row].tolist() for row in expected]
    assert selected.lengths.tolist() == [int(batch.lengths[row]) for row in expected]
    assert selected.num_positives.tolist() == [counts[session][0] for session in kept]
    assert selected.offsets.tolist() == [0, *np.cumsum([sum(counts[session]) for session in kept]).tolist()]
    assert selected.num_pairs == sum(counts[session][0] * counts[session][1] for session in kept)
    assert selected.pair_offsets.tolist() == loop_pairs([counts[session] for session in kept])[1]


class Reads(TorchDispatchMode):
    """Counts the operators that would wait for a GPU: their result is a number, or its size depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.count += (
            name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
            or (name == "aten::repeat_interleave.Tensor" and "output_size" not in kwargs)
            or (name == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1]))
        )
        return func(*args, **(kwargs or {}))


def test_select_synchronises_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = rx.SessionBatch(**parts([(2, 3), (0, 1), (1, 1)]))
    monkeypatch.setattr(session, "SessionBatch", lambda *given, num_pairs: (*given, num_pairs))  # reads, on the CPU
    lists, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(tensor) or tolist(tensor))
    with Reads() as reads:
        (*_, num_pairs), rows = batch.select(torch.tensor([True, False, True]))
    assert (len(lists), reads.count, num_pairs) == (1, 0, 7)
    assert rows.tolist() == [0, 1, 2, 3, 4, 6, 7]
    with Reads() as reads:
        batch.tokens[batch.lengths > 0].nonzero()
        torch.repeat_interleave(batch.lengths)
        int(batch.lengths[0])
    assert reads.count == 4


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ([True, False], TypeError, "keep must be a Tensor, got list"),
        (torch.tensor([1, 0]), ValueError, "keep must be bool of shape (2,), got torch.int64 of shape (2,)"),
        (torch.tensor([True]), ValueError, "keep must be bool of shape (2,), got torch.bool of shape (1,)"),
        (
            torch.ones(2, dtype=torch.bool, device="meta"),
            ValueError,
            "keep must be on the device of the batch, cpu, got meta",
        ),
    ],
)
def test_select_refuses(keep: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rx.SessionBatch(**BATCH).select(keep)


def test_nothing_is_read_beyond_a_length() -> None:
    given = parts([(1, 2)])
    given["tokens"][torch.arange(3) >= given["lengths"][:, None]] = -100
    assert rx.SessionBatch(**given).num_pairs == 2


def test_to_another_device_keeps_everything() -> None:
    """Also the number of pairs, which the meta device could not count."""
    batch = rx.SessionBatch(**parts([(2, 3), (0, 1), (1, 1)]))
    moved = batch.to("meta")
    assert moved.device.type == moved.pair_offsets.device.type == "meta"
    assert (moved.num_pairs, moved.num_sessions, moved.num_candidates) == (7, 3, 8)
    assert [row.shape for row in moved.pairs()] == [(7,), (7,)]
    assert moved.mask().shape == (8, 3)
    same = batch.to("cpu")
    assert [row.tolist() for row in same.pairs()] == [row.tolist() for row in batch.pairs()]
    for name, value in parts([(2, 3), (0, 1), (1, 1)]).items():
        assert torch.equal(getattr(same, name), value)


def test_without_values_the_number_of_pairs_is_taken_as_given() -> None:
    given = {name: value.to("meta") for name, value in parts([(2, 3)]).items()}
    batch = rx.SessionBatch(**given, num_pairs=6)
    assert [row.shape for row in batch.pairs()] == [(6,), (6,)]
    assert repr(batch) == "SessionBatch(num_sessions=1, num_candidates=5, num_pairs=6, device='meta')"
    with pytest.raises(RuntimeError, match="meta"):  # nothing there to count
        rx.SessionBatch(**given)


def test_given_number_of_pairs() -> None:
    assert rx.SessionBatch(**parts([(2, 3), (1, 1)]), num_pairs=7).num_pairs == 7


BATCH = parts([(1, 2), (2, 0)])  # 5 candidates of 3 levels
META = torch.zeros(5, 3, dtype=torch.int64, device="meta")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"tokens": [[1, 2]]}, TypeError, "tokens must be an int64 tensor, got list"),
        ({"tokens": BATCH["tokens"].int()}, TypeError, "tokens must be an int64 tensor, got torch.int32"),
        ({"tokens": BATCH["tokens"][0]}, ValueError, "tokens must have 2 dimensions, got shape (3,)"),
        ({"lengths": BATCH["lengths"].numpy()}, TypeError, "lengths must be an int64 tensor, got ndarray"),
        ({"lengths": BATCH["lengths"].double()}, TypeError, "lengths must be an int64 tensor, got torch.float64"),
        ({"lengths": BATCH["lengths"][:, None]}, ValueError, "lengths must have 1 dimensions, got shape (5, 1)"),
        ({"offsets": (0, 3, 5)}, TypeError, "offsets must be an int64 tensor, got tuple"),
        ({"offsets": torch.tensor(0)}, ValueError, "offsets must have 1 dimensions, got shape ()"),
        ({"num_positives": None}, TypeError, "num_positives must be an int64 tensor, got NoneType"),
        (
            {"num_positives": torch.tensor([True, False])},
            TypeError,
            "num_positives must be an int64 tensor, got torch.",
        ),
        (
            {"num_positives": torch.tensor([[1, 2]])},
            ValueError,
            "num_positives must have 1 dimensions, got shape (1, 2)",
        ),
        ({"tokens": META}, ValueError, "lengths must be on the device of tokens, meta, got cpu"),
        ({"lengths": META[:, 0]}, ValueError, "lengths must be on the device of tokens, cpu, got meta"),
        ({"offsets": META[:3, 0]}, ValueError, "offsets must be on the device of tokens, cpu, got meta"),
        ({"num_positives": META[:2, 0]}, ValueError, "num_positives must be on the device of tokens, cpu, got meta"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, "lengths must have one entry per row of tokens (5), got 2"),
        (
            {"offsets": torch.tensor([0, 5])},
            ValueError,
            "offsets must have one entry more than num_positives (2), got 2",
        ),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets must have one entry more than"),
        ({"lengths": torch.tensor([1, 2, 4, 0, 0])}, ValueError, "lengths[2] = 4 is outside [0, 3]"),
        ({"lengths": torch.tensor([1, -2, 3, 0, 0])}, ValueError, "lengths[1] = -2 is outside [0, 3]"),
        ({"offsets": torch.tensor([1, 3, 5])}, ValueError, "offsets must begin with 0, got 1"),
        ({"offsets": torch.tensor([0, 3, 4])}, ValueError, "offsets must end with the number of candidates (5), got 4"),
        ({"offsets": torch.tensor([0, 6, 5])}, ValueError, "offsets must be non-decreasing: offsets[2] = 5 after 6"),
        (
            {"offsets": torch.tensor([0, 2**63 - 1, 5])},
            ValueError,
            "offsets must be non-decreasing: offsets[2] = 5 after 92233",
        ),
        (
            {"offsets": torch.tensor([0, -(2**63), 5])},
            ValueError,
            "offsets must be non-decreasing: offsets[1] = -9223372036854",
        ),
        ({"num_positives": torch.tensor([4, 0])}, ValueError, "num_positives[0] = 4 is outside [0, 3]"),
        ({"num_positives": torch.tensor([3, -1])}, ValueError, "num_positives[1] = -1 is outside [0, 2]"),
        ({"tokens": BATCH["tokens"] - 4}, ValueError, "tokens[1, 0] must be at least 0, got -1"),
        ({"num_pairs": 3}, ValueError, "num_pairs must be 2, the number of pairs, got 3"),
        ({"num_pairs": -1}, ValueError, "num_pairs must be at least 0, got -1"),
        ({"num_pairs": 2.0}, TypeError, "num_pairs must be an integer, got 2.0"),
    ],
)
def test_refuses(changed: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rx.SessionBatch(**(BATCH | changed))


def test_counts_are_what_the_mean_divides_by():
    """Against the loss itself: the mean is the sum divided by them."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        sizes = rng.integers(0, 6, 4)
        positives = np.array([rng.integers(0, size + 1) for size in sizes])
        sessions = rx.SessionBatch(
            torch.from_numpy(rng.integers(0, 2, (int(sizes.sum()), 2))),
            torch.from_numpy(rng.integers(0, 3, int(sizes.sum()))),
            torch.from_numpy(np.append(0, sizes.cumsum())),
            torch.from_numpy(positives),
        )
        logps = -torch.rand(sessions.num_candidates, 2, dtype=torch.float64)
        for policy in ("winner", "each", "pooled"):
            counts = sessions.counts(policy)
            mean, total = (
                rx.rad_dpo_loss(logps, sessions, positives=policy, reduction=reduction) for reduction in ("mean", "sum")
            )
            assert counts.dtype == torch.float64
            divisors = counts.clamp(min=1)
            torch.testing.assert_close(mean.preference * divisors[0], total.preference)
            torch.testing.assert_close(mean.sft * divisors[1], total.sft)
            assert (float(total.preference) == 0) == (float(counts[0]) == 0)
    with pytest.raises(ValueError, match="positives must be one of 'winner', 'each', 'pooled', got 'all'"):
        sessions.counts("all")


def test_counts_can_be_reduced() -> None:
    """Gloo adds up the wrong entries of a tensor that is not contiguous, without an error."""
    assert rx.SessionBatch(**parts([(2, 3), (1, 2)])).counts().is_contiguous()


def test_kept_pairs_and_counts_of_strided_tokens() -> None:
    given = parts([(2, 3), (1, 2)])
    plain, strided = rx.SessionBatch(**given), rx.SessionBatch(**(given | {"tokens": given["tokens"].T.contiguous().T}))
    assert not strided.tokens.is_contiguous()
    assert torch.equal(strided.kept_pairs("each"), plain.kept_pairs("each"))
    assert torch.equal(strided.counts("each"), plain.counts("each"))


def test_kept_pairs_leave_out_weights_of_zero():
    sessions = rx.SessionBatch(**parts([(2, 3), (1, 2)]) | {"lengths": torch.full((8,), 3)})
    weights = torch.ones(sessions.num_pairs)
    weights[0] = 0
    kept = sessions.kept_pairs("each")
    assert bool(kept[0])
    assert torch.equal(sessions.kept_pairs("each", weights), kept & (weights > 0))


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("policy", ["winner", "each", "pooled"])
def test_kept_pairs_are_those_of_the_reference(policy: str, weigh: bool) -> None:
    for seed in range(6):
        case = build([(2, 4), (0, 3), (3, 5), (1, 9), (2, 0)], 3, seed)
        weights = case.pair_weights if weigh else None
        logps = case.logps.nan_to_num(0.0)
        expected = reference.rad_dpo_loss(logps, case.sessions, positives=policy, pair_weights=weights)
        assert 0 < expected.kept.sum() < len(expected.kept)
        assert torch.equal(case.sessions.kept_pairs(policy, weights), expected.kept)
        if not weigh:
            assert torch.equal(case.sessions.counts(policy), expected.totals[:2, 1])


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(3), ValueError, "pair_weights must have shape (8,), got (3,)"),
        (torch.ones(8, device="meta"), ValueError, "pair_weights must be on cpu, got meta"),
        (torch.ones(8, dtype=torch.int64), TypeError, "pair_weights must be a float32, bfloat16, float16 or float64"),
        (torch.tensor([1.0, -1, *[1.0] * 6]), ValueError, "pair_weights[1] must be finite and at least 0, got -1.0"),
    ],
)
def test_kept_pairs_refuse_bad_weights(weights: torch.Tensor, error: type[Exception], message: str) -> None:
    sessions = rx.SessionBatch(**parts([(2, 3), (1, 2)]))
    with pytest.raises(error, match=re.escape(message)):
        sessions.kept_pairs("each", weights)
