"""The cells of the experiment on the search shop: which methods, settings, shops and questions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from benchmarks.alignment.records import Cell
from benchmarks.alignment.search.cells import SearchLab
from benchmarks.alignment.search.methods import METHODS
from demo.search.shop import CLEAN

WEIGHTS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the SFT term, at RAD-DPO's tuned rate and beta
CANDIDATES = ("rad_dpo", "rad_dpo_no_rdrw")  # for the defaults, each with and without most of its SFT term
MAIN = ("sft_all_positives", "s_dpo", "simpo_all_negatives", "rad_dpo", "rad_dpo_no_sft")

# What a setting can be tuned by without the truth.
BY = {"orders among the shown": "page_ndcg", "orders in the retrieval": "ndcg@10"}

# Siblings per prefix: category x style.
SIBLINGS = {2: {"categories": 20, "styles": 25}, 8: {}, 32: {"categories": 10, "styles": 3}}


class Answer(NamedTuple):
    """A point of a question: a method in a world, on sessions of these knobs, with what is changed of its setting."""

    question: str
    value: str
    method: str
    knobs: dict[str, Any] = {}  # noqa: RUF012
    world: dict[str, Any] = {}  # noqa: RUF012
    change: dict[str, float] = {}  # noqa: RUF012
    tuned_by: str = "page_ndcg"


def asked(lab: SearchLab) -> list[Answer]:
    """The points of the scale's questions by its methods."""
    scale = lab.scale
    there = (answer for answer in answers() if answer.method in ("sft", *scale.methods))
    return [answer for answer in there if scale.questions is None or answer.question in scale.questions]


def answers() -> list[Answer]:
    """The points of every question."""
    found = [Answer("negatives", str(count), "rad_dpo", {"negatives": count}) for count in (1, 2, 4, 8)]
    found += [Answer("negatives", "8 random", "rad_dpo", {"random": True})]
    for method in ("rad_dpo", "rad_dpo_no_rdrw"):
        found += [Answer("false negatives", f"{share:g}", method, {"false": share}) for share in (0.0, 0.3, 0.6)]
        found += [Answer("twins of the winner", f"{share:g}", method, {"twins": share}) for share in (0.3, 0.6)]
    for count, world in SIBLINGS.items():
        for method in ("sft", "rad_dpo", "rad_dpo_no_tlgd"):
            change = {} if method == "sft" else {"sft_weight": 1.0}
            found.append(Answer("siblings per prefix", str(count), method, world=world, change=change))
    found += [Answer("SFT weight", f"{weight:g}", "rad_dpo", change={"sft_weight": weight}) for weight in WEIGHTS]
    for weight in (0.0, 0.1, 1.0):
        for method in ("rad_dpo", "rad_dpo_no_tlgd", "rad_dpo_no_rdrw"):
            found.append(Answer("parts at one SFT weight", f"{weight:g}", method, change={"sft_weight": weight}))
    for share in (0.0, 0.3, 0.6):
        found.append(Answer("wrong orders", f"{share:g}", "rad_dpo", {"wrong_orders": share}))
    found.append(Answer("wrong orders", "clicks only", "rad_dpo", {"clicks_only": True}))
    found += [Answer("sessions", str(count), "rad_dpo", {"sessions": count}) for count in (500, 1500, 5000, 15000)]
    found += [Answer("positives", str(count), "rad_dpo", {"positives": count}) for count in (1, 3, 8)]
    for by, metric in BY.items():
        found += [Answer("tuned by", by, method, tuned_by=metric) for method in MAIN]
    for name, world in (("clean clicks", CLEAN), ("SIDs of 3 and 4 codes", {"ragged": True})):
        found += [Answer(name, method, method, world=world) for method in ("sft", *MAIN)]
    return found


def stages(lab: SearchLab) -> Iterator[list[Cell]]:
    """The grid, in stages that need only the results of those before."""
    scale = lab.scale
    yield [sft(shop, init) for init in scale.inits for shop in scale.shops]
    yield [cell for method in scale.methods for cell in tuning(lab, method)]
    yield [cell for group in validation(lab).values() for cell in group]
    methods = ("sft", *scale.methods)
    yield [test(lab, method, shop, init) for init in scale.inits for shop in scale.shops for method in methods]
    yield [cell for answer in asked(lab) for cell in points(lab, answer)]


def sft(shop: int, init: int) -> Cell:
    return Cell(f"sft-{shop}-{init}", "sft", {"shop": shop, "init": init, "world": {}})


def tuning(lab: SearchLab, method: str) -> list[Cell]:
    """By setting, a cell per shop that is tuned on."""
    settings = METHODS[method].settings[: lab.scale.settings]
    return [_tune(lab, method, setting, shop) for setting in settings for shop in lab.scale.shops[: lab.scale.tuned_on]]


def tuned(lab: SearchLab, method: str, by: str = "page_ndcg", **fixed: float) -> dict[str, float]:
    """The setting of the highest mean validation metric ``by``, of those that have ``fixed`` in them."""
    if method == "sft":
        return {}
    cells = [cell for cell in tuning(lab, method) if fixed.items() <= cell.args["setting"].items()]
    groups = np.array_split(np.array([lab.run(cell)["result"][by] for cell in cells]), len(cells) // _shops(lab))
    best = int(np.argmax([group.mean() for group in groups]))
    setting: dict[str, float] = cells[best * _shops(lab)].args["setting"]
    return setting


def validation(lab: SearchLab) -> dict[str, list[Cell]]:
    """The candidates for the defaults, each at the best setting of its SFT weight, on every shop."""
    found = {}
    for method in CANDIDATES:
        if method in lab.scale.methods:
            for weight in sorted({setting["sft_weight"] for setting in METHODS[method].settings[: lab.scale.settings]}):
                setting = tuned(lab, method, sft_weight=weight)
                cells = [_tune(lab, method, setting, shop) for shop in lab.scale.shops]
                found[f"{method}, sft_weight={weight:g}"] = cells
    return found


def test(lab: SearchLab, method: str, shop: int, init: int) -> Cell:
    args = {"method": method, "setting": tuned(lab, method), "shop": shop, "init": init, "world": {}, "knobs": {}}
    return Cell(f"test-{method}-{shop}-{init}", "test", args)


def points(lab: SearchLab, answer: Answer) -> list[Cell]:
    """A cell per shop that is asked; the main table's where it is the same."""
    cells = []
    for shop in lab.scale.shops[: lab.scale.asked_on]:
        args = {**test(lab, answer.method, shop, lab.scale.inits[0]).args}
        setting = {**tuned(lab, answer.method, answer.tuned_by), **answer.change}
        args |= {"world": answer.world, "knobs": answer.knobs, "setting": setting}
        name = f"ask-{answer.question}-{answer.value}-{answer.method}-{shop}".replace(" ", "_")
        cells.append(Cell(name, "test", args))
    return cells


def starts(lab: SearchLab, answer: Answer) -> list[Cell]:
    """SFT's cells in the world of an answer, a cell per shop that is asked."""
    if not answer.world:
        return [test(lab, "sft", shop, lab.scale.inits[0]) for shop in lab.scale.shops[: lab.scale.asked_on]]
    return points(lab, next(a for a in answers() if (a.method, a.world) == ("sft", answer.world)))


def _tune(lab: SearchLab, method: str, setting: dict[str, float], shop: int) -> Cell:
    args = {"method": method, "setting": setting, "shop": shop, "init": lab.scale.inits[0], "world": {}, "knobs": {}}
    text = "-".join(f"{name}{value:g}" for name, value in setting.items())
    return Cell(f"tune-{method}-{text}-{shop}", "tune", args)


def _shops(lab: SearchLab) -> int:
    return len(lab.scale.shops[: lab.scale.tuned_on])
