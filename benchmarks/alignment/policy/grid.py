"""Which cells: every method at every learning rate on the first shop, and at its best on all of them."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.alignment.policy.cells import REFERENCE, SETTINGS, PolicyLab
from benchmarks.alignment.policy.methods import LEARNING_RATES
from benchmarks.alignment.records import Cell


def stages(lab: PolicyLab) -> Iterator[list[Cell]]:
    """The grid, in stages that need only the results of those before."""
    yield [Cell(f"sft-{shop}", "sft", {"shop": shop, "init": 0, "world": {}}) for shop in lab.scale.shops]
    yield [cell for method in lab.scale.methods for cell in tuning(lab, method)]
    yield [test(lab, method, shop) for shop in lab.scale.shops for method in (*REFERENCE, *lab.scale.methods)]


def tuning(lab: PolicyLab, method: str) -> list[Cell]:
    """On the first shop, a cell per learning rate."""
    return [
        Cell(f"tune-{method}-lr{lr:g}", "tune", _args(method, {"lr": lr}, lab.scale.shops[0]))
        for lr in LEARNING_RATES[: lab.scale.settings]
    ]


def tuned(lab: PolicyLab, method: str) -> dict[str, float]:
    """The setting of the highest NDCG of validation pages' ordered items among what was shown with them."""
    if method in REFERENCE:
        return SETTINGS.get(method, {})
    best = max(tuning(lab, method), key=lambda cell: lab.run(cell)["result"]["page_ndcg"])
    setting: dict[str, float] = best.args["setting"]
    return setting


def test(lab: PolicyLab, method: str, shop: int) -> Cell:
    return Cell(f"test-{method}-{shop}", "test", _args(method, tuned(lab, method), shop))


def _args(method: str, setting: dict[str, float], shop: int) -> dict[str, object]:
    return {"method": method, "setting": setting, "shop": shop, "init": 0, "world": {}, "knobs": {}}
