"""The metrics against their definitions, one query at a time in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import raddpo_ext as rx
from raddpo_ext.data.metrics import invalid_share, retrieval_metrics, squeezing


def expected(found, wanted, ks):
    """Of one query: lists of hashable things, None for an empty place."""
    wanted = set(wanted) - {None}
    first = {}
    for place, item in enumerate(found, 1):
        first.setdefault(item, place)
    metrics = {}
    for k in ks:
        places = [first[item] for item in wanted if first.get(item, math.inf) <= k]
        best = sum(1 / math.log2(1 + rank) for rank in range(1, min(k, len(wanted)) + 1))
        metrics[f"recall@{k}"] = len(places) / len(wanted)
        metrics[f"ndcg@{k}"] = sum(1 / math.log2(1 + place) for place in places) / best
    metrics["mrr"] = max((1 / first[item] for item in wanted if item in first), default=0.0)
    return metrics


@st.composite
def retrievals(draw):
    """Items or SIDs (of different lengths), with repeats and empty places on both sides."""
    levels = draw(st.sampled_from([None, 1, 2, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    queries, places, count = (draw(st.integers(1, 6)) for _ in range(3))

    def some(width):
        if levels is None:
            return torch.randint(-1, 5, (queries, width), generator=generator)
        codes = torch.randint(0, 2, (queries, width, levels), generator=generator)
        ends = torch.randint(0, levels + 1, (queries, width, 1), generator=generator)
        return torch.where(torch.arange(levels) < ends, codes, -1)

    found, wanted = some(places), some(count)
    wanted[:, draw(st.integers(0, count - 1))] = 1  # at least one a query
    ks = draw(st.lists(st.integers(1, places), min_size=1, max_size=3, unique=True))
    return found, wanted, ks


def keys(row):
    """What a row holds, None where it is empty."""
    if row.dim() == 1:
        return [None if item < 0 else item for item in row.tolist()]
    return [None if max(sid) < 0 else tuple(sid) for sid in row.tolist()]


@given(retrievals())
def test_definitions(case):
    found, wanted, ks = case
    metrics = retrieval_metrics(found.int(), wanted, ks)
    assert set(metrics) == {f"{name}@{k}" for name in ("recall", "ndcg") for k in ks} | {"mrr"}
    for name, values in metrics.items():
        assert values.dtype == torch.float64
        by_hand = [expected(keys(f), keys(w), ks)[name] for f, w in zip(found, wanted, strict=True)]
        torch.testing.assert_close(values, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-12, atol=0)


def test_by_hand():
    found = torch.tensor([[7, 3, 7, 9], [1, 2, -1, -1]])
    metrics = retrieval_metrics(found, torch.tensor([[9, 3, 9], [4, -1, -1]]), ks=(2, 4))
    assert metrics["recall@2"].tolist() == [0.5, 0.0]
    assert metrics["recall@4"].tolist() == [1.0, 0.0]
    ideal = 1 + 1 / math.log2(3)
    assert metrics["ndcg@4"][0].item() == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert metrics["mrr"].tolist() == [0.5, 0.0]
    # Two wanted ones fit no cut-off of one: the best that one place can hold is the ideal.
    assert retrieval_metrics(torch.tensor([[3]]), torch.tensor([[9, 3]]), ks=[1])["ndcg@1"].item() == 1


def test_no_queries():
    none = retrieval_metrics(torch.empty(0, 50, dtype=torch.int64), torch.empty(0, 0, dtype=torch.int64))
    assert {values.shape for values in none.values()} == {(0,)}
    assert set(retrieval_metrics(torch.tensor([[-1]]), torch.tensor([[2]]), ks=[])) == {"mrr"}
    nothing = torch.empty(1, 0, dtype=torch.int64)
    assert retrieval_metrics(nothing, torch.tensor([[2]]), ks=[])["mrr"].tolist() == [0.0]


@pytest.mark.parametrize(
    ("found", "wanted", "ks", "error", "message"),
    [
        ([[1, 2]], [[-1]], [1], ValueError, r"wanted\[0\] is empty"),
        ([[[1, 2]]], [[[-1, -1]]], [1], ValueError, r"wanted\[0\] is empty"),
        ([[1, 2]], [[1]], [3], ValueError, "ks must be at most 2, the columns of found, got 3"),
        ([[1, 2]], [[1]], [0], ValueError, r"ks\[0\] must be at least 1, got 0"),
        ([[1, 2]], [[1]], [1.0], TypeError, r"ks\[0\] must be an integer"),
        ([[1, 2]], [[1], [2]], [1], ValueError, r"got \(1, 2\) and \(2, 1\)"),
        ([[[1, 2]]], [[1]], [1], ValueError, r"got \(1, 1, 2\) and \(1, 1\)"),
        ([[[1, 2]]], [[[1]]], [1], ValueError, r"got \(1, 1, 2\) and \(1, 1, 1\)"),
        ([[1, -2]], [[1]], [1], ValueError, "found must be >= 0, or -1 for padding, got -2"),
        ([[[1, -1, 2]]], [[[1, 2, 2]]], [1], ValueError, r"found\[0\] holds a SID with -1 before a code"),
        ([1, 2], [[1]], [1], ValueError, "found must have 2 dimensions"),
        ([[1.0]], [[1]], [1], TypeError, "found must hold integers"),
    ],
)
def test_bad_retrievals(found, wanted, ks, error, message):
    with pytest.raises(error, match=message):
        retrieval_metrics(torch.tensor(found), torch.tensor(wanted), ks)


def test_lists_are_refused():
    with pytest.raises(TypeError, match="found must be a Tensor, got list"):
        retrieval_metrics([[1]], torch.tensor([[1]]), [1])


@pytest.mark.parametrize("eos", [None, 40])
def test_invalid_share(eos):
    sids, lengths = [[3, 1, 2], [3, 2, 0], [4, 0, 0]], [3, 2, 1]
    index = rx.TrieIndex.build(sids, lengths=lengths, vocab=rx.SIDVocab([9, 9, 9], offset=1, eos=eos))
    made = torch.tensor(
        [
            [[3, 1, 2], [3, 2, -1], [4, -1, -1], [-1, -1, -1]],  # all of them items
            [[3, 1, 0], [3, 2, 0], [4, -1, 1], [3, -1, -1]],  # none
            [[3, 1, 2], [3, 1, 9], [-5, 1, 2], [-1, -1, -1]],
            [[-1, -1, -1]] * 4,
        ]
    )
    torch.testing.assert_close(invalid_share(index, made), torch.tensor([0, 1, 2 / 3, 0], dtype=torch.float64))
    # With lengths a code of -1 is one that the model made up, and what lies beyond is not read.
    ends = torch.tensor([[3, 2, 1, 3], [1, 2, 1, 0], [2, 0, 0, 0], [1, 0, 0, 0]])
    torch.testing.assert_close(invalid_share(index, made, ends), torch.tensor([0.25, 1 / 3, 1, 1], dtype=torch.float64))
    wider = torch.tensor([[[3, 1, 2, -1], [3, 1, 2, 0]]], dtype=torch.int32)
    assert invalid_share(index, wider).tolist() == [0.5]
    assert invalid_share(index, made[:, :0]).tolist() == [0] * 4
    assert invalid_share(index, made[:0]).shape == (0,)
    assert invalid_share(index, made[..., :0]).tolist() == [0] * 4
    with pytest.raises(ValueError, match=r"lengths must have shape \(4, 4\), got \(4, 3\)"):
        invalid_share(index, made, ends[:, :3])
    with pytest.raises(ValueError, match=r"lengths\[3\] = 4 is outside \[0, 3\]"):
        invalid_share(index, made, torch.tensor([[3, 2, 1, 4]] * 4))
    with pytest.raises(TypeError, match="sids must hold integers"):
        invalid_share(index, made.float())
    with pytest.raises(TypeError, match="index must be a TrieIndex"):
        invalid_share(made, made)


def test_squeezing():
    """Three sessions: two positives and two negatives, one of them empty; a positive only; a negative only."""
    lengths = torch.tensor([2, 1, 2, 0, 2, 1])
    sessions = rx.SessionBatch(
        torch.zeros(6, 2, dtype=torch.int64), lengths, torch.tensor([0, 4, 5, 6]), torch.tensor([2, 1, 0])
    )
    before = torch.tensor([[-1.0, -2], [-3, math.nan], [-1, -1], [math.nan, 0], [-2, -2], [-1, math.inf]])
    after = torch.tensor([[-0.5, -1], [-4, 0], [-3, -1], [0, 0], [-2, -1.5], [-5, 0]])
    drift = squeezing(before, after, sessions)
    assert {name: value.item() for name, value in drift.items()} == {
        "winner": 1.0,
        "positives": -1.0,
        "negatives": -3.0,
    }
    assert all(value.dtype == torch.float64 and value.shape == () for value in drift.values())
    none = rx.SessionBatch(sessions.tokens[:0], lengths[:0], torch.tensor([0, 0]), torch.tensor([0]))
    assert [float(value) for value in squeezing(before[:0], after[:0], none).values()] == [0, 0, 0]
    with pytest.raises(ValueError, match=r"after\[1\] holds a log-prob that is not finite"):
        squeezing(before, after.masked_fill(after == -4, -math.inf), sessions)
    with pytest.raises(ValueError, match=r"before must have the shape and device of sessions.tokens, \(6, 2\) on cpu"):
        squeezing(before[:5], after, sessions)
    with pytest.raises(TypeError, match="after must be floating point"):
        squeezing(before, after.long(), sessions)
