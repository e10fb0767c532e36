"""The alignment's curves as a picture."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
from matplotlib.figure import Figure

from demo.purchases.alignment import GROUPS, Curves

LABELS = {"winner": "winners", "positives": "further positives", "negatives": "negatives"}


def draw(curves: Curves, title: str, path: Path) -> None:
    """Writes the PNG; whoever reads the path sees the old picture or the whole new one."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, margins, drift = figure.subplots(1, 3)
    figure.suptitle(title)
    steps = [entry["step"] for entry in curves.log]
    for name in ("preference", "sft"):
        loss.plot(steps, [entry[name] for entry in curves.log], label={"sft": "SFT"}.get(name, name))
    loss.set(title="parts of the loss", xlabel="step", ylabel="nats")
    loss.legend()
    margins.plot(steps, [entry["rewards/margins"] for entry in curves.log], label="margin")
    margins.set(title="margins of the pairs", xlabel="step", ylabel="mean margin")
    share = margins.twinx()
    share.plot(steps, [entry["rewards/accuracies"] for entry in curves.log], "C1", label="share above 0")
    share.set_ylabel("share above 0")
    margins.legend(handles=[*margins.lines, *share.lines], loc="lower right")
    for group in GROUPS:
        drift.plot(
            [entry["step"] for entry in curves.drift], [entry[group] for entry in curves.drift], label=LABELS[group]
        )
    drift.axhline(0, color="grey", linewidth=0.8)
    drift.set(title="drift of the log-probs of other shoppers' sessions", xlabel="step", ylabel="nats a candidate")
    drift.legend()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        figure.savefig(temporary, dpi=100, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
