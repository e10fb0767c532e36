"""The alignment experiment's summary: Markdown tables and plots, from the cells."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.alignment import grid
from benchmarks.alignment.cells import Lab
from benchmarks.alignment.evaluate import KS
from benchmarks.alignment.records import Cell
from benchmarks.alignment.statistics import Difference, ndcg, over_seeds, paired_bootstrap, unpack
from benchmarks.harness.report import ROOT, markdown
from raddpo_ext.data.catalogue import known_version

METRICS = [*(f"recall@{k}" for k in KS), "ndcg@10", "mrr"]
DRIFT = ("winner", "positives", "negatives")


def write(lab: Lab) -> None:
    """Prints the tables and draws the plots; those of the full and the wide experiment go to the repository."""
    figures = ROOT / "docs" / "figures" if lab.scale.name in ("full", "wide") else lab.cache / "figures"
    summary = summarise(lab)
    print("\n\n".join(tables(summary)))
    from benchmarks.alignment import plots as alignment_plots

    alignment_plots.draw(summary, figures, "alignment-wide" if lab.scale.wide else "alignment")


def summarise(lab: Lab) -> dict[str, Any]:
    stages = list(grid.stages(lab))
    records = {cell.name: lab.run(cell) for stage in stages for cell in stage}
    cells = {cell.name: cell for stage in stages for cell in stage}
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for name, cell in cells.items():
        if cell.kind == "test":
            groups.setdefault((cell.args["method"], cell.args["share"]), []).append(records[name])
    clean = {method: group for (method, share), group in groups.items() if not share}
    return {
        "data": {"version": known_version(lab.folder), "users": len(lab.data.test), "items": len(lab.data.sids)},
        "scale": asdict(lab.scale),
        "rows": rows(clean, lab.scale.resamples),
        "choices": {name: _readable(choice._asdict()) for name, choice in grid.choices(lab).items()},
        "validation": validation(stages[3], records, lab.scale.resamples),
        "tuning": tuning(stages[2], records),
        "false_negatives": false_negatives(groups, lab.scale.resamples),
        "mining": {name: records[name]["result"] for name, cell in cells.items() if cell.kind == "mine"},
        "cost": cost(records, cells),
    }


def rows(groups: dict[str, list[dict[str, Any]]], resamples: int) -> dict[str, Any]:
    """Every method's metrics, and its differences to SFT and to RAD-DPO with their intervals."""
    ranks = {method: [unpack(record["result"]["ranks"]) for record in group] for method, group in groups.items()}
    users = {method: over_seeds([ndcg(seed) for seed in seeds]) for method, seeds in ranks.items()}
    hits = {m: over_seeds([unpack(r["result"]["next_three_hits"]) / 3 for r in group]) for m, group in groups.items()}
    methods = list(groups)
    columns: dict[str, dict[str, Difference]] = {}
    for name, values, base in (
        ("to_sft", users, "sft"),
        ("to_rad_dpo", users, "rad_dpo"),
        ("next_three_to_sft", hits, "sft"),
    ):
        table = np.stack([values[method] - values[base] for method in methods], 1)
        columns[name] = dict(zip(methods, paired_bootstrap(table, resamples), strict=True))
    found = {}
    for method, group in groups.items():
        results = [record["result"] for record in group]
        seeds = [metrics(seed) for seed in ranks[method]]
        row: dict[str, Any] = {"setting": group[0]["config"]["setting"]}
        row |= {name: float(np.mean([seed[name] for seed in seeds])) for name in METRICS}
        row["ndcg@10_by_seed"] = [seed["ndcg@10"] for seed in seeds]
        for name in ("invalid@10", "invalid@50", "next_three@10"):
            row[name] = float(np.mean([result[name] for result in results]))
        row |= {name: columns[name][method]._asdict() for name in columns}
        if "drift" in results[0]:
            steps = results[0]["drift"]["step"]
            drift = {name: np.mean([result["drift"][name] for result in results], 0).tolist() for name in DRIFT}
            row["drift"] = {"step": steps} | drift
            row["train_seconds"] = float(np.mean([result["train_seconds"] for result in results]))
        row["evaluate_seconds"] = float(np.mean([result["evaluate_seconds"] for result in results]))
        row["peak_mib"] = max(record["peak_mib"] for record in group)
        found[method] = _readable(row)
    return found


def metrics(ranks: np.ndarray) -> dict[str, float]:
    """Means over the queries, from the rank of the one wanted item (0: not found)."""
    hit = ranks > 0
    recalls = {f"recall@{k}": float((hit & (ranks <= k)).mean()) for k in KS}
    reciprocal = np.where(hit, 1 / np.maximum(ranks, 1), 0)
    return recalls | {"ndcg@10": float(ndcg(ranks).mean()), "mrr": float(reciprocal.mean())}


def validation(cells: list[Cell], records: dict[str, Any], resamples: int) -> dict[str, Any]:
    """The candidates for the defaults on all validation users, and their differences to the article's reading."""
    scores = {cell.args["method"]: ndcg(unpack(records[cell.name]["result"]["ranks"])) for cell in cells}
    table = np.stack([scores[method] - scores[grid.ARTICLE] for method in scores], 1)
    found = {}
    for cell, score, change in zip(cells, scores.values(), paired_bootstrap(table, resamples), strict=True):
        row = {"setting": cell.args["setting"], "ndcg@10": float(score.mean()), "to_article": change}
        found[cell.args["method"]] = _readable(row)
    return found


def tuning(cells: list[Cell], records: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By method, every setting's validation NDCG@10 and drift."""
    table: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        result = records[cell.name]["result"]
        score = {"setting": cell.args["setting"], "ndcg@10": result["ndcg@10"], "drift": result["drift"]}
        table.setdefault(cell.args["method"], []).append(_readable(score))
    return table


def false_negatives(groups: dict[tuple[str, float], list[dict[str, Any]]], resamples: int) -> list[dict[str, Any]]:
    """By share of false negatives: NDCG@10 with and without RDRW, against SFT and against one another."""
    users = {
        key: over_seeds([ndcg(unpack(record["result"]["ranks"])) for record in group]) for key, group in groups.items()
    }
    with_it, without = grid.NOISY
    found = []
    for share in sorted({share for _, share in groups}):
        if (with_it, share) not in users or (without, share) not in users:
            continue
        a, b, sft = users[with_it, share], users[without, share], users["sft", 0.0]
        rdrw, to_sft, without_to_sft = paired_bootstrap(np.stack([a - b, a - sft, b - sft], 1), resamples)
        line = {"share": share, with_it: float(a.mean()), without: float(b.mean())}
        line |= {"rdrw": rdrw._asdict(), f"{with_it}_to_sft": to_sft._asdict()}
        found.append(_readable(line | {f"{without}_to_sft": without_to_sft._asdict()}))
    return found


def cost(records: dict[str, Any], cells: dict[str, Cell]) -> dict[str, Any]:
    """Time and peak memory by kind of cell. On a busy machine the CPU time says more than the clock; a cell whose
    checkpoint was there already is short by its training."""
    table: dict[str, Any] = {}
    for kind in dict.fromkeys(cell.kind for cell in cells.values()):
        group = [records[name] for name, cell in cells.items() if cell.kind == kind]
        table[kind] = {
            "cells": len(group),
            "seconds_median": round(float(np.median([record["seconds"] for record in group])), 1),
            "cpu_seconds_median": round(float(np.median([record["cpu_seconds"] for record in group])), 1),
            "cpu_seconds_max": round(max(record["cpu_seconds"] for record in group), 1),
            "peak_mib": max(record["peak_mib"] for record in group),
        }
    return table


def tables(summary: dict[str, Any]) -> list[str]:
    """The Markdown of ``docs/alignment-instruments.md``."""
    head = ["method", "setting", "R@5", "R@10", "R@50", "NDCG@10", "MRR", "NDCG@10 - SFT, 95 %", "z", "seeds"]
    main = []
    for method, row in summary["rows"].items():
        seeds = " ".join(f"{value:.4f}"[1:] for value in row["ndcg@10_by_seed"])
        scores = [f"{row[name]:.4f}"[1:] for name in METRICS]
        change = ["", ""] if method == "sft" else [interval(row["to_sft"]), f"{row['to_sft']['z']:+.1f}"]
        main.append([f"`{method}`", _setting(row["setting"]), *scores, *change, seeds])
    side_head = ["method", "NDCG@10 - `rad_dpo`, 95 %", "next three@10 - SFT, 95 %", "next three@10", "invalid@10"]
    side_head += ["invalid@50", "drift of winner", "of further positives", "of negatives", "training s", "peak MiB"]
    side = []
    for method, row in summary["rows"].items():
        drift = [f"{row['drift'][name][-1]:+.3f}" for name in DRIFT] if "drift" in row else [""] * 3
        to_rad = "" if method == "rad_dpo" else interval(row["to_rad_dpo"])
        next_three = "" if method == "sft" else interval(row["next_three_to_sft"])
        shares = [f"{row[name]:.2%}" for name in ("invalid@10", "invalid@50")]
        seconds = f"{row['train_seconds']:.0f}" if "train_seconds" in row else ""
        recall, peak = f"{row['next_three@10']:.4f}"[1:], str(row["peak_mib"])
        side.append([f"`{method}`", to_rad, next_three, recall, *shares, *drift, seconds, peak])
    noise = [
        [
            f"{line['share']:.0%}",
            *(f"{line[method]:.4f}"[1:] for method in grid.NOISY),
            interval(line["rdrw"]),
            *(interval(line[f"{method}_to_sft"]) for method in grid.NOISY),
        ]
        for line in summary["false_negatives"]
    ]
    noise_head = ["replaced", "with RDRW", "without", "RDRW's gain, 95 %", "with RDRW - SFT", "without - SFT"]
    chosen = [
        [name, f"`{c['article']}`", f"`{c['best']}`", interval(c["difference"]), f"`{c['chosen']}`"]
        for name, c in summary["choices"].items()
    ]
    candidates = [
        [f"`{method}`", _setting(row["setting"]), f"{row['ndcg@10']:.5f}"[1:], interval(row["to_article"])]
        for method, row in summary["validation"].items()
    ]
    tuned, hardest = [], []
    for method, scores in summary["tuning"].items():
        tuned.append([f"`{method}`", ", ".join(f"{_setting(s['setting'])}: {s['ndcg@10']:.4f}" for s in scores)])
        worst = min(scores, key=lambda score: score["ndcg@10"])
        drift = [f"{worst['drift'][name][-1]:+.2f}" for name in DRIFT]
        hardest.append([f"`{method}`", _setting(worst["setting"]), f"{worst['ndcg@10']:.4f}"[1:], *drift])
    costs = [[kind, *(str(value) for value in row.values())] for kind, row in summary["cost"].items()]
    return [
        markdown(head, main),
        markdown(side_head, side),
        markdown(noise_head, noise),
        markdown(["choice", "article", "best on validation", "difference, 95 %", "chosen"], chosen),
        markdown(["candidate", "setting", "validation NDCG@10", "less `rad_dpo`'s, 95 %"], candidates),
        markdown(["method", "validation NDCG@10 by setting (lr / beta)"], tuned),
        markdown(["method", "worst setting", "validation NDCG@10", *(f"drift of {g}" for g in DRIFT)], hardest),
        markdown(["cells", "how many", "median s", "median CPU s", "most CPU s", "peak MiB"], costs),
    ]


def interval(difference: dict[str, float]) -> str:
    return f"{difference['mean']:+.5f} [{difference['low']:+.5f}, {difference['high']:+.5f}]"


def _setting(setting: dict[str, float]) -> str:
    return " / ".join(f"{value:g}" for value in setting.values())


def _readable(value: Any) -> Any:
    """Floats rounded, named tuples as objects."""
    if isinstance(value, dict):
        return {key: _readable(item) for key, item in value.items()}
    if isinstance(value, Difference):
        return _readable(value._asdict())
    if isinstance(value, (list, tuple)):
        return [_readable(item) for item in value]
    return round(value, 6) if isinstance(value, float) else value
