"""The simulated search shop, its tokens and its sessions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from demo.search.data import Tokens, sessions_of
from demo.search.shop import CLEAN, COLOURS, TIERS, Constants, Queries, SearchShop, ndcg


@pytest.fixture(scope="module")
def shop() -> SearchShop:
    return SearchShop.make(3)


def draw(shop: SearchShop, count: int, seed: int = 0):
    return shop.log(count, np.random.default_rng(seed))


def test_a_seed_is_a_shop(shop: SearchShop) -> None:
    again, other = SearchShop.make(3), SearchShop.make(4)
    for name in ("attributes", "worth", "bait", "static", "likes_style", "likes_colour"):
        assert np.array_equal(getattr(again, name), getattr(shop, name))
    assert not np.array_equal(other.worth, shop.worth)
    log, same = draw(shop, 50), draw(again, 50)
    assert np.array_equal(log.shown, same.shown)
    assert np.array_equal(log.ordered, same.ordered)


def test_items_are_what_the_constants_say(shop: SearchShop) -> None:
    constants = shop.constants
    assert abs(len(shop.worth) - constants.items) < 60
    assert len(np.unique(shop.attributes, axis=0)) == len(shop.attributes)
    siblings = np.unique(shop.attributes[:, :2], axis=0, return_counts=True)[1]
    assert len(siblings) == constants.categories * constants.styles
    assert set(siblings) <= {8, 9}
    assert np.corrcoef(shop.static, shop.worth)[0, 1] == pytest.approx(constants.static_worth, abs=0.1)


def test_the_truth_is_the_documented_formula(shop: SearchShop) -> None:
    """One query and item at a time, in plain Python."""
    queries = shop.queries(40, np.random.default_rng(1))
    truth, c = shop.order_probability(queries), shop.constants
    for row in range(40):
        category, style, colour, taste, budget = (int(column[row]) for column in queries)
        for item in range(0, len(shop.worth), 7):
            own = shop.attributes[item].tolist()
            if own[0] != category:
                assert truth[row, item] == 0
                continue
            utility = c.style * (own[1] == style) if style >= 0 else c.taste * shop.likes_style[taste, own[1]]
            utility += c.colour * (own[3] == colour) if colour >= 0 else c.taste * shop.likes_colour[taste, own[3]]
            utility += c.worth * shop.worth[item] - c.tier * abs(own[2] - budget)
            expected = 1 / (1 + math.exp(-c.order - c.order_utility * utility))
            assert truth[row, item] == pytest.approx(expected, rel=1e-12)


def test_orders_follow_the_truth_and_clicks_the_bait(shop: SearchShop) -> None:
    log = draw(shop, 20_000)
    assert log.clicked.any(1).all()
    assert not (log.ordered & ~log.clicked).any()
    own = shop.attributes[log.shown[:, 0], 0] == log.queries.category
    assert own.all()
    truth = np.take_along_axis(shop.order_probability(log.queries), log.shown, 1)[log.clicked]
    ordered = log.ordered[log.clicked]
    for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 1.0)):
        here = (truth >= low) & (truth < high)
        error = 4 * math.sqrt(0.25 / here.sum())
        assert ordered[here].mean() == pytest.approx(truth[here].mean(), abs=error)
    bait = shop.bait[log.shown]
    assert bait[log.clicked].mean() > bait[~log.clicked].mean() + 0.3
    assert np.corrcoef(ordered, bait[log.clicked])[0, 1] < 0.05


def test_examination_falls_with_the_place(shop: SearchShop) -> None:
    """In a shop without preferences a click says nothing but that its place was examined."""
    flat = {"style": 0.0, "colour": 0.0, "taste": 0.0, "tier": 0.0, "worth": 0.0, "click_bait": 0.0, "click": 0.0}
    plain = SearchShop.make(0, Constants(**flat))
    queries = plain.queries(40_000, np.random.default_rng(0))
    clicks = plain._visited(queries, np.random.default_rng(1)).clicked.sum(0) / 40_000
    expected = 0.5 / (1 + plain.constants.examination * np.arange(12))
    np.testing.assert_allclose(clicks, expected, atol=0.012)
    clean = SearchShop.make(0, Constants(**{**flat, **CLEAN}))
    clicks = clean._visited(queries, np.random.default_rng(1)).clicked.sum(0) / 40_000
    np.testing.assert_allclose(clicks, 0.5, atol=0.012)


def test_wrong_orders_stay_among_the_clicks(shop: SearchShop) -> None:
    noisy = SearchShop.make(3, Constants(wrong_orders=1.0))
    log = draw(noisy, 4000)
    assert not (log.ordered & ~log.clicked).any()
    truth = np.take_along_axis(noisy.order_probability(log.queries), log.shown, 1)
    right = draw(shop, 4000)
    clean = np.take_along_axis(shop.order_probability(right.queries), right.shown, 1)
    assert truth[log.ordered].mean() < clean[right.ordered].mean() - 0.05


def test_ndcg_by_hand() -> None:
    gains = np.array([[0.1, 0.4, 0.0, 0.2], [0.5, 0.0, 0.0, 0.0]])
    first = (0.2 + 0.4 / math.log2(3)) / (0.4 + 0.2 / math.log2(3))
    np.testing.assert_allclose(ndcg(gains, [[3, 1], [2, -1]], k=2), [first, 0.0])
    np.testing.assert_allclose(ndcg(gains, [[1, 3], [0, 1]], k=2), 1.0)


@pytest.mark.parametrize("ragged", [False, True])
def test_tokens(shop: SearchShop, ragged: bool) -> None:
    tokens = Tokens.of(shop, ragged)
    assert set(tokens.lengths.tolist()) == ({4, 5} if ragged else {3})
    assert (tokens.index.num_sids < tokens.index.num_items) == ragged
    queries = shop.queries(20, np.random.default_rng(0))
    prompts = tokens.prompts(queries)
    tokenizer = tokens.tokenizer(shop)
    assert len(tokenizer) == tokens.size
    for row, prompt in enumerate(prompts):
        assert tokenizer(shop.text(queries.rows(slice(row, row + 1))))["input_ids"] == prompt
        assert len(prompt) == 4 + int(queries.style[row] >= 0) + int(queries.colour[row] >= 0)
    used = set(range(tokens.firsts[-1] + len(COLOURS)))
    assert not used & set(tokens.of_item.flatten().tolist())


def test_words_are_those_of_the_query(shop: SearchShop) -> None:
    one = Queries(*(np.array([value]) for value in (0, 1, 2, 3, 3)))
    assert shop.words(one) == "blue modern lamp"
    assert shop.text(one) == "taste3 tier3 lamp modern blue"
    assert shop.words(one._replace(style=np.array([-1]))) == "blue lamp"
    assert shop.shopper(one).endswith(f"buys {TIERS[3]}")
    assert len(shop.titles()) == len(shop.worth)


def test_sessions_are_of_the_page(shop: SearchShop) -> None:
    log = draw(shop, 3000)
    found = sessions_of(log, np.random.default_rng(0), 3, 8)
    assert found.positives.shape == (3000, 3)
    assert found.negatives.shape == (3000, 8)
    assert found.prompt_lengths.tolist() == [len(prompt) - 1 for prompt in Tokens.of(shop).prompts(log.queries)]
    firsts = []
    for row in range(3000):
        clicked, ordered = set(log.shown[row][log.clicked[row]]), set(log.shown[row][log.ordered[row]])
        liked = [item for item in found.positives[row].tolist() if item >= 0]
        passed = [item for item in found.negatives[row].tolist() if item >= 0]
        assert len(set(liked)) == len(liked) == min(3, len(clicked))
        assert set(liked) <= clicked
        assert liked[0] in (ordered or clicked)
        assert set(passed) <= set(log.shown[row]) - clicked
        assert len(set(passed)) == len(passed) == min(8, 12 - len(clicked))
        firsts.append(log.shown[row].tolist().index(passed[0]))
    assert np.bincount(firsts, minlength=12).min() > 100  # in random order


def test_a_batch_holds_the_candidates(shop: SearchShop) -> None:
    tokens = Tokens.of(shop, ragged=True)
    found = sessions_of(draw(shop, 20), np.random.default_rng(0), 3, 8)
    prompts, batch = found.rows(torch.arange(5, 10)).batch(tokens, 2, 4)
    assert len(prompts) == batch.num_sessions == 5
    row = 0
    for session in range(5):
        items = found.positives[5 + session, :2].tolist() + found.negatives[5 + session, :4].tolist()
        for item in (item for item in items if item >= 0):
            length = int(tokens.lengths[item])
            assert batch.tokens[row, :length].tolist() == tokens.of_item[item, :length].tolist()
            assert int(batch.lengths[row]) == length
            row += 1
        assert int(batch.offsets[session + 1]) == row
