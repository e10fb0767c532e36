"""The alignment experiment's plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.pages.figures import save

GROUPS = {"winner": "winners", "positives": "further positives", "negatives": "negatives"}
CURVES = ("sft_all_positives", "dpo", "s_dpo", "simpo", "rad_dpo", "rad_dpo_margins", "rad_dpo_no_tlgd")


def draw(summary: dict[str, Any], folder: Path, prefix: str = "alignment") -> None:
    """``PREFIX-ndcg.png``, ``PREFIX-squeezing.png`` and, where there are any, ``PREFIX-false-negatives.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    save(_differences(summary["rows"]), folder / f"{prefix}-ndcg.png")
    save(_squeezing(summary), folder / f"{prefix}-squeezing.png")
    if summary["scale"]["false_shares"]:
        save(_false_negatives(summary["false_negatives"]), folder / f"{prefix}-false-negatives.png")


def _differences(rows: dict[str, Any]) -> plt.Figure:
    methods = [method for method in rows if method != "sft"][::-1]
    changes = [rows[method]["to_sft"] for method in methods]
    figure, axes = plt.subplots(figsize=(7, 0.36 * len(methods) + 1), layout="constrained")
    means = [change["mean"] for change in changes]
    errors = [
        [change["mean"] - change["low"] for change in changes],
        [change["high"] - change["mean"] for change in changes],
    ]
    axes.errorbar(means, range(len(methods)), xerr=errors, fmt="o", color="C0", capsize=3)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(methods)), methods)
    axes.ticklabel_format(axis="x", scilimits=(-3, -3))
    axes.set_xlabel(f"NDCG@10 on the test less SFT's ({rows['sft']['ndcg@10']:.4f}), 95 % interval over users")
    return figure


def _squeezing(summary: dict[str, Any]) -> plt.Figure:
    """At the tuned setting, all seeds' mean, and at the highest rate that all reached, with its better beta."""
    tuned = {method: row["drift"] for method, row in summary["rows"].items() if "drift" in row}
    top = min(max(score["setting"]["lr"] for score in scores) for scores in summary["tuning"].values())
    highest = {}
    for method, scores in summary["tuning"].items():
        there = [score for score in scores if score["setting"]["lr"] == top]
        if there:
            highest[method] = max(there, key=lambda score: score["ndcg@10"])["drift"]
    figure, grid = plt.subplots(2, 3, figsize=(11, 6.4), sharex=True, sharey="row", layout="constrained")
    for line, (name, drifts) in zip(grid, {"tuned": tuned, f"learning rate {top:g}": highest}.items(), strict=True):
        for axes, (group, title) in zip(line, GROUPS.items(), strict=True):
            for method in CURVES:
                if method in drifts:
                    axes.plot(drifts[method]["step"], drifts[method][group], label=method)
            axes.axhline(0, color="grey", linewidth=1)
            axes.set_title(f"{title}, {name}", fontsize=9)
        line[0].set_ylabel("drift of the log-prob, nats")
    for axes in grid[1]:
        axes.set_xlabel("step")
    grid[0, 0].legend(fontsize=7, loc="lower left")
    return figure


def _false_negatives(lines: list[dict[str, Any]]) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
    shares = [100 * line["share"] for line in lines]
    for shift, (method, label) in zip(
        (-0.2, 0.2), (("rad_dpo", "with RDRW"), ("rad_dpo_no_rdrw", "without")), strict=True
    ):
        changes = [line[f"{method}_to_sft"] for line in lines]
        errors = [
            [change["mean"] - change["low"] for change in changes],
            [change["high"] - change["mean"] for change in changes],
        ]
        places = [share + shift for share in shares]
        axes.errorbar(places, [change["mean"] for change in changes], yerr=errors, fmt="o-", capsize=3, label=label)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xlabel("negatives that the user does take later, %, put in")
    axes.ticklabel_format(axis="y", scilimits=(-3, -3))
    axes.set_ylabel("NDCG@10 less SFT's")
    axes.legend(loc="upper center", ncols=2)
    axes.margins(y=0.2)
    return figure
