"""A made-up shop: items with hierarchical SIDs and readable names, and shoppers who have a taste."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from raddpo_ext.data.catalogue import CODES, Case, Catalogue

COLOURS = ["black", "white", "blue", "red", "green", "grey", "brown", "yellow", "pink", "purple", "orange", "turquoise"]
CLOTHES_SIZES, SHOE_SIZES, NO_SIZE = ("S", "M", "L", "XL"), ("38", "40", "42", "44"), ()
MAKERS = ("Alder", "Birch")


class Department(NamedTuple):
    kinds: tuple[str, ...]  # bought in this order, roughly
    materials: tuple[str, ...]
    sizes: tuple[str, ...]


DEPARTMENTS = (
    Department(
        ("shirt", "trousers", "jacket", "sweater", "dress", "scarf"), ("cotton", "linen", "wool"), CLOTHES_SIZES
    ),
    Department(("sneakers", "boots", "sandals"), ("leather", "canvas"), SHOE_SIZES),
    Department(("mug", "plate", "bowl", "teapot", "vase"), ("ceramic", "glass", "steel"), NO_SIZE),
    Department(("lamp", "rug", "cushion", "curtain", "stool"), ("cotton", "wool", "bamboo"), NO_SIZE),
    Department(("notebook", "pencil", "candle", "umbrella"), (), NO_SIZE),
)
MAX_LEVELS = 4  # kind, colour, material, size
SOLD = 0.75  # share of the combinations that the shop sells
TWO_MAKERS = 0.08  # share of those that two makers sell: two items, one SID


def make_shop(shoppers: int, seed: int) -> Catalogue:
    """The shop after each of ``shoppers`` made 8 to 14 purchases, the last two of which are held out.

    A SID is (kind, colour, material, size) as far as the kind has them. Sized kinds are sold in one size too, so that
    "red cotton shirt" is a proper prefix of "red cotton shirt M".
    """
    rng = np.random.default_rng(seed)
    titles: list[str] = []
    sids: list[tuple[int, ...]] = []
    items_of: dict[tuple[int, ...], list[int]] = {}
    for sid, title in _combinations():
        if rng.random() > SOLD:
            continue
        makers = [f" ({maker})" for maker in MAKERS] if rng.random() < TWO_MAKERS else [""]
        items_of[sid] = [*range(len(sids), len(sids) + len(makers))]
        titles += [title + maker for maker in makers]
        sids += [sid] * len(makers)
    order = rng.permutation(len(sids))  # the rows of a catalogue come in no order
    place = np.argsort(order)
    items_of = {sid: [int(place[item]) for item in items] for sid, items in items_of.items()}
    purchases = [_shop(rng, items_of) for _ in range(shoppers)]
    padded = np.array([(*sids[item], *[-1] * (MAX_LEVELS - len(sids[item]))) for item in order])
    return Catalogue(
        name="shop",
        sids=padded,
        lengths=(padded >= 0).sum(1),
        sizes=(CODES,) * MAX_LEVELS,
        titles=[titles[item] for item in order],
        train=[items[:-2] for items in purchases],
        valid=[Case(items[:-2], items[-2]) for items in purchases],
        test=[Case(items[:-1], items[-1]) for items in purchases],
    )


def _combinations() -> list[tuple[tuple[int, ...], str]]:
    """SID and title of everything that could be sold."""
    found: list[tuple[tuple[int, ...], str]] = []
    kind_code = 0
    for department in DEPARTMENTS:
        for kind in department.kinds:
            for colour_code, colour in enumerate(COLOURS):
                if not department.materials:
                    found.append(((kind_code, colour_code), f"{colour} {kind}"))
                for material_code, material in enumerate(department.materials):
                    sid, title = (kind_code, colour_code, material_code), f"{colour} {material} {kind}"
                    found.append((sid, title))
                    found += [((*sid, code), f"{title} {size}") for code, size in enumerate(department.sizes)]
            kind_code += 1
    return found


def _shop(rng: np.random.Generator, items_of: dict[tuple[int, ...], list[int]]) -> list[int]:
    """One shopper's purchases: a department for a while, kinds in their order, a favourite colour, one size."""
    first_kind = np.cumsum([0, *(len(department.kinds) for department in DEPARTMENTS)])
    colours = rng.choice(len(COLOURS), 2, replace=False, p=_falling(len(COLOURS)))
    taste, size, maker = int(rng.integers(6)), int(rng.integers(4)), int(rng.integers(len(MAKERS)))
    area, kind = int(rng.choice(len(DEPARTMENTS), p=_falling(len(DEPARTMENTS)))), 0
    bought: list[int] = []
    wanted = int(rng.integers(8, 15))
    while len(bought) < wanted:
        if rng.random() < 0.15:
            area = int(rng.integers(len(DEPARTMENTS)))
        department = DEPARTMENTS[area]
        kind = (kind + 1 if rng.random() < 0.7 else int(rng.integers(9))) % len(department.kinds)
        colour = int(colours[int(rng.random() < 0.3)]) if rng.random() < 0.85 else int(rng.integers(len(COLOURS)))
        sid = [int(first_kind[area]) + kind, colour]
        if department.materials:
            sid.append((taste if rng.random() < 0.85 else int(rng.integers(6))) % len(department.materials))
        if department.sizes and rng.random() < 0.9:
            sid.append(size if rng.random() < 0.9 else int(rng.integers(4)))
        items = items_of.get(tuple(sid), [])
        if items and items[maker % len(items)] not in bought:
            bought.append(items[maker % len(items)])
    return bought


def _falling(count: int) -> np.ndarray:
    weights = 1 / np.arange(1, count + 1)
    return weights / weights.sum()
