"""The samplers of negatives: what they may give, how often they give it, and from which state."""

import re
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import raddpo_ext as rx
from raddpo_ext.data.catalogue import load_catalogue
from raddpo_ext.data.negatives import BeamNegatives, PopularityNegatives, SiblingNegatives, sample_negatives

SIDS = [[0, 1], [0, 2], [0, 2], [0, 3], [1, 0], [1, -1], [2, 5]]  # 1 and 2 share a SID
COUNTS = [5, 1, 2, 0, 4, 3, 0]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Found:
    """A retriever that finds the same items for every prompt, and notes what it is asked."""

    def __init__(self, index, items):
        self.index, self.items, self.asked = index, torch.tensor(items), []

    def retrieve(self, input_ids, attention_mask):
        self.asked += [row[mask].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        return rx.BeamResult(self.items.expand(len(input_ids), -1), None, None)


def make_index(sids, **arguments):
    codes = torch.tensor(sids)
    vocab = rx.SIDVocab([9] * codes.shape[1], eos=99)
    return rx.TrieIndex.build(codes, lengths=(codes >= 0).sum(1), vocab=vocab, **arguments)


@st.composite
def mixes(draw):
    """A catalogue with collisions and short SIDs, counts with zeros, and prompts with 0 to 3 positives."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items, levels = draw(st.integers(1, 30)), draw(st.integers(1, 3))
    sids = rng.integers(0, draw(st.integers(1, 4)), (items, levels))
    sids[np.arange(levels) >= rng.integers(1, levels + 1, (items, 1))] = -1
    counts = rng.integers(0, 4, items)
    counts[0] += 1
    positives = [rng.integers(0, items, rng.integers(0, 4)).tolist() for _ in range(draw(st.integers(0, 6)))]
    return sids, counts, positives, draw(st.integers(0, levels - 1)), draw(st.integers(0, 6)), draw(st.integers(0, 99))


@given(mixes())
def test_what_may_be_given(case):
    """All that is asked for, or all that there is; never a positive's SID, never one twice."""
    sids, counts, positives, prefix, count, seed = case
    key = [tuple(row) for row in sids.tolist()]
    beam = np.random.default_rng(seed).permutation(len(sids))[:5].tolist()
    beam = [item for place, item in enumerate(beam) if key[item] not in [key[other] for other in beam[:place]]]
    prompts = [[1, 2]] * len(positives)
    samplers = {
        "siblings": SiblingNegatives(sids, prefix),
        "popularity": PopularityNegatives(torch.tensor(sids), counts.tolist()),
        "beam": BeamNegatives(Found(make_index(sids), [*beam, -1]), batch_size=2),
    }

    def allowed(name, row):
        items = {
            "siblings": [i for i in range(len(sids)) if row and key[i][:prefix] == key[row[0]][:prefix]],
            "popularity": np.flatnonzero(counts).tolist(),
            "beam": beam,
        }[name]
        return [item for item in items if row and key[item] not in {key[positive] for positive in row}]

    for name, sampler in samplers.items():
        chosen = sampler.sample(prompts, positives, count, seeded(seed))
        assert (chosen.dtype, chosen.shape) == (torch.int64, (len(positives), count))
        for row, got in zip(positives, chosen.tolist(), strict=True):
            may = allowed(name, row)
            real = [item for item in got if item >= 0]
            assert got == real + [-1] * (count - len(real))  # padding comes last
            assert set(real) <= set(may)
            assert len({key[item] for item in real}) == len(real) == min(count, len({key[item] for item in may}))
    mixed = sample_negatives([(s, count) for s in samplers.values()], sids, prompts, positives, seeded(seed))
    assert mixed.shape == (len(positives), 3 * count)
    for row, got in zip(positives, mixed.tolist(), strict=True):
        real = [key[item] for item in got if item >= 0]
        assert len(set(real)) == len(real)
        assert not set(real) & {key[positive] for positive in row}


def frequencies(sampler, positives, count, rows=40_000):
    """How often each row of negatives comes."""
    chosen = sampler.sample([[1]] * rows, [positives] * rows, count, seeded(5))
    return {row: times / rows for row, times in Counter(map(tuple, chosen.tolist())).items()}


def test_siblings_are_uniform():
    # Of the winner 0: 1, 2 and 3, of which 1 and 2 exclude each other.
    found = frequencies(SiblingNegatives(SIDS), [0], 2)
    expected = {(1, 3): 1 / 3, (2, 3): 1 / 3, (3, 1): 1 / 6, (3, 2): 1 / 6}
    assert found == pytest.approx(expected, abs=0.01)
    assert frequencies(SiblingNegatives(SIDS), [0, 3, 6], 1) == pytest.approx({(1,): 0.5, (2,): 0.5}, abs=0.01)
    everything = frequencies(SiblingNegatives(SIDS, prefix=0), [2, 4], 1)
    assert everything == pytest.approx({(item,): 1 / 4 for item in (0, 3, 5, 6)}, abs=0.01)


def test_popularity_is_proportional():
    """Drawn one after another: each in proportion to the counts of what is left."""
    left = {0: 5, 1: 1, 2: 2, 5: 3}  # all but the positive, item 4, and those without a count
    expected = {}
    for first, second in permutations(left, 2):
        if {first, second} != {1, 2}:
            gone = sum(left[item] for item in ((1, 2) if first in (1, 2) else (first,)))
            expected[first, second] = left[first] / 11 * left[second] / (11 - gone)
    assert sum(expected.values()) == pytest.approx(1)
    assert frequencies(PopularityNegatives(SIDS, COUNTS), [4], 2) == pytest.approx(expected, abs=0.01)


def test_large_counts():
    """An item is never drawn for want of precision where only rare ones are left."""
    counts = [2**52, 1, 0, 1, 2**51, 1, 0]
    found = frequencies(PopularityNegatives(SIDS, counts), [0, 4], 3, rows=200)
    assert {frozenset(row) for row in found} == {frozenset({1, 3, 5})}


def test_beam_is_uniform():
    sampler = BeamNegatives(Found(make_index(SIDS), [6, 1, 0, 4, -1]))
    found = frequencies(sampler, [2], 2)  # which shares its SID with 1
    assert found == pytest.approx({pair: 1 / 6 for pair in permutations((6, 0, 4), 2)}, abs=0.01)


def test_same_state_same_negatives():
    positives = [[item] for item in range(5)] * 4
    prompts = [[1]] * 20
    samplers = [
        (BeamNegatives(Found(make_index(SIDS), [6, 1, 0, 4])), 2),
        (SiblingNegatives(SIDS), 1),
        (PopularityNegatives(SIDS, COUNTS), 2),
    ]
    torch.manual_seed(0)
    first = sample_negatives(samplers, SIDS, prompts, positives, seeded(1))
    torch.manual_seed(1)
    assert torch.equal(first, sample_negatives(samplers, SIDS, prompts, positives, seeded(1)))
    assert not torch.equal(first, sample_negatives(samplers, SIDS, prompts, positives, seeded(2)))
    generator = seeded(1)
    sample_negatives(samplers, SIDS, prompts, positives, generator)
    assert not torch.equal(first, sample_negatives(samplers, SIDS, prompts, positives, generator))


def test_beam_of_a_model():
    """Negatives are what the retriever finds, in any batches and for prompts of any length."""
    from test_retriever import FIRST, make_model  # skips where transformers is absent

    sids = torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(2))
    index = rx.TrieIndex.build(sids, vocab=rx.SIDVocab([4, 3, 2], offset=FIRST))
    retriever = rx.SIDRetriever(make_model("qwen3"), index, beam_width=6)
    prompts = [[5, 9, 7], [8], [4, 4, 11, 12], torch.tensor([9, 3])]
    alone = [retriever.retrieve(torch.as_tensor(prompt)[None]).items[0].tolist() for prompt in prompts]
    positives = [[items[0], items[3]] for items in alone]
    for batch_size in (1, 3, 64):
        chosen = BeamNegatives(retriever, batch_size).sample(prompts, positives, 9, seeded())
        for items, mine, got in zip(alone, positives, chosen.tolist(), strict=True):
            assert sorted(got) == [-1] * 5 + sorted(set(items) - set(mine))
    retriever.model.train()
    with pytest.raises(ValueError, match="model is in training mode"):
        BeamNegatives(retriever).sample(prompts, positives, 1, seeded())


def test_beam_with_other_item_ids():
    """The ids of an index need be neither ordered nor complete: a positive that it lacks clashes with nothing."""
    index = make_index(SIDS[:4], item_ids=[40, 2**40, 7, 0])
    retriever = Found(index, [40, 7, 0])
    sampler = BeamNegatives(retriever)
    chosen = sampler.sample([[1, 2], [3], [4]], [[2**40], [41, 40], []], 3, seeded())
    assert [set(row) for row in chosen.tolist()] == [{40, 0, -1}, {7, 0, -1}, {-1}]
    assert retriever.asked == [[3], [1, 2]]  # nothing for the prompt without positives


def test_item_ids_for_row_numbers():
    """An index with ids of its own cannot be mixed with samplers of rows, even where each id is a row as well."""
    for ids in ([6, 5, 4, 3, 2, 1, 0], [0, 2, 4, 3, 1, 5, 6]):
        samplers = [(BeamNegatives(Found(make_index(SIDS, item_ids=ids), [4, 3])), 2), (SiblingNegatives(SIDS), 1)]
        message = f"samplers[0] gives item 4, whose SID is {SIDS[ids.index(4)]} in its index but [1, 0] in sids"
        with pytest.raises(ValueError, match=re.escape(message)):
            sample_negatives(samplers, SIDS, [[1]], [[6]], seeded())
    part = make_index([SIDS[4], SIDS[0]], item_ids=[4, 0])  # an index of fewer items is no mistake
    mixed = sample_negatives([(BeamNegatives(Found(part, [0, 4])), 2)], SIDS, [[1]], [[6]], seeded())
    assert set(mixed[0].tolist()) == {0, 4}
    with pytest.raises(
        ValueError, match=r"holds an item outside \[0, 7\): \[1001\]; items are row numbers of sids, not"
    ):
        SiblingNegatives(SIDS).sample([[1]], [[1001]], 1, seeded())


def test_each_sampler_fills_up_beside_the_others():
    """Five SIDs are left of six, and one of them is not in the beam: nothing is drawn twice, so all are found."""
    samplers = [(BeamNegatives(Found(make_index(SIDS), [6, 1, 0, 4])), 2), (SiblingNegatives(SIDS, prefix=0), 3)]
    mixed = sample_negatives(samplers, SIDS, [[1]] * 50, [[5]] * 50, seeded())
    assert {frozenset({1: 2}.get(item, item) for item in row) for row in mixed.tolist()} == {frozenset({0, 2, 3, 4, 6})}


def test_a_sampler_that_does_not_keep_to_it():
    class Fixed:
        def sample(self, prompts, positives, count, generator):
            return torch.tensor([[1, 3, 3, 2], [1, 3, 3, 2], [4, 5, 6, 0]])

    mixed = sample_negatives([(Fixed(), 4), (Fixed(), 4)], SIDS, [[1]] * 3, [[0], [2], []], seeded())
    assert mixed.tolist() == [[1, 3, -1, -1, *[-1] * 4], [-1, 3, -1, -1, *[-1] * 4], [-1] * 8]
    with pytest.raises(ValueError, match=r"samplers\[0\] must give shape \(3, 5\), got \(3, 4\)"):
        sample_negatives([(Fixed(), 5)], SIDS, [[1]] * 3, [[0], [2], []], seeded())
    with pytest.raises(ValueError, match=r"samplers\[0\]\[2\] holds an item outside \[0, 6\): \[4, 5, 6, 0\]"):
        sample_negatives([(Fixed(), 4)], SIDS[:6], [[1]] * 3, [[0], [2], []], seeded())
    assert sample_negatives([], SIDS, [[1]], [[0]], seeded()).shape == (1, 0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: SiblingNegatives([[0, -1, 2]]),
            ValueError,
            r"sids\[0\] must be codes >= 0.*, got \[0, -1, 2\]",
        ),
        (lambda: SiblingNegatives([[0, 1], [-1, -1]]), ValueError, r"sids\[1\] must be codes >= 0.*, got \[-1, -1\]"),
        (lambda: SiblingNegatives([[0, -2]]), ValueError, r"sids\[0\] must be codes >= 0.*, got \[0, -2\]"),
        (lambda: SiblingNegatives(np.zeros((0, 2), int)), ValueError, r"sids must hold at least one SID"),
        (lambda: SiblingNegatives([[0.5]]), TypeError, "sids must hold integers"),
        (lambda: SiblingNegatives(SIDS, 2), ValueError, "prefix must be below 2, the number of levels, got 2"),
        (lambda: SiblingNegatives(SIDS, -1), ValueError, "prefix must be at least 0"),
        (
            lambda: PopularityNegatives(SIDS, [1]),
            ValueError,
            r"counts must have one entry per row of sids \(7\), got 1",
        ),
        (lambda: PopularityNegatives(SIDS, [0] * 7), ValueError, "counts must have a sum from 1 to"),
        (lambda: PopularityNegatives(SIDS, [2**62] * 7), ValueError, "counts must have a sum from 1 to"),
        (lambda: PopularityNegatives(SIDS, [1, 1, -4, 1, 1, 1, 1]), ValueError, r"counts\[2\] = -4 is negative"),
        (lambda: PopularityNegatives(SIDS, [0.5] * 7), TypeError, "counts must hold integers"),
        (lambda: BeamNegatives(SIDS), TypeError, "retriever must be a SIDRetriever, got list"),
        (lambda: BeamNegatives(Found(make_index(SIDS), [0]), 0), ValueError, "batch_size must be at least 1"),
    ],
)
def test_bad_samplers(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1]], [[0], [1]], 1), ValueError, r"positives must have one entry per prompt \(1\), got 2"),
        (([[1]], [[0.0]], 1), TypeError, "positives must hold integers"),
        (([[1]], [["a"]], 1), TypeError, "positives must hold integers"),
        (([[1], [1]], [[0], [1, -1]], 1), ValueError, r"positives\[1\] holds an item below 0: \[1, -1\]"),
        (([[1], [1]], [[0], [7]], 1), ValueError, r"positives\[1\] holds an item outside \[0, 7\): \[7\]"),
        (([[1]], [0], 1), TypeError, r"positives\[0\] must be a sequence of items, got 0"),
        (([[1]], [[0]], -1), ValueError, "count must be at least 0, got -1"),
    ],
)
def test_bad_samples(arguments, error, message):
    for sampler in (SiblingNegatives(SIDS), PopularityNegatives(SIDS, COUNTS)):
        with pytest.raises(error, match=message):
            sampler.sample(*arguments, seeded())
    with pytest.raises(error, match=message):
        sample_negatives([(SiblingNegatives(SIDS), arguments[2])], SIDS, *arguments[:2], seeded())


def test_bad_prompts_and_generators():
    beam = BeamNegatives(Found(make_index(SIDS), [0]))
    with pytest.raises(ValueError, match=r"prompts\[1\] must hold at least one token"):
        beam.sample([[1], []], [[0], [0]], 1, seeded())
    with pytest.raises(TypeError, match=r"prompts\[0\] must hold integers"):
        beam.sample([["a"]], [[0]], 1, seeded())
    with pytest.raises(TypeError, match="generator must be a Generator, got int"):
        beam.sample([[1]], [[0]], 1, 3)


def test_real_catalogue(data_dir):
    """The mix of the experiment, without the beam: siblings share the winner's first code, nearly all have three."""
    catalogue = load_catalogue(data_dir / "instruments")
    counts = np.bincount(np.concatenate(catalogue.train), minlength=len(catalogue.sids))
    samplers = [(SiblingNegatives(catalogue.sids), 3), (PopularityNegatives(catalogue.sids, counts), 3)]
    positives = [items[-3:] for items in catalogue.train[:8000]]
    chosen = sample_negatives(samplers, catalogue.sids, [[1]] * 8000, positives, seeded())
    first = torch.from_numpy(catalogue.sids[:, 0])
    winners = torch.tensor([row[0] for row in positives])
    siblings = chosen[:, :3]
    shared = first[siblings] == first[winners][:, None]
    assert shared[siblings >= 0].all()
    assert (siblings >= 0).double().mean() > 0.99
    assert (chosen[:, 3:] >= 0).all()
    assert counts[chosen[:, 3:]].mean() > 2 * counts.mean()
