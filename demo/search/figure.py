"""The search demo's result as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")  # no screen is needed
from matplotlib.figure import Figure

from demo.measure import interval
from demo.search.report import Ranking
from raddpo_ext._files import replacing

COLOURS = {"old ranker": "0.6", "SFT": "C0", "S-DPO": "C1", "RAD-DPO": "C3"}


def draw(rankings: dict[str, Ranking], base: str, path: Path) -> None:
    """Writes the PNG: the truth by place, the change in NDCG@10, and what a search without the index makes up."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    places, changes, invalid = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    figure.suptitle("A search shop before and after its model is aligned", fontweight="bold")
    for name, found in rankings.items():
        places.plot(range(1, 11), 100 * found.truth.mean(0), "o-", markersize=3, color=COLOURS[name], label=name)
    places.set(
        title="would be ordered by who looks at it", xlabel="place", ylabel="%", xticks=range(1, 11), ylim=(0, None)
    )
    places.legend(frameon=False)
    aligned = [name for name, found in rankings.items() if found.invalid is not None and name != base]
    for row, name in enumerate(aligned):
        difference = rankings[name].ndcg - rankings[base].ndcg
        low, high = interval(torch.from_numpy(difference))
        mean = float(difference.mean())
        changes.bar(row, mean, yerr=[[mean - low], [high - mean]], capsize=5, width=0.6, color=COLOURS[name])
    changes.set_xticks(range(len(aligned)), aligned)
    changes.axhline(0, color="0.4", linewidth=0.8)
    changes.set(title=f"NDCG@10 less {base}'s ({rankings[base].ndcg.mean():.3f})", xlim=(-0.7, len(aligned) - 0.3))
    models = [name for name, found in rankings.items() if found.invalid is not None]
    shares = [100 * (rankings[name].invalid or 0.0) for name in models]
    bars = invalid.bar(models, shares, width=0.6, color=[COLOURS[name] for name in models])
    invalid.bar_label(bars, fmt="%.1f %%")
    invalid.set(title="no item, searched without the index", ylabel="% of the best ten")
    invalid.margins(y=0.15)
    for axes in (places, changes, invalid):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=130)
