"""What the search demo measures and shows: rankings against the truth, and some queries as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from demo.measure import interval, invalid_shares, retrieve_freely
from demo.search.data import Tokens
from demo.search.model import retrieve
from demo.search.shop import Queries, SearchShop, ndcg

BEAMS = 50
FREE_BEAMS = 20  # of the search without the index


class Ranking(NamedTuple):
    """What a model or the old ranker retrieves, and how good that is.

    Attributes:
        items: int64 ``[B, >= 10]``, best first.
        truth: float64 ``[B, 10]``, the true probability of an order by a shopper who looks at each of the ten best.
        ndcg: float64 ``[B]``, NDCG@10 by the truth.
        invalid: the share of the ten best of a search without the index that are no item; None for the old ranker.
    """

    items: np.ndarray
    truth: np.ndarray
    ndcg: np.ndarray
    invalid: float | None


def rank(model: Qwen3ForCausalLM, tokens: Tokens, queries: Queries, truth: np.ndarray) -> Ranking:
    items = retrieve(model, tokens, queries, BEAMS, BEAMS).numpy()
    free = retrieve_freely(model, tokens.prompts(queries), tokens.vocab.levels, FREE_BEAMS)[:, :10]
    return ranking(items, truth, float(invalid_shares(tokens.index, free).mean()))


def ranking(items: np.ndarray, truth: np.ndarray, invalid: float | None = None) -> Ranking:
    best = items[:, :10]
    found = np.where(best >= 0, np.take_along_axis(truth, np.maximum(best, 0), 1), 0.0)
    return Ranking(items, found, ndcg(truth, items), invalid)


def table(rankings: dict[str, Ranking], base: str) -> list[str]:
    """A line per ranking: NDCG@10, expected orders and invalid share, with the changes from ``base``."""
    lines = [f"{'':12}{'NDCG@10':>9}   {'change, 95 % interval':27}{'orders':>8}   {'change, 95 % interval':27}invalid"]
    for name, found in rankings.items():
        line = f"{name:12}"
        for values, start in ((found.ndcg, rankings[base].ndcg), (found.truth.sum(1), rankings[base].truth.sum(1))):
            change = "" if found.invalid is None or name == base else _change(values - start)
            line += f"{values.mean():{9 if values is found.ndcg else 8}.4f}   {change:27}"
        lines.append((line + ("" if found.invalid is None else f"{found.invalid:7.2%}")).rstrip())
    return lines


def _change(differences: np.ndarray) -> str:
    low, high = interval(torch.from_numpy(differences))
    return f"{differences.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def kinds(queries: Queries) -> list[int]:
    """The first query with a style and a colour word, the first with one of them, and the first with none."""
    words = (queries.style >= 0) * 1 + (queries.colour >= 0)
    return [int(np.flatnonzero(words == count)[0]) for count in (2, 1, 0) if (words == count).any()]


def example(shop: SearchShop, query: Queries, truth: np.ndarray, columns: dict[str, Sequence[int]]) -> list[str]:
    """One query: its words, the shopper, and each column's five best items with the true probability of an order."""
    titles = shop.titles()
    lines = [f'  "{shop.words(query)}", typed by a shopper who {shop.shopper(query)}']
    cells = [
        [f"{truth[item]:4.0%}  {titles[item]}" if item >= 0 else "" for item in list(items)[:5]]
        for items in columns.values()
    ]
    width = 3 + max(len(text) for column in cells for text in column)
    lines.append("    " + "".join(f"{name:{width}}" for name in columns).rstrip())
    lines += ["    " + "".join(f"{text:{width}}" for text in row).rstrip() for row in zip(*cells, strict=True)]
    return lines
