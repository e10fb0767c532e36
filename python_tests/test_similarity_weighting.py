"""Similarity weighting: its weights, what its state holds after any calls, and that ranks and resumed runs agree."""

from __future__ import annotations

import io
import itertools
import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from support.distributed import on_ranks
from support.tolerances import close
from torch import Tensor, nn

import raddpo_ext as rx
from raddpo_ext import reference
from raddpo_ext.losses import similarity_weighting

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

Batch = tuple[Tensor, rx.SessionBatch]


def sessions_of(counts: list[tuple[int, int]], generator: torch.Generator) -> rx.SessionBatch:
    """Sessions of so many positives and negatives, whose SIDs are often equal or empty, also of equal length."""
    candidates = sum(map(sum, counts))
    offsets = [0, *itertools.accumulate(map(sum, counts))]
    return rx.SessionBatch(
        torch.randint(0, 2, (candidates, 3), generator=generator),
        torch.randint(0, 4, (candidates,), generator=generator),
        torch.tensor(offsets),
        torch.tensor([positives for positives, _ in counts], dtype=torch.int64),
    )


def batch_of(seed: int, columns: int = 33, sessions: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (sessions, 2), generator=generator).tolist()
    batch = sessions_of([(positives, negatives) for positives, negatives in counts], generator)
    return torch.randn(batch.num_candidates, columns, generator=generator), batch


def joined(batches: list[Batch]) -> Batch:
    """The batches as one."""
    embeddings, sessions = zip(*batches, strict=True)
    starts = itertools.accumulate([batch.num_candidates for batch in sessions], initial=0)
    offsets = [batch.offsets[:-1] + start for batch, start in zip(sessions, starts, strict=False)]
    tokens = torch.cat([batch.tokens for batch in sessions])
    whole = rx.SessionBatch(
        tokens,
        torch.cat([batch.lengths for batch in sessions]),
        torch.cat([*offsets, torch.tensor([len(tokens)])]),
        torch.cat([batch.num_positives for batch in sessions]),
    )
    return torch.cat(embeddings), whole


def pairs_of(similarities: list[float] | Tensor) -> Batch:
    """One session for each similarity: a positive and a negative of that cosine."""
    cosines = torch.as_tensor(similarities, dtype=torch.float32)
    embeddings = torch.zeros(len(cosines), 2, 2)
    embeddings[:, 0, 0] = 1
    embeddings[:, 1] = torch.stack((cosines, (1 - cosines.double().square()).sqrt().float()), 1)
    count = 2 * len(cosines)
    sessions = rx.SessionBatch(
        torch.arange(count)[:, None],
        torch.ones(count, dtype=torch.int64),
        torch.arange(0, count + 1, 2),
        torch.ones(len(cosines), dtype=torch.int64),
    )
    return embeddings.flatten(0, 1), sessions


def filled(values: list[float] | Tensor, **arguments: Any) -> rx.SimilarityWeighting:
    """A module whose history holds pairs of these similarities."""
    weighting = rx.SimilarityWeighting(len(values), **arguments)
    weighting(*pairs_of(values))
    return weighting


def state(weighting: rx.SimilarityWeighting) -> dict[str, list[float]]:
    """To the bit, empty places included: NaN as text, as it does not equal itself."""
    return {name: [str(value) for value in buffer.tolist()] for name, buffer in weighting.named_buffers()}


def padded(values: list[float], window: int) -> list[str]:
    return ["nan"] * (window - len(values[-window:])) + [str(value) for value in values[-window:]]


@settings(max_examples=100)
@given(st.data())
def test_equals_reference(data: st.DataObject) -> None:
    """Few and exact directions, so that similarities tie with each other and with the thresholds."""
    window = data.draw(st.sampled_from([2, 3, 5, 16, 40]))
    arguments = {
        "quantiles": data.draw(st.sampled_from([(0.5, 0.7, 0.9), (0.0, 0.5, 1.0), (0.2, 0.2, 0.8), (0.3, 0.9, 0.9)])),
        "steepness": data.draw(st.sampled_from([12.0, 0.1, 100.0])),
        "min_weight": data.draw(st.sampled_from([0.5, 1e-3, 1.0])),
    }
    got, expected = rx.SimilarityWeighting(window, **arguments), reference.SimilarityWeighting(window, **arguments)
    dtype, columns = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([1, 2, 7]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    for step in data.draw(st.lists(st.sampled_from(["train", "train", "train", "eval", "commit"]), max_size=12)):
        if step == "commit":
            got.commit()
            expected.commit()
        else:
            got.train(step == "train")
            expected.training = step == "train"
            counts = data.draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=4))
            sessions = sessions_of(counts, generator)
            embeddings = torch.randint(-2, 3, (sessions.num_candidates, columns), generator=generator).to(dtype)
            embeddings[torch.rand(embeddings.shape, generator=generator) < 0.03] = data.draw(
                st.sampled_from([math.nan, math.inf, 0.0])
            )
            torch.testing.assert_close(
                got(embeddings, sessions), expected(embeddings, sessions), **close("similarity_weighting")
            )
        assert state(got) == {
            "history": padded(expected.history, window),
            "pending": padded(expected.pending, window),
            "thresholds": padded(expected.thresholds or [], 3),
        }


@pytest.mark.parametrize("columns", [1, 3, 64, 1000])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *itertools.product([torch.float32, torch.bfloat16, torch.float64], [1.0, 1e-30, 1e30]),
        *itertools.product([torch.float16], [1.0, 1e-4, 6e4]),
    ],
)
def test_similarities_equal_float64(dtype: torch.dtype, scale: float, columns: int) -> None:
    """At any scale that the type holds: squares neither overflow nor vanish."""
    batch = rx.SessionBatch(
        torch.arange(40)[:, None], torch.ones(40, dtype=torch.int64), torch.tensor([0, 40]), torch.tensor([5])
    )
    embeddings = torch.randn(40, columns, generator=torch.Generator().manual_seed(0)).clamp(-1, 1).mul(scale).to(dtype)
    weighting = rx.SimilarityWeighting(5 * 35)
    weights = weighting(embeddings, batch)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    positives, negatives = batch.pairs()
    expected = torch.nn.functional.cosine_similarity(
        embeddings[positives].double() / scale, embeddings[negatives].double() / scale, eps=0
    )
    torch.testing.assert_close(weighting.history.double(), expected, rtol=0, atol=4e-7)


def test_similarities_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, sessions = batch_of(0, 200, 40)
    histories = []
    for entries in [2**22, 1, 1000]:
        monkeypatch.setitem(similarity_weighting._CHUNK, "cpu", entries)
        weighting = rx.SimilarityWeighting(10)
        weighting(embeddings, sessions)
        histories.append(state(weighting))
    assert histories[0] == histories[1] == histories[2]
    assert "nan" not in histories[0]["history"]


@pytest.mark.parametrize("window", [2, 3, 1000, 4096])
@pytest.mark.parametrize("quantiles", [(0.5, 0.7, 0.9), (0.0, 0.123, 1.0)])
def test_thresholds_equal_torch_quantile(window: int, quantiles: tuple[float, ...]) -> None:
    values = 2 * torch.rand(window, generator=torch.Generator().manual_seed(window)) - 1
    weighting = filled(values, quantiles=quantiles)
    expected = weighting.history.double().quantile(torch.tensor(quantiles, dtype=torch.float64))
    assert weighting.thresholds.tolist() == expected.float().tolist()
    torch.testing.assert_close(weighting.thresholds, values.quantile(torch.tensor(quantiles)), rtol=0, atol=2e-6)


def test_the_curve() -> None:
    """Weights against the formula's landmarks: thresholds .5, .7 and .9 of a history from 0 to 1."""
    weighting = filled(torch.linspace(0, 1, 101)).eval()
    low, middle, high = weighting.thresholds.tolist()
    assert (low, middle, high) == pytest.approx((0.5, 0.7, 0.9), abs=1e-6)
    similarities = torch.linspace(-1, 1, 401)
    weights = weighting(*pairs_of(similarities))
    assert (weights[similarities < 0.499] == 1).all()
    assert (weights[similarities > 0.901] == 0.5).all()
    inside = weights[(similarities > 0.501) & (similarities < 0.899)]
    assert (inside.diff() < 0).all()
    ends = 0.5 + 0.5 / (1 + math.exp(-6)), 0.5 + 0.5 / (1 + math.exp(6))
    assert inside[[0, -1]].tolist() == pytest.approx(ends, abs=2e-4)
    assert 1 - ends[0] == ends[1] - 0.5 < 0.0013
    at = weighting(*pairs_of([0.6, 0.7, 0.8])).tolist()
    assert at == pytest.approx([0.5 + 0.5 / (1 + math.exp(u * 6)) for u in (-0.5, 0, 0.5)], abs=1e-5)


def test_unequal_widths_of_the_two_sides() -> None:
    weighting = filled([0.0] * 2 + [0.5, 0.6], quantiles=(0.0, 2 / 3, 1.0), steepness=4.0, min_weight=0.2).eval()
    got = weighting(*pairs_of([0.25, 0.55])).tolist()
    assert got == pytest.approx([0.2 + 0.8 / (1 + math.exp(u * 2)) for u in (-0.5, 0.5)], abs=1e-5)


@pytest.mark.parametrize(
    ("values", "similarities", "expected"),
    [
        ([0.0] * 4, [-1.0, 0.0, 1e-3, 1.0], [1.0, 1.0, 0.5, 0.5]),  # q_lo = q_mid = q_hi
        ([0.0, 0.0, 0.0, 1.0], [-1.0, 0.0, 1e-7, 1.0], [1.0, 1.0, 0.75, 0.5]),  # q_lo = q_mid < q_hi
        ([0.0, 1.0, 1.0, 1.0], [-1.0, 0.0, 0.9999999, 1.0], [1.0, 1.0, 0.75, 0.5]),  # q_lo < q_mid = q_hi
    ],
)
def test_equal_thresholds(values: list[float], similarities: list[float], expected: list[float]) -> None:
    """Nothing is divided by 0. Between thresholds the logistic gives .75, so little is it steep."""
    weighting = filled(values, quantiles=(0.0, 0.5, 1.0), steepness=1e-9).eval()
    assert weighting(*pairs_of(similarities)).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_similarity_equals_itself_in_the_history(dtype: torch.dtype) -> None:
    """Which is float32: similarities of float64 embeddings are rounded before they are compared."""
    for seed in range(10):
        embeddings, sessions = pairs_of([0.0])
        embeddings = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        weighting = rx.SimilarityWeighting(2)
        assert [weighting(embeddings, sessions).item() for _ in range(3)] == [1.0] * 3
        assert weighting.thresholds.isfinite().all()


def test_weights_are_one_until_the_window_is_full() -> None:
    """The call that fills it still weighs by the thresholds before it."""
    weighting = rx.SimilarityWeighting(5)
    for values in [[0.1, 0.2, 0.3, 0.4], [0.5]]:
        assert weighting.thresholds.isnan().all()
        assert weighting(*pairs_of(values)).tolist() == [1.0] * len(values)
    assert weighting.thresholds.isfinite().all()
    assert weighting(*pairs_of([0.5])).tolist() == [0.5]


def test_the_window_keeps_the_most_recent() -> None:
    """Across calls, and of one call that brings more than fit."""
    weighting = rx.SimilarityWeighting(3)
    values = torch.arange(16) / 16
    weighting(*pairs_of(values[:2]))
    assert weighting.history[1:].tolist() == pytest.approx([0, 1 / 16])
    weighting(*pairs_of(values[2:4]))
    assert weighting.history.tolist() == pytest.approx([1 / 16, 2 / 16, 3 / 16])
    weighting(*pairs_of(values[4:]))
    assert weighting.history.tolist() == pytest.approx([13 / 16, 14 / 16, 15 / 16])


@pytest.mark.parametrize("window", [4, 30, 500])
def test_accumulation_equals_one_big_batch(window: int) -> None:
    """Whether what a step brings fits in the window or not."""
    parts, whole = rx.SimilarityWeighting(window), rx.SimilarityWeighting(window)
    parts.commit()
    whole.commit()
    for step in range(6):
        batches = [batch_of(10 * step + micro, sessions=4) for micro in range(3)]
        weights = torch.cat([parts(*batch) for batch in batches])
        torch.testing.assert_close(weights, whole(*joined(batches)), **close("similarity_weighting"))
        assert state(parts) == state(whole)
        parts.commit()
        whole.commit()
        assert state(parts) == state(whole)
        assert parts.pending.isnan().all()
    assert parts.thresholds.isfinite().all() == (window < 500)


def test_every_call_commits_until_the_first_commit() -> None:
    weighting = rx.SimilarityWeighting(2)
    weighting(*pairs_of([0.25]))
    assert weighting.history[1] == 0.25
    weighting.commit()
    assert weighting.history[1] == 0.25
    weighting(*pairs_of([0.5]))
    assert (weighting.history[1], weighting.pending[1]) == (0.25, 0.5)
    weighting.commit()
    assert weighting.history.tolist() == [0.25, 0.5]


def test_eval_only_weighs() -> None:
    weighting = filled([0.0, 0.5, 1.0])
    weights = weighting(*batch_of(1, sessions=20))  # appends
    before = state(weighting)
    weighting.eval()
    first = weighting(*batch_of(1, sessions=20))
    assert torch.equal(first, weighting(*batch_of(1, sessions=20)))
    assert state(weighting) == before
    assert not torch.equal(weights, first)


def test_dropped_pairs_are_weighed_but_not_appended() -> None:
    """Tokens beyond a length do not count, a proper prefix is another SID."""
    sessions = rx.SessionBatch(
        torch.tensor([[1, 2, 3], [1, 2, 9], [1, 2, 3], [1, 2, 3], [4, 5, 6], [0, 0, 0], [1, 2, 3]]),
        torch.tensor([2, 2, 3, 1, 0, 0, 2]),
        torch.tensor([0, 5, 7]),
        torch.tensor([1, 1]),
    )  # negatives of (1, 2): (1, 2), (1, 2, 3), (1), (); of (): (1, 2)
    turns = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.0, 0.5])
    embeddings = torch.stack((turns.cos(), turns.sin()), 1)
    weighting = rx.SimilarityWeighting(4)
    assert weighting(embeddings, sessions).tolist() == [1.0] * 5
    assert weighting.history[:2].isnan().all()
    assert weighting.history[2:].tolist() == pytest.approx([math.cos(0.2), math.cos(0.3)])
    weighting = filled([0.0, 0.5, 1.0])
    assert weighting(embeddings, sessions)[0] < 0.6  # the equal SIDs


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_direction(bad: float, dtype: torch.dtype) -> None:
    weighting = filled([-0.5, 0.0, 0.5])
    embeddings, sessions = pairs_of([1.0, 1.0])
    embeddings[3] = torch.tensor([bad, 0.0])
    assert weighting(embeddings.to(dtype), sessions).tolist() == [0.5, 1.0]
    assert weighting.history.tolist() == [0.0, 0.5, 1.0]


def test_nothing_to_weigh() -> None:
    weighting = rx.SimilarityWeighting(2)
    for counts in [[], [(0, 0)], [(3, 0), (0, 2)]]:
        sessions = sessions_of(counts, torch.Generator())
        weights = weighting(torch.ones(sessions.num_candidates, 4, dtype=torch.bfloat16), sessions)
        assert weights.shape == (0,)
        assert weights.dtype == torch.float32
    assert weighting.history.isnan().all()


def test_no_gradient_and_no_change_of_the_input() -> None:
    weighting = filled([0.0, 0.5, 1.0])
    embeddings, sessions = batch_of(3)
    given = embeddings.clone().requires_grad_()
    weights = weighting(given, sessions)
    assert not weights.requires_grad
    assert torch.equal(given, embeddings)
    assert not any(buffer.requires_grad for buffer in weighting.buffers())
    assert list(weighting.parameters()) == []


def test_strides_and_autocast_change_nothing() -> None:
    embeddings, sessions = batch_of(4, 33, 8)
    expected = filled([0.0, 0.5, 1.0])
    weights = expected(embeddings, sessions)
    strided, cast = filled([0.0, 0.5, 1.0]), filled([0.0, 0.5, 1.0])
    wide = torch.full((len(embeddings), 70), math.nan)
    wide[:, 1:67:2] = embeddings
    assert torch.equal(strided(wide[:, 1:67:2], sessions), weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cast(embeddings, sessions), weights)
    assert state(strided) == state(cast) == state(expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.to("cpu", torch.float16),
    ],
)
def test_the_state_stays_float32(change: Any) -> None:
    parent = nn.Sequential(filled([0.1, 0.3, 0.7]), nn.Linear(2, 2))
    before = state(parent[0])
    changed = change(parent)
    assert changed[1].weight.dtype != torch.float32
    assert all(buffer.dtype == torch.float32 for buffer in parent[0].buffers())
    assert state(parent[0]) == before
    parent[0](*pairs_of([0.2]))
    assert parent[0].history.dtype == torch.float32


def test_state_dict_resumes_to_the_bit() -> None:
    """In the middle of a step, by a file that holds tensors only; the mode of commits included."""
    for committed in [False, True]:
        weighting = rx.SimilarityWeighting(6)
        if committed:
            weighting.commit()
        weighting(*batch_of(5))
        if committed:
            weighting.commit()
            weighting(*batch_of(6))
            assert weighting.pending.isfinite().any()
        file = io.BytesIO()
        torch.save(weighting.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        assert all(isinstance(value, Tensor) for value in saved.values())
        resumed = rx.SimilarityWeighting(6)
        resumed.load_state_dict(saved)
        assert state(resumed) == state(weighting)
        for seed in range(7, 12):
            assert torch.equal(resumed(*batch_of(seed)), weighting(*batch_of(seed)))
            assert state(resumed) == state(weighting)
            if committed and seed % 2:
                resumed.commit()
                weighting.commit()
        assert resumed.thresholds.isfinite().all()
    with pytest.raises(RuntimeError, match=r"size mismatch for history.*\[6\].*\[7\]"):
        rx.SimilarityWeighting(7).load_state_dict(saved)


def test_no_value_is_read_back() -> None:
    """The meta device has none: reading one, or a shape that depends on one, raises there."""
    with torch.device("meta"):
        weighting = rx.SimilarityWeighting(5)
    embeddings, sessions = batch_of(6, sessions=9)
    for module in [weighting, filled([0.1, 0.2, 0.3]).to("meta")]:
        for training in [True, False]:
            module.train(training)
            assert module(embeddings.to("meta"), sessions.to("meta")).shape == (sessions.num_pairs,)
            module.commit()
        assert {buffer.device.type for buffer in module.buffers()} == {"meta"}


@pytest.mark.slow
def test_inside_a_compiled_function() -> None:
    """The compiler may break the graph, not the state."""
    compiled, plain = filled([0.1, 0.2, 0.3]), filled([0.1, 0.2, 0.3])

    def scaled(embeddings: Tensor, sessions: rx.SessionBatch) -> Tensor:
        return 2 * compiled(embeddings + 1, sessions)

    run = torch.compile(scaled, backend="eager")
    for seed in range(3):
        embeddings, sessions = batch_of(seed)
        assert torch.equal(run(embeddings, sessions), 2 * plain(embeddings + 1, sessions))
        assert state(compiled) == state(plain)


WINDOW = 20
STEPS = 7


def of_rank(rank: int, step: int, micro: int) -> Batch:
    """Rank 1 has nothing in step 1."""
    return batch_of(100 * step + 10 * rank + micro, sessions=0 if rank == step == 1 else 8)


class Wrapped(nn.Module):
    """A model that holds the weighting, for DistributedDataParallel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.weighting = rx.SimilarityWeighting(WINDOW)

    def forward(self, embeddings: Tensor, sessions: rx.SessionBatch) -> tuple[Tensor, Tensor]:
        weights = self.weighting(embeddings, sessions)
        return weights, (self.scale * weights).sum()


def train_on_a_rank() -> dict[str, Any]:
    """The weights of every call and the states after every step, of each way to run."""
    rank = dist.get_rank()
    result: dict[str, Any] = {}

    each_call = rx.SimilarityWeighting(WINDOW)
    result["each call"] = [(each_call(*of_rank(rank, step, 0)), state(each_call)) for step in range(STEPS)]

    accumulated = rx.SimilarityWeighting(WINDOW)
    accumulated.commit()
    result["accumulated"] = []
    for step in range(STEPS):
        weights = torch.cat([accumulated(*of_rank(rank, step, micro)) for micro in range(2)])
        accumulated.commit()
        result["accumulated"].append((weights, state(accumulated)))

    wrapped = nn.parallel.DistributedDataParallel(Wrapped())
    wrapped.module.weighting.commit()
    result["wrapped"] = []
    for step in range(STEPS):
        with wrapped.no_sync():
            first, loss = wrapped(*of_rank(rank, step, 0))
            loss.backward()
        second, loss = wrapped(*of_rank(rank, step, 1))
        loss.backward()
        wrapped.module.weighting.commit()
        result["wrapped"].append((torch.cat((first, second)), state(wrapped.module.weighting)))

    groups = [dist.new_group([member]) for member in range(2)]
    alone = rx.SimilarityWeighting(WINDOW, process_group=groups[rank])
    result["alone"] = [(alone(*of_rank(rank, step, 0)), state(alone)) for step in range(STEPS)]
    return result


@pytest.mark.slow
def test_ranks_equal_one_process() -> None:
    """Every rank's weights, and to the bit the state that all of them hold."""
    results = on_ranks(train_on_a_rank)
    for name, micros, ranks in [
        ("each call", 1, [0, 1]),
        ("accumulated", 2, [0, 1]),
        ("wrapped", 2, [0, 1]),
        ("alone", 1, [0]),
        ("alone", 1, [1]),
    ]:
        single = rx.SimilarityWeighting(WINDOW)
        single.commit()
        seen: list[float] = []
        for step in range(STEPS):
            expected = single(*joined([of_rank(rank, step, micro) for rank in ranks for micro in range(micros)]))
            single.commit()
            weights = torch.cat([results[rank][name][step][0] for rank in ranks])
            torch.testing.assert_close(weights, expected, **close("similarity_weighting"))
            assert [results[rank][name][step][1] for rank in ranks] == [state(single)] * len(ranks), name
            seen += expected.tolist()
        assert min(seen) < 0.7  # the window was full


def test_gathers_within_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two stand-in ranks, the other of which has one similarity more."""
    group = object()

    def all_gather(arrived: list[Tensor], pending: Tensor, group: object) -> None:
        asked.append(group)
        arrived[0].copy_(pending)
        arrived[1].copy_(torch.tensor([math.nan, 0.75]))

    asked: list[object] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: asked.append(group) or 2)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    weighting = rx.SimilarityWeighting(2, process_group=group)
    weighting(*pairs_of([0.25]))
    assert weighting.history.tolist() == [0.25, 0.75]
    assert set(asked) == {group}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_equals_cpu_and_never_synchronises() -> None:
    on_cpu = rx.SimilarityWeighting(50)
    on_gpu = rx.SimilarityWeighting(50).cuda()
    batches = [batch_of(seed, 40, 8) for seed in range(12)]
    moved = [(embeddings.cuda(), sessions.to("cuda")) for embeddings, sessions in batches]
    on_gpu.eval()(*moved[0])  # loads the kernels
    on_gpu.train()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = [on_gpu(*batch) for batch in moved[:8]]
        for batch in moved[8:]:
            on_gpu.commit()
            got.append(on_gpu(*batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = [on_cpu(*batch) for batch in batches[:8]]
    for batch in batches[8:]:
        on_cpu.commit()
        expected.append(on_cpu(*batch))
    close = {"rtol": 0, "atol": 1e-4}  # the logistic is steep where quantiles are close
    torch.testing.assert_close(torch.cat(got).cpu(), torch.cat(expected), **close)
    torch.testing.assert_close(on_gpu.history.cpu(), on_cpu.history, rtol=0, atol=1e-6)


def test_repr() -> None:
    expected = "SimilarityWeighting(window=4096, quantiles=(0.5, 0.7, 0.9), steepness=12.0, min_weight=0.5)"
    assert repr(rx.SimilarityWeighting()) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"window": 1}, ValueError, "window must be at least 2, got 1"),
        ({"window": 8.0}, TypeError, "window must be an integer, got 8.0"),
        ({"quantiles": (0.5, 0.9)}, ValueError, "quantiles must be three non-decreasing numbers in [0, 1], got (0.5"),
        (
            {"quantiles": [0.1, 0.2, 0.3, 0.4]},
            ValueError,
            "quantiles must be three non-decreasing numbers in [0, 1], got [0.1",
        ),
        ({"quantiles": (0.5, 0.4, 0.9)}, ValueError, "three non-decreasing numbers in [0, 1], got (0.5, 0.4, 0.9)"),
        ({"quantiles": (0.5, 0.95, 0.9)}, ValueError, "three non-decreasing numbers in [0, 1], got (0.5, 0.95, 0.9)"),
        ({"quantiles": (-0.1, 0.4, 0.9)}, ValueError, "three non-decreasing numbers in [0, 1], got (-0.1, 0.4, 0.9)"),
        ({"quantiles": (0.5, 0.7, 1.1)}, ValueError, "three non-decreasing numbers in [0, 1], got (0.5, 0.7, 1.1)"),
        ({"quantiles": (0.5, math.nan, 0.9)}, ValueError, "quantiles[1] must be finite, got nan"),
        ({"quantiles": (0.5, 0.7, "0.9")}, TypeError, "quantiles[2] must be a number, got '0.9'"),
        ({"quantiles": 0.5}, TypeError, "quantiles must be a sequence of three numbers, got 0.5"),
        ({"quantiles": "579"}, TypeError, "quantiles must be a sequence of three numbers, got '579'"),
        ({"steepness": 0.0}, ValueError, "steepness must be positive, got 0.0"),
        ({"steepness": -3}, ValueError, "steepness must be positive, got -3"),
        ({"steepness": math.inf}, ValueError, "steepness must be finite, got inf"),
        ({"steepness": None}, TypeError, "steepness must be a number, got None"),
        ({"min_weight": 0.0}, ValueError, "min_weight must be in (0, 1], got 0.0"),
        ({"min_weight": 1.5}, ValueError, "min_weight must be in (0, 1], got 1.5"),
        ({"min_weight": math.nan}, ValueError, "min_weight must be finite, got nan"),
    ],
)
def test_module_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rx.SimilarityWeighting(**arguments)


EMBEDDINGS, SESSIONS = pairs_of([0.1, 0.2])


@pytest.mark.parametrize(
    ("embeddings", "sessions", "error", "message"),
    [
        (EMBEDDINGS.tolist(), SESSIONS, TypeError, "embeddings must be a Tensor, got list"),
        (
            EMBEDDINGS.long(),
            SESSIONS,
            TypeError,
            "embeddings must be float32, bfloat16, float16 or float64, got torch.i",
        ),
        (
            EMBEDDINGS.cfloat(),
            SESSIONS,
            TypeError,
            "embeddings must be float32, bfloat16, float16 or float64, got torch",
        ),
        (EMBEDDINGS[0], SESSIONS, ValueError, "one row per candidate (4) and at least one column, got shape (2,)"),
        (EMBEDDINGS[:3], SESSIONS, ValueError, "one row per candidate (4) and at least one column, got shape (3, 2)"),
        (
            EMBEDDINGS[:, :0],
            SESSIONS,
            ValueError,
            "one row per candidate (4) and at least one column, got shape (4, 0)",
        ),
        (
            EMBEDDINGS[None],
            SESSIONS,
            ValueError,
            "one row per candidate (4) and at least one column, got shape (1, 4, 2)",
        ),
        (EMBEDDINGS.to("meta"), SESSIONS, ValueError, "embeddings must be on the device of the module, cpu, got meta"),
        (EMBEDDINGS, SESSIONS.to("meta"), ValueError, "sessions must be on the device of the module, cpu, got meta"),
        (EMBEDDINGS, [[0, 1]], TypeError, "sessions must be a SessionBatch, got list"),
    ],
)
def test_call_refuses(embeddings: Any, sessions: Any, error: type[Exception], message: str) -> None:
    weighting = rx.SimilarityWeighting(2)
    with pytest.raises(error, match=re.escape(message)):
        weighting(embeddings, sessions)
    assert weighting.history.isnan().all()
