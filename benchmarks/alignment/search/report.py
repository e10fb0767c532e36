"""The search experiment's summary: Markdown tables and plots, from the cells."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from benchmarks.alignment.records import Cell
from benchmarks.alignment.search import grid
from benchmarks.alignment.search.cells import GAIN, SearchLab
from benchmarks.alignment.search.grid import Answer
from benchmarks.alignment.statistics import unpack
from benchmarks.harness.report import ROOT, markdown

MEANS = ("ndcg@10", "orders@10", "coverage@20", "entropy", "invalid@10")


class Change(NamedTuple):
    """The change of a metric from SFT.

    Attributes:
        mean: over shops, initializations and queries.
        low, high: 95 % percentile interval of a bootstrap that draws shops, and queries within each.
        error: the standard deviation of that bootstrap.
        shops: the mean of each shop.
    """

    mean: float
    low: float
    high: float
    error: float
    shops: list[float]

    @property
    def p(self) -> float:
        """Two-sided, of a normal distribution with this error."""
        return math.erfc(abs(self.mean) / self.error / math.sqrt(2)) if self.error > 0 else 1.0


def change(tables: list[np.ndarray], resamples: int, seed: int = 0) -> Change:
    """Of differences by shop, each a column ``[queries]``."""
    rng = np.random.default_rng(seed)
    shops = [float(values.mean()) for values in tables]
    means = np.empty(resamples)
    for sample in range(resamples):
        drawn = (tables[shop] for shop in rng.integers(len(tables), size=len(tables)))
        means[sample] = np.mean([values[rng.integers(len(values), size=len(values))].mean() for values in drawn])
    low, high = np.quantile(means, [0.025, 0.975])
    return Change(float(np.mean(shops)), float(low), float(high), float(means.std()), shops)


def holm(p: dict[str, float]) -> dict[str, float]:
    """Each p-value adjusted for all of them (Holm)."""
    adjusted, largest = {}, 0.0
    for place, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - place) * p[name]))
        adjusted[name] = largest
    return adjusted


def write(lab: SearchLab) -> None:
    """Prints the tables and draws the plots; those of the full experiment go to the repository."""
    from benchmarks.alignment.search import plots

    full = lab.scale.name == "full"
    rows, points = main_rows(lab), asked(lab)
    print("\n\n".join([*main_tables(rows), *question_tables(points), *default_tables(lab)]))
    plots.draw(rows, points, ROOT / "docs" / "figures" if full else lab.cache / "figures")


def main_rows(lab: SearchLab) -> dict[str, dict[str, Any]]:
    """By method: the setting, the means, and the changes from SFT in NDCG and orders."""
    scale, found = lab.scale, {}
    base = {metric: _by_shop(lab, "sft", metric) for metric in ("ndcg", "orders")}
    for method in ("sft", *scale.methods):
        cells = [grid.test(lab, method, shop, init) for shop in scale.shops for init in scale.inits]
        results = [lab.run(cell)["result"] for cell in cells]
        row: dict[str, Any] = {"setting": grid.tuned(lab, method)}
        row |= {name: float(np.mean([result[name] for result in results])) for name in MEANS}
        if method != "sft":
            row["drift"] = [float(np.mean([r["drift"][name] for r in results])) for name in results[0]["drift"]]
            for metric, start in base.items():
                values = _by_shop(lab, method, metric)
                row[metric] = change([a - b for a, b in zip(values, start, strict=True)], scale.resamples)
        found[method] = row
    for metric in base:
        adjusted = holm({method: row[metric].p for method, row in found.items() if method != "sft"})
        for method, p in adjusted.items():
            found[method][f"{metric}_p"] = p
    return found


def _by_shop(lab: SearchLab, method: str, metric: str) -> list[np.ndarray]:
    """Of each shop's queries the mean over the initializations."""
    return [
        np.mean([values_of(lab, grid.test(lab, method, shop, init), metric) for init in lab.scale.inits], 0)
        for shop in lab.scale.shops
    ]


def values_of(lab: SearchLab, cell: Cell, metric: str) -> np.ndarray:
    values: np.ndarray = unpack(lab.run(cell)["result"][metric]) / {"ndcg": 255, "orders": GAIN}[metric]
    return values


def asked(lab: SearchLab) -> list[tuple[Answer, dict[str, Any]]]:
    """Every point of the questions, with its means and its change from SFT in the same world."""
    found = []
    for answer in grid.asked(lab):
        start, cells = grid.starts(lab, answer), grid.points(lab, answer)
        results = [lab.run(cell)["result"] for cell in cells]
        row: dict[str, Any] = {name: float(np.mean([r[name] for r in results])) for name in MEANS if name in results[0]}
        differences = [values_of(lab, a, "ndcg") - values_of(lab, b, "ndcg") for a, b in zip(cells, start, strict=True)]
        row["ndcg"] = change(differences, lab.scale.resamples)
        found.append((answer, row))
    return found


def main_tables(rows: dict[str, dict[str, Any]]) -> list[str]:
    head = ["method", "setting", "NDCG@10", "less SFT's, 95 %", "p (Holm)", "by shop", "orders@10", "less SFT's, 95 %"]
    body, side = [], []
    for method, row in rows.items():
        line = [f"`{method}`", _setting(row["setting"]), f"{row['ndcg@10']:.4f}"]
        if method == "sft":
            line += ["", "", "", f"{row['orders@10']:.3f}", ""]
        else:
            shops = " ".join(f"{value:+.3f}" for value in row["ndcg"].shops)
            line += [_interval(row["ndcg"]), _p(row["ndcg_p"]), shops, f"{row['orders@10']:.3f}"]
            line += [_interval(row["orders"])]
        body.append(line)
        drift = [f"{value:+.2f}" for value in row.get("drift", ())] or ["", "", ""]
        side.append(
            [f"`{method}`", f"{row['coverage@20']:.4f}", f"{row['invalid@10']:.2%}", f"{row['entropy']:.2f}", *drift]
        )
    drifts = ("drift of winner", "of further positives", "of negatives")
    return [markdown(head, body), markdown(["method", "coverage@20", "invalid@10", "entropy", *drifts], side)]


def question_tables(points: list[tuple[Answer, dict[str, Any]]]) -> list[str]:
    tables = []
    for question in dict.fromkeys(answer.question for answer, _ in points):
        body = [
            [answer.value, f"`{answer.method}`", f"{row['ndcg@10']:.4f}", _interval(row["ndcg"]), _share(row)]
            for answer, row in points
            if answer.question == question
        ]
        tables.append(markdown([question, "method", "NDCG@10", "less SFT's, 95 %", "invalid@10"], body))
    return tables


def default_tables(lab: SearchLab) -> list[str]:
    """The candidates for the defaults by validation NDCG@10, and every setting of the grid."""
    body = []
    for name, cells in grid.validation(lab).items():
        scores = [lab.run(cell)["result"]["page_ndcg"] for cell in cells]
        by_shop = " ".join(f"{score:.4f}" for score in scores)
        body.append([f"`{name}`", _setting(cells[0].args["setting"]), f"{np.mean(scores):.4f}", by_shop])
    grids = []
    for method in lab.scale.methods:
        scores: dict[str, list[list[float]]] = {}
        for cell in grid.tuning(lab, method):
            result = lab.run(cell)["result"]
            scores.setdefault(_setting(cell.args["setting"]), []).append([result[by] for by in grid.BY.values()])
        texts = {name: np.mean(value, 0) for name, value in scores.items()}
        grids.append([f"`{method}`", ", ".join(f"{name}: {a:.4f} {b:.4f}" for name, (a, b) in texts.items())])
    return [
        markdown(["candidate", "setting", "validation: NDCG among the shown", "by shop"], body),
        markdown(["method", "validation by setting: NDCG among the shown, NDCG@10 of the retrieval"], grids),
    ]


def _interval(difference: Change) -> str:
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _setting(setting: dict[str, float]) -> str:
    return " / ".join(f"{value:g}" for value in setting.values())


def _share(row: dict[str, Any]) -> str:
    return f"{row['invalid@10']:.2%}" if "invalid@10" in row else ""


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< .001"
