"""The search experiment's plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.alignment.search.grid import Answer
from benchmarks.alignment.search.report import Change
from benchmarks.pages.figures import save

CURVES = (  # questions with numbers to put on an axis
    "negatives",
    "sessions",
    "SFT weight",
    "wrong orders",
    "false negatives",
    "twins of the winner",
    "siblings per prefix",
    "positives",
)

LABELS = {
    "sft_continued": "SFT continued, winner",
    "sft_all_positives": "SFT continued, all clicks",
    "dpo": "DPO",
    "s_dpo": "S-DPO",
    "simpo": "SimPO",
    "simpo_all_negatives": "SimPO, all negatives",
    "rad_dpo": "RAD-DPO",
    "rad_dpo_no_sft": "RAD-DPO without SFT term",
    "rad_dpo_no_tlgd": "RAD-DPO without TLGD",
    "rad_dpo_no_rdrw": "RAD-DPO without RDRW",
    "rad_dpo_no_positives": "RAD-DPO, winner alone in SFT term",
    "rad_dpo_margins": "RAD-DPO, margins/reward",
    "rad_dpo_each": 'RAD-DPO, positives="each"',
    "rad_dpo_pooled": 'RAD-DPO, positives="pooled"',
}


def draw(rows: dict[str, dict[str, Any]], points: list[tuple[Answer, dict[str, Any]]], folder: Path) -> None:
    """``alignment-search.png`` and ``alignment-search-questions.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    save(_methods(rows), folder / "alignment-search.png")
    if {answer.question for answer, _ in points} >= set(CURVES):
        save(_questions(points), folder / "alignment-search-questions.png")


def _methods(rows: dict[str, dict[str, Any]]) -> plt.Figure:
    methods = sorted((method for method in rows if method != "sft"), key=lambda method: rows[method]["ndcg"].mean)
    figure, (gains, invalid) = plt.subplots(
        1, 2, figsize=(9.5, 0.32 * len(methods) + 1.2), sharey=True, width_ratios=(2, 1), layout="constrained"
    )
    colours = ["C3" if method == "rad_dpo" else "C0" for method in methods]
    for place, (method, colour) in enumerate(zip(methods, colours, strict=True)):
        difference: Change = rows[method]["ndcg"]
        _point(gains, difference, place, colour)
        gains.plot(difference.shops, [place] * len(difference.shops), "|", color="0.6", markersize=7, zorder=0)
    gains.axvline(0, color="grey", linewidth=1)
    gains.set_yticks(range(len(methods)), [LABELS[method] for method in methods])
    gains.set_title(f"gain in NDCG@10 over SFT ({rows['sft']['ndcg@10']:.3f})", fontsize=10)
    gains.set_xlabel("95 % interval; | each shop")
    invalid.barh(range(len(methods)), [100 * rows[method]["invalid@10"] for method in methods], color=colours)
    invalid.axvline(100 * rows["sft"]["invalid@10"], color="grey", linewidth=1)
    invalid.set_title("invalid without the index", fontsize=10)
    invalid.set_xlabel("% of the best ten; line: SFT")
    return figure


def _point(axes: plt.Axes, difference: Change, place: float, colour: str) -> None:
    error = [[difference.mean - difference.low], [difference.high - difference.mean]]
    axes.errorbar([difference.mean], [place], xerr=error, fmt="o", color=colour, capsize=3)


def _questions(points: list[tuple[Answer, dict[str, Any]]]) -> plt.Figure:
    figure, grid = plt.subplots(2, 4, figsize=(12, 5.6), sharey=True, layout="constrained")
    for axes, question in zip(grid.flat, CURVES, strict=True):
        here = [(answer, row) for answer, row in points if answer.question == question and answer.method != "sft"]
        values = list(dict.fromkeys(answer.value for answer, _ in here))
        for colour, method in zip(("C3", "C0"), dict.fromkeys(answer.method for answer, _ in here), strict=False):
            line = [(values.index(answer.value), row["ndcg"]) for answer, row in here if answer.method == method]
            means = [difference.mean for _, difference in line]
            low = [difference.mean - difference.low for _, difference in line]
            high = [difference.high - difference.mean for _, difference in line]
            places = [place for place, _ in line]
            axes.errorbar(places, means, yerr=[low, high], fmt="o-", capsize=3, color=colour, label=LABELS[method])
        axes.axhline(0, color="grey", linewidth=1)
        axes.set_xticks(range(len(values)), values, fontsize=8)
        axes.set_title(question, fontsize=10)
        axes.legend(fontsize=7, frameon=False)
    for axes in grid[:, 0]:
        axes.set_ylabel("NDCG@10 less SFT's")
    return figure
