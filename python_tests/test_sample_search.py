"""Samples from a catalogue: against the unpruned reference, and against the distribution that they are drawn from."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import ToyModel, assert_scores_close
from support.beam_cases import generator_of
from support.strategies import Catalogue, catalogues
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference
from raddpo_ext.decoding.beam_search import unforced_tokens

LEAVES = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 3], [2, 2], [2, 3], [3, 1], [3, 3]]
TABLE = torch.tensor(
    [[1.0, 0.3, -0.5, -1.0], [0.0, 0.7, 1.5, -0.8], [0.5, -0.4, 0.1, 0.9]]
)  # row of level 0, then by parity


def toy_step(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
    """Logits that depend on the last token."""
    return TABLE[0].expand(*tokens.shape, 4) if level == 0 else TABLE[1 + tokens % 2]


def toy_probabilities() -> Tensor:
    """Of each leaf, in float64."""
    children: dict[int, list[int]] = {}
    for first, second in LEAVES:
        children.setdefault(first, []).append(second)
    table = TABLE.double()
    top = table[0].log_softmax(0)
    return torch.stack(
        [top[a] + table[1 + a % 2, b] - table[1 + a % 2, children[a]].logsumexp(0) for a, b in LEAVES]
    ).exp()


def toy_index() -> rx.TrieIndex:
    return rx.TrieIndex.build(LEAVES)


def assert_fits(counts: dict[Any, int], expected: dict[Any, float]) -> None:
    """Pearson's chi-square, with cells of less than 5 together: within 4.5 standard deviations of its mean."""
    assert set(counts) <= set(expected)
    total = sum(counts.values())
    assert math.isclose(sum(expected.values()), 1, rel_tol=1e-6)
    rare = {cell for cell, share in expected.items() if share * total < 5}
    cells = [(counts.get(cell, 0), share * total) for cell, share in expected.items() if cell not in rare]
    if rare:
        cells.append((sum(counts.get(cell, 0) for cell in rare), sum(expected[cell] for cell in rare) * total))
    chi_square = sum((found - mean) ** 2 / mean for found, mean in cells if mean > 0)
    freedom = len(cells) - 1
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom), (chi_square, freedom)


def model_of(catalogue: Catalogue, index: rx.TrieIndex, batch: int, seed: int) -> Callable[[], ToyModel]:
    return lambda: ToyModel.random(index.levels, batch, catalogue.columns, torch.float32, seed)


@settings(max_examples=40)
@given(catalogues(most_items=30), st.integers(0, 2**63 - 1), st.integers(1, 40), st.booleans())
def test_equals_reference(
    isa: str, threads: int, catalogue: Catalogue, seed: int, samples: int, replacement: bool
) -> None:
    """Ragged depths, an end token, collisions, any token table; against a search that prunes nothing."""
    index = rx.TrieIndex.build(**catalogue.arguments())
    model = model_of(catalogue, index, 2, seed % 2**32)
    options = {"batch_size": 2, "samples": samples, "seed": seed, "replacement": replacement, "temperature": 1.5}
    got = rx.sample_search(model(), index, **options)
    plain = reference.TrieIndex.build(**catalogue.arguments())
    expected = reference.sample_search(model(), plain, **options)
    assert got.sids.shape == (2, samples, index.sid_levels)
    assert got.token_logps.shape == (2, samples, index.most_levels)
    assert got.sids.tolist() == expected.sids.tolist()
    assert got.items.tolist() == expected.items.tolist()
    assert got.counts.tolist() == expected.counts.tolist()
    for name in ("logps", "token_logps", "log_weights", "threshold"):
        assert_scores_close(getattr(got, name), getattr(expected, name), "sample_search")
    found = got.items >= 0
    assert_scores_close(got.token_logps.sum(2)[found], got.logps[found], "sample_search")
    assert found.sum(1).tolist() == [min(samples, index.num_sids)] * 2 or replacement
    assert (got.counts.sum(1) == samples).all() or not replacement


@settings(max_examples=25)
@given(catalogues(most_items=30), st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans())
def test_forced_levels_need_no_model(catalogue: Catalogue, seed: int, samples: int, replacement: bool) -> None:
    """The same draws to the bit; the model runs as long as some SID in the beams shares its prefix with another."""
    index = rx.TrieIndex.build(**catalogue.arguments())
    model = model_of(catalogue, index, 2, seed)
    options = {"batch_size": 2, "samples": samples, "seed": seed, "replacement": replacement}
    states: list[rx.SampleState] = []
    expected = rx.sample_search(model(), index, on_step=lambda level, state: states.append(state), **options)
    levels: list[int] = []
    step = model()
    got = rx.sample_search(
        lambda tokens, parents, level: (levels.append(level), step(tokens, parents, level))[1],
        index,
        skip_forced=True,
        **options,
    )
    assert all(map(torch.equal, got, expected))
    free = [index.num_sids > 1] + [unforced_tokens(state, index) is not None for state in states[:-1]]
    assert levels == list(range(sum(free)))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_draws_follow_plackett_luce(samples: int) -> None:
    """The ordered draws without replacement, of 40,000 queries: not only which are in, but in which order."""
    p = toy_probabilities()
    drawn = rx.sample_search(toy_step, toy_index(), batch_size=40_000, samples=samples, seed=11)
    expected = {}
    for order in itertools.permutations(range(9), samples):
        left, share = 1.0, 1.0
        for leaf in order:
            share *= float(p[leaf]) / left
            left -= float(p[leaf])
        expected[order] = share
    assert_fits(Counter(map(tuple, drawn.items.tolist())), expected)


def test_draws_with_replacement_are_multinomial() -> None:
    p = toy_probabilities()
    drawn = rx.sample_search(toy_step, toy_index(), batch_size=40_000, samples=3, seed=12, replacement=True)
    expected: dict[tuple[int, ...], float] = {}
    for draws in itertools.product(range(9), repeat=3):
        key = tuple(sorted(draws))
        expected[key] = expected.get(key, 0) + math.prod(float(p[leaf]) for leaf in draws)
    multisets: Counter[tuple[int, ...]] = Counter()
    for items, counts in zip(drawn.items.tolist(), drawn.counts.tolist(), strict=True):
        multisets[tuple(sorted(i for i, n in zip(items, counts, strict=True) for _ in range(n)))] += 1
    assert_fits(multisets, expected)
    assert (drawn.threshold == -math.inf).all()
    assert_scores_close(drawn.log_weights.exp().sum(1), torch.ones(40_000), "sample_search")


@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize("replacement", [False, True])
def test_weights_are_unbiased(samples: int, replacement: bool) -> None:
    """``sum w f`` over 40,000 queries is ``E f``, within 4.5 standard errors, for every leaf's indicator."""
    p = toy_probabilities()
    drawn = rx.sample_search(
        toy_step, toy_index(), batch_size=40_000, samples=samples, seed=13, replacement=replacement
    )
    estimates = torch.zeros(40_000, 10, dtype=torch.float64)
    found = torch.where(drawn.items >= 0, drawn.items, 9)
    estimates.scatter_add_(1, found, drawn.log_weights.exp().double())
    error = estimates.std(0) / math.sqrt(40_000)
    assert ((estimates.mean(0) - torch.cat([p, p.new_zeros(1)])).abs() <= 4.5 * error + 1e-6).all()


@pytest.mark.parametrize("samples", [9, 10, 50])
def test_a_small_catalogue_is_returned_whole(samples: int) -> None:
    drawn = rx.sample_search(toy_step, toy_index(), batch_size=20, samples=samples, seed=1)
    assert (drawn.items[:, :9].sort(1).values == torch.arange(9)).all()
    assert drawn.threshold.tolist() == [-math.inf] * 20
    assert_scores_close(drawn.log_weights.exp().sum(1), torch.ones(20), "sample_search")
    expected = toy_probabilities()[drawn.items[:, :9]].log()
    assert_scores_close(drawn.logps[:, :9], expected, "sample_search")
    assert_scores_close(drawn.log_weights[:, :9], expected, "sample_search")
    empty = {"items": -1, "sids": -1, "counts": 0, "logps": -math.inf, "log_weights": -math.inf, "token_logps": 0}
    for name, value in empty.items():
        assert (getattr(drawn, name)[:, 9:] == value).all(), name


def random_search(seed: int) -> tuple[ToyModel, rx.TrieIndex]:
    rng = np.random.default_rng(seed)
    index = rx.TrieIndex.build(rng.integers(0, 12, (400, 4)))
    return ToyModel.random(4, 6, 12, torch.float32, seed), index


def test_fewer_samples_are_the_first_of_more(isa: str) -> None:
    model, index = random_search(0)
    many = rx.sample_search(model, index, batch_size=6, samples=60, seed=5)
    for samples in (1, 2, 15, 59):
        few = rx.sample_search(model, index, batch_size=6, samples=samples, seed=5)
        for name in ("sids", "items", "logps", "token_logps"):
            assert torch.equal(getattr(few, name), getattr(many, name)[:, :samples]), name


def test_fewer_draws_with_replacement_are_among_more(isa: str) -> None:
    model, index = random_search(1)
    searches = [rx.sample_search(model, index, batch_size=6, samples=n, seed=5, replacement=True) for n in (10, 40)]
    for query in range(6):
        few, many = (dict(zip(s.items[query].tolist(), s.counts[query].tolist(), strict=True)) for s in searches)
        assert all(count <= many.get(item, 0) for item, count in few.items() if item >= 0)


@pytest.mark.parametrize("replacement", [False, True])
def test_a_query_does_not_depend_on_the_batch(isa: str, threads: int, replacement: bool) -> None:
    model, index = random_search(2)
    options: dict[str, Any] = {"samples": 20, "seed": 3, "replacement": replacement}
    whole = rx.sample_search(model, index, batch_size=6, **options)
    order = torch.tensor([4, 1])
    part = ToyModel(model.tables[:, order])
    some = rx.sample_search(part, index, batch_size=2, keys=order, **options)
    for got, expected in zip(some, whole, strict=True):
        assert torch.equal(got, expected[order])


def test_with_replacement_nothing_is_decoded_twice() -> None:
    """Beams are distinct prefixes at every level, and their draws add up."""
    model, index = random_search(3)
    widths = []

    def on_step(level: int, state: rx.SampleState) -> None:
        live = state.nodes >= 0
        for row, kept in zip(state.nodes.tolist(), live.tolist(), strict=True):
            nodes = list(itertools.compress(row, kept))
            assert len(set(nodes)) == len(nodes)
        assert (torch.where(live, state.perturbed, 0).sum(1) == 30).all()
        widths.append(int(live.sum(1).max()))

    drawn = rx.sample_search(model, index, batch_size=6, samples=30, seed=3, replacement=True, on_step=on_step)
    assert widths[0] <= 12
    assert drawn.counts.sum(1).tolist() == [30] * 6
    assert (drawn.counts[:, :-1] >= drawn.counts[:, 1:]).all()


@pytest.mark.parametrize("replacement", [False, True])
def test_restricted_and_discarded_items(replacement: bool) -> None:
    """Only items that are left are drawn, with probabilities over them; a SID of several gives its first one."""
    sids = [*LEAVES, LEAVES[0], LEAVES[5]]
    index = rx.TrieIndex.build(sids, item_ids=[10 * i for i in range(11)])
    kept = index.restrict([0, 10, 50, 70, 90, 100]).discard([0])  # item 90 has the SID of item 0, 100 that of 50
    drawn = rx.sample_search(toy_step, kept, batch_size=30, samples=200, seed=3, replacement=replacement)
    for items, counts, logps in zip(*(x.tolist() for x in (drawn.items, drawn.counts, drawn.logps)), strict=True):
        found = [item for item in items if item >= 0]
        assert set(found) == {90, 10, 50, 70} or (replacement and set(found) <= {90, 10, 50, 70})
        assert math.isclose(sum(math.exp(logp) for logp in logps[:4]), 1, abs_tol=1e-5) or replacement
        assert sum(counts) == (200 if replacement else 4)
    empty = rx.sample_search(toy_step, index.restrict([]), batch_size=2, samples=3, seed=3, replacement=replacement)
    assert empty.items.tolist() == [[-1] * 3] * 2
    assert empty.counts.tolist() == [[0] * 3] * 2
    assert empty.log_weights.tolist() == [[-math.inf] * 3] * 2
    assert empty.threshold.tolist() == [-math.inf] * 2


@pytest.mark.parametrize("replacement", [False, True])
def test_from_hidden_states(replacement: bool) -> None:
    """A head gives what its logits give, with bias, softcap and temperature."""
    _, index = random_search(4)
    weight, bias = torch.randn(12, 8, generator=generator_of(1)), torch.randn(12, generator=generator_of(2))
    states = torch.randn(4, 1, 12, 8, generator=generator_of(3))

    def hidden(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        return states[level, 0, tokens.clamp(min=0)]

    def logits(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        return 5 * torch.tanh((hidden(tokens, parents, level) @ weight.T + bias) / 5)

    options: dict[str, Any] = {
        "batch_size": 3,
        "samples": 25,
        "seed": 8,
        "temperature": 0.7,
        "replacement": replacement,
    }
    got = rx.sample_search(hidden, index, weight=weight, bias=bias, logit_softcap=5.0, **options)
    expected = rx.sample_search(logits, index, **options)
    assert got.items.tolist() == expected.items.tolist()
    assert_scores_close(got.logps, expected.logps, "sample_search")
    assert_scores_close(got.log_weights, expected.log_weights, "sample_search")


def test_nan_logits_end_their_beam() -> None:
    def broken(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        logits = toy_step(tokens, parents, level).clone()
        logits[tokens == 0] = math.nan
        return logits

    for replacement in (False, True):
        drawn = rx.sample_search(broken, toy_index(), batch_size=50, samples=20, seed=1, replacement=replacement)
        assert not any(part.isnan().any() for part in drawn)
        assert set(drawn.items.flatten().tolist()) == {-1, 3, 4, 5, 6, 7, 8}
        with pytest.raises(ValueError, match="holds NaN"):
            rx.sample_search(broken, toy_index(), batch_size=5, samples=20, seed=1, replacement=replacement, check=True)


def test_bad_input() -> None:
    def run(**options: Any) -> rx.SampleResult:
        return rx.sample_search(
            toy_step, **({"index": toy_index(), "batch_size": 2, "samples": 3, "seed": 0} | options)
        )

    assert run(batch_size=0).items.shape == (0, 3)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        run(samples=0)
    with pytest.raises(ValueError, match="samples must be at most 16777216, got 16777217"):
        run(samples=2**24 + 1)
    with pytest.raises(TypeError, match=r"samples must be an integer, got 2\.5"):
        run(samples=2.5)
    with pytest.raises(ValueError, match="batch_size must be at least 0, got -1"):
        run(batch_size=-1)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        run(seed=-1)
    with pytest.raises(ValueError, match=r"keys must have shape \[B\] = \(2,\)"):
        run(keys=torch.arange(3))
    with pytest.raises(ValueError, match="normalize must be 'trie' for sampling, got 'vocab'"):
        run(normalize="vocab")
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        run(temperature=0)
    with pytest.raises(ValueError, match="bias and logit_softcap need weight"):
        run(logit_softcap=3.0)
    with pytest.raises(TypeError, match="index must be a TrieIndex, got list"):
        run(index=LEAVES)
    with pytest.raises(ValueError, match="weight must have more than 3 rows"):
        run(weight=torch.zeros(2, 4))
