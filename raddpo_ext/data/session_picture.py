"""A session check as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raddpo_ext._files import replacing
from raddpo_ext.data.session_check import Distribution, SessionCheck
from raddpo_ext.data.session_report import DEPTHS

_BARS = 30
_POSITIVE, _NEGATIVE, _PROMPT, _CHANCE = "#2a9d8f", "#e76f51", "#457b9d", "#b8b8b8"


def draw(check: SessionCheck, path: Path) -> None:
    """Write a PNG of four histograms: positives and negatives per session, prompt lengths, shared prefixes.

    Raises:
        ImportError: ``matplotlib`` is not installed.
        OSError: the file cannot be written. An old one is then left as it was.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a picture needs matplotlib, which `pip install matplotlib` brings: {error}") from error
    figure = Figure(figsize=(10, 6), layout="constrained")
    figure.suptitle(
        f"{Path(check.path).name}: {check.sessions:,} sessions", fontsize=13, fontweight="bold", parse_math=False
    )
    (positives, negatives), (prompts, prefixes) = figure.subplots(2, 2)
    _histogram(positives, check.positives_per_session, "positives per session", _POSITIVE)
    _histogram(negatives, check.negatives_per_session, "negatives per session", _NEGATIVE)
    _histogram(prompts, check.prompt_lengths, "tokens per prompt", _PROMPT)
    _prefixes(prefixes, check)
    for panel in (positives, negatives, prompts, prefixes):
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _histogram(panel: Any, counts: Distribution, title: str, colour: str) -> None:
    values = np.array(list(counts.histogram))
    width = -(-(counts.max - counts.min + 1) // _BARS)  # an integer, so that bars hold equally many values
    edges = np.arange(counts.min, counts.max + width + 1, width) - 0.5
    panel.hist(
        values,
        edges,
        weights=np.array(list(counts.histogram.values())) / sum(counts.histogram.values()),
        color=colour,
        rwidth=0.9,
    )
    panel.axvline(counts.median, color="black", linestyle=":", linewidth=1.5)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set(title=f"{title}, median {counts.median:g}", ylabel="share of sessions")


def _prefixes(panel: Any, check: SessionCheck) -> None:
    """How many negatives have at least so many first tokens of the winner, and how many would by chance."""
    depths = np.arange(1, min(len(check.shared), DEPTHS) + 1)
    shares = np.array(check.shared) / max(check.compared, 1)
    for side, values, colour, label in (
        (-1, shares[: len(depths)], _NEGATIVE, "in the log"),
        (1, np.array(check.shared_by_chance[: len(depths)]), _CHANCE, "by chance"),
    ):
        bars = panel.bar(depths + side * 0.2, values, color=colour, width=0.36, label=label)
        panel.bar_label(bars, [f"{100 * value:.2g} %" for value in values], padding=2, fontsize=9)
    panel.legend(frameon=False)
    panel.margins(y=0.15)
    panel.set_xticks(depths, [f"at least {depth}" for depth in depths])
    panel.set(title="first tokens shared with the winner", ylabel="share of negatives")
