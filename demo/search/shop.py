"""A simulated search shop: a catalogue, shoppers who type words, an old ranker, and the clicks and orders it brings.

It knows nothing of any model or loss. Whoever looks at an item orders it with a probability that is known here, so that
a ranking can be measured against the truth and not against the log. :class:`Constants` holds every number; they were
set by the look of the log alone (clicks and orders per page, the share of the best items that are shown).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

CATEGORIES = (
    "lamp",
    "rug",
    "chair",
    "mug",
    "jacket",
    "bag",
    "watch",
    "kettle",
    "blanket",
    "mirror",
    "clock",
    "vase",
    "shelf",
    "desk",
    "scarf",
    "tent",
    "bottle",
    "basket",
    "curtain",
    "candle",
)
STYLES = (
    "classic",
    "modern",
    "rustic",
    "nordic",
    "retro",
    "boho",
    "industrial",
    "minimal",
    "coastal",
    "japanese",
    "gothic",
    "art-deco",
    "country",
    "tropical",
    "urban",
    "baroque",
    "floral",
    "striped",
    "quilted",
    "woven",
    "alpine",
    "moroccan",
    "futuristic",
    "vintage",
    "plain",
)
COLOURS = ("black", "white", "blue", "red", "green", "grey", "brown", "yellow", "pink", "purple", "orange", "turquoise")
TIERS = ("budget", "standard", "fine", "luxury")


@dataclass(frozen=True)
class Constants:
    """Every number of the simulator.

    Attributes:
        items: about how many the shop sells.
        categories, styles: of the catalogue; ``items / (categories * styles)`` is the number of siblings, the items
            that share the SID's first two codes.
        tastes: kinds of shopper, each with likings of its own for styles and colours.
        style_word, colour_word: how often a query has such a word.
        style, colour, taste, tier, worth: weights of the utility: of a word that is met, of the shopper's liking where
            there is no word, of each tier between the item's and the shopper's budget, and of the item's latent worth.
        page: items that the old ranker shows.
        ranker_words, ranker_static, ranker_noise: its weights of the words met and of its static score, and the
            standard deviation of its noise. It does not know the shopper.
        static_worth: the correlation of its static score with the worth.
        examination: a shopper examines the item at place ``p`` (from 0) with probability ``1 / (1 + examination p)``.
        click, click_attraction, click_bait: the log-odds of a click on an examined item: at utility 0, per unit of
            utility, and per unit of bait.
        click_worth: the share of the worth that the page shows; the rest shows after the click.
        order, order_utility: the log-odds of an order by a shopper who looks at an item: at utility 0, and per unit of
            utility.
        wrong_orders: the share of orders that the log books on another clicked item.
    """

    items: int = 1000
    categories: int = 20
    styles: int = 6
    tastes: int = 12
    style_word: float = 0.6
    colour_word: float = 0.6
    style: float = 1.5
    colour: float = 1.2
    taste: float = 1.0
    tier: float = 0.8
    worth: float = 1.0
    page: int = 12
    ranker_words: float = 1.0
    ranker_static: float = 0.8
    ranker_noise: float = 0.4
    static_worth: float = 0.6
    examination: float = 0.15
    click: float = -1.2
    click_attraction: float = 0.7
    click_worth: float = 0.5
    click_bait: float = 1.0
    order: float = -3.4
    order_utility: float = 1.2
    wrong_orders: float = 0.0


#: The same shop where everything shown is examined and nothing is bait.
CLEAN = {"examination": 0.0, "click_bait": 0.0}


class Queries(NamedTuple):
    """What shoppers ask for: int64 ``[B]`` each; ``style`` and ``colour`` are -1 without such a word."""

    category: np.ndarray
    style: np.ndarray
    colour: np.ndarray
    taste: np.ndarray
    budget: np.ndarray

    def rows(self, rows: object) -> Queries:
        return Queries(*(column[rows] for column in self))


class Log(NamedTuple):
    """Pages that the old ranker showed, each with at least one click.

    Attributes:
        queries: of ``S`` pages.
        shown: int64 ``[S, page]`` items, the first place first.
        clicked, ordered: bool ``[S, page]``; what is ordered was clicked.
    """

    queries: Queries
    shown: np.ndarray
    clicked: np.ndarray
    ordered: np.ndarray

    def rows(self, rows: object) -> Log:
        return Log(self.queries.rows(rows), self.shown[rows], self.clicked[rows], self.ordered[rows])


@dataclass(frozen=True)
class SearchShop:
    """A shop of one seed.

    Attributes:
        constants: of the simulator.
        attributes: int64 ``[N, 4]``: category, style, tier and colour of each item.
        worth, bait, static: float64 ``[N]``, what is seen of an item only after a click, what draws clicks alone, and
            what the old ranker believes.
        likes_style, likes_colour: float64 ``[tastes, styles]`` and ``[tastes, colours]``.
    """

    constants: Constants
    attributes: np.ndarray
    worth: np.ndarray
    bait: np.ndarray
    static: np.ndarray
    likes_style: np.ndarray
    likes_colour: np.ndarray
    members: np.ndarray = field(repr=False)  # [categories, M] items, -1 beyond the category's last

    @classmethod
    def make(cls, seed: int, constants: Constants | None = None) -> SearchShop:
        constants = Constants() if constants is None else constants
        rng = np.random.default_rng([seed, 0])
        pairs, kinds = constants.categories * constants.styles, len(TIERS) * len(COLOURS)
        # Each prefix has its share of the items, one more or less at random; an item is a tier and a colour.
        counts = np.full(pairs, constants.items // pairs) + (rng.random(pairs) < constants.items / pairs % 1)
        rows = [
            (pair // constants.styles, pair % constants.styles, *divmod(int(kind), len(COLOURS)))
            for pair, count in enumerate(counts)
            for kind in np.sort(rng.choice(kinds, min(int(count), kinds), replace=False))
        ]
        attributes = np.array(rows)[rng.permutation(len(rows))]  # the rows of a catalogue come in no order
        worth, bait, other = rng.standard_normal((3, len(rows)))
        share = constants.static_worth
        by_category = [np.flatnonzero(attributes[:, 0] == category) for category in range(constants.categories)]
        widest = max(map(len, by_category))
        return cls(
            constants,
            attributes,
            worth,
            bait,
            share * worth + (1 - share**2) ** 0.5 * other,
            rng.standard_normal((constants.tastes, constants.styles)),
            rng.standard_normal((constants.tastes, len(COLOURS))),
            np.stack([np.pad(items, (0, widest - len(items)), constant_values=-1) for items in by_category]),
        )

    def queries(self, count: int, rng: np.random.Generator) -> Queries:
        constants = self.constants
        category = rng.integers(constants.categories, size=count)
        style = np.where(rng.random(count) < constants.style_word, rng.integers(constants.styles, size=count), -1)
        colour = np.where(rng.random(count) < constants.colour_word, rng.integers(len(COLOURS), size=count), -1)
        return Queries(
            category, style, colour, rng.integers(constants.tastes, size=count), rng.integers(len(TIERS), size=count)
        )

    def order_probability(self, queries: Queries) -> np.ndarray:
        """The truth: of each shopper who looks at an item, for all items, float64 ``[B, N]``; 0 in another category."""
        constants = self.constants
        items = np.broadcast_to(np.arange(len(self.worth)), (len(queries.category), len(self.worth)))
        logits = constants.order + constants.order_utility * self._utility(queries, items)
        return np.where(self.attributes[items, 0] == queries.category[:, None], _sigmoid(logits), 0.0)

    def log(self, count: int, rng: np.random.Generator) -> Log:
        """The first ``count`` pages with a click."""
        parts: list[Log] = []
        while sum(len(part.shown) for part in parts) < count:
            parts.append(self._visited(self.queries(count, rng), rng))
        pages = Log(
            Queries(*(np.concatenate(columns) for columns in zip(*(part.queries for part in parts), strict=True))),
            *(np.concatenate([part[place] for part in parts]) for place in (1, 2, 3)),
        )
        return pages.rows(slice(0, count))

    def pages(self, queries: Queries, rng: np.random.Generator) -> np.ndarray:
        """What the old ranker shows, the first place first: int64 ``[B, page]``, -1 beyond the category's last item.

        It ranks by the words met, its static score, and noise.
        """
        constants = self.constants
        items = self.members[queries.category]
        style, colour = self.attributes[items, 1], self.attributes[items, 3]
        met = (style == queries.style[:, None]) + 1.0 * (colour == queries.colour[:, None])
        scores = constants.ranker_words * met + constants.ranker_static * self.static[items]
        scores = scores + constants.ranker_noise * rng.standard_normal(items.shape)
        best = np.argsort(np.where(items >= 0, -scores, np.inf), 1, kind="stable")[:, : constants.page]
        return np.take_along_axis(items, best, 1)

    def _visited(self, queries: Queries, rng: np.random.Generator) -> Log:
        """The pages with a click: shoppers examine, click on what attracts, and order what is worth it."""
        constants = self.constants
        shown = self.pages(queries, rng)
        utility = self._utility(queries, shown)
        attraction = utility - (1 - constants.click_worth) * constants.worth * self.worth[shown]
        examined = rng.random(shown.shape) < 1 / (1 + constants.examination * np.arange(shown.shape[1]))
        clicks = constants.click + constants.click_attraction * attraction + constants.click_bait * self.bait[shown]
        clicked = examined & (shown >= 0) & (rng.random(shown.shape) < _sigmoid(clicks))
        orders = constants.order + constants.order_utility * utility
        ordered = clicked & (rng.random(shown.shape) < _sigmoid(orders))
        if constants.wrong_orders:
            ordered = _moved(ordered, clicked, constants.wrong_orders, rng)
        return Log(queries, shown, clicked, ordered).rows(clicked.any(1))

    def titles(self) -> list[str]:
        """Of the items; two can have the same."""
        return [
            f"{TIERS[tier]} {STYLES[style]} {CATEGORIES[category]}, {COLOURS[colour]}"
            for category, style, tier, colour in self.attributes.tolist()
        ]

    def text(self, query: Queries) -> str:
        """One query as the model reads it: the shopper's taste and budget, then the words."""
        words = [f"taste{query.taste[0]}", f"tier{query.budget[0]}", CATEGORIES[query.category[0]]]
        words += [STYLES[style] for style in query.style if style >= 0]
        return " ".join(words + [COLOURS[colour] for colour in query.colour if colour >= 0])

    def words(self, query: Queries) -> str:
        """One query as the shopper types it."""
        *words, _, _ = reversed(self.text(query).split())
        return " ".join(words)

    def shopper(self, query: Queries) -> str:
        """What the shopper of one query likes."""
        style, colour = self.likes_style[query.taste[0]].argmax(), self.likes_colour[query.taste[0]].argmax()
        return f"likes {STYLES[style]} and {COLOURS[colour]}, and buys {TIERS[query.budget[0]]}"

    def _utility(self, queries: Queries, items: np.ndarray) -> np.ndarray:
        """Of items ``[B, M]`` to the shopper of each query, float64 ``[B, M]``."""
        constants = self.constants
        _, style, tier, colour = np.moveaxis(self.attributes[items], 2, 0)
        taste, worded = queries.taste[:, None], queries.style[:, None] >= 0
        by_style = np.where(
            worded,
            constants.style * (style == queries.style[:, None]),
            constants.taste * self.likes_style[taste, style],
        )
        by_colour = np.where(
            queries.colour[:, None] >= 0,
            constants.colour * (colour == queries.colour[:, None]),
            constants.taste * self.likes_colour[taste, colour],
        )
        distance = np.abs(tier - queries.budget[:, None])
        return by_style + by_colour - constants.tier * distance + constants.worth * self.worth[items]


def _moved(ordered: np.ndarray, clicked: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A share of the orders, each booked on a click of the same page drawn at random."""
    moved = ordered.copy()
    for row, place in np.argwhere(ordered & (rng.random(ordered.shape) < share)):
        moved[row, place] = False
        moved[row, rng.choice(np.flatnonzero(clicked[row]))] = True
    return moved


def ndcg(gains: np.ndarray, found: Sequence[Sequence[int]] | np.ndarray, k: int = 10) -> np.ndarray:
    """NDCG@k of rankings ``[B, >= k]`` by the true gains ``[B, N]``; -1 is an empty place. float64 ``[B]``."""
    places = np.asarray(found)[:, :k]
    discounts = 1 / np.log2(np.arange(2, 2 + places.shape[1]))
    got = np.where(places >= 0, np.take_along_axis(gains, np.maximum(places, 0), 1), 0.0)
    best = -np.partition(-gains, k - 1, axis=1)[:, :k]
    return (got @ discounts) / (-np.sort(-best, 1) @ (1 / np.log2(np.arange(2, 2 + k))))


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))
