"""``docs/scaling.md`` and its figures from a result of :mod:`benchmarks.scaling`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.harness import report
from benchmarks.pages.figures import save
from benchmarks.pages.page import details, fill
from raddpo_ext._files import replacing

Point = dict[str, Any]
Panels = dict[str, list[Point]]
AXES = {
    "items": "items",
    "width": "beam width W",
    "vocabulary": "vocabulary V",
    "length": "codes of a SID, L",
    "sessions": "candidates of a session",
    "threads": "threads",
}
BYTES = "memory"  # the panel whose values are bytes an item


def families(points: list[Point]) -> dict[str, Panels]:
    """The points by family and panel, in their order, and of SIDs of several lengths whole searches too."""
    found: dict[str, Panels] = {}
    for point in points:
        found.setdefault(point["family"], {}).setdefault(point["panel"], []).append(point)
    if "length" in found:
        found["length"]["whole search"] = [_whole(point) for point in found["length"]["beam step"]]
    return found


def _whole(point: Point) -> Point:
    """A search from its mean step, one for each code."""
    methods = {
        name: {key: value if key == "calls" else point["x"] * value for key, value in times.items()}
        for name, times in point["methods"].items()
    }
    return point | {"panel": "whole search", "methods": methods, "note": {}}


# Tables.


def markdown(points: list[Point]) -> dict[str, list[str]]:
    """Each family's lines."""
    return {family: tables(family, panels) for family, panels in families(points).items()}


def tables(family: str, panels: Panels) -> list[str]:
    """A family's tables, each under its panel's name."""
    lines: list[str] = []
    for panel, points in panels.items():
        lines += [f"**{panel}, {'bytes an item' if panel == BYTES else 'ms'}**", "", *table(family, points), ""]
    return lines[:-1]


def table(family: str, points: list[Point]) -> list[str]:
    """A row a point: each method's median with its spread, the first one's CPU time and its ratio to the floor."""
    sample = points[0]
    floor, first = sample["floors"][0], next(iter(sample["methods"]))
    is_time = "cpu" in sample["methods"][first]
    head = [AXES[family], *(name for name in sample["methods"] if name != floor)]
    head += [f"CPU, {first}"] if is_time else []
    head += [f"floor: {floor}", f"{first} / floor", *sample["note"]]
    rows = []
    for point in points:
        times = point["methods"]
        cells = [_cell(times[name], is_time) for name in times if name != floor]
        cells += [_number(1e3 * times[first]["cpu"])] if is_time else []
        cells.append(_cell(times[floor], is_time))
        ratio = _number(times[first]["median"] / times[floor]["median"])
        notes = (f"{value:,}" for value in point["note"].values())
        rows.append([f"{point['x']:,}", *cells, f"{ratio}x", *notes])
    return report.markdown(head, rows).splitlines()


def _cell(times: dict[str, float], is_time: bool) -> str:
    if not is_time:
        return _number(times["median"])
    middle, least, most = (_number(1e3 * times[which]) for which in ("median", "least", "most"))
    return f"{middle} ({least}-{most})"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


# Figures.


def draw(family: str, panels: Panels) -> plt.Figure:
    """Curves over the places, the floor a dashed line; of threads how many times as fast as on one."""
    if family == "threads":
        return _speedups(panels)
    columns = 2 if len(panels) == 4 else len(panels)
    size = 4.6 * columns, 3.9 * len(panels) / columns
    figure, grid = plt.subplots(len(panels) // columns, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, (panel, points) in zip(grid.flat, panels.items(), strict=True):
        _curves(axes, points, 1 if panel == BYTES else 1e3)
        axes.set_title(panel, fontsize=10)
        axes.set_xlabel(AXES[family])
        axes.set_ylabel("bytes an item" if panel == BYTES else "ms")
    return figure


def _curves(axes: Axes, points: list[Point], scale: float) -> None:
    places = [point["x"] for point in points]
    for name in points[0]["methods"]:
        times = [point["methods"][name] for point in points]
        values = [scale * time["median"] for time in times]
        if name in points[0]["floors"]:
            axes.plot(places, values, color="black", linestyle="--", linewidth=1.2, label=f"floor: {name}")
            continue
        (line,) = axes.plot(places, values, marker="o", markersize=4, label=name)
        if "least" in times[0]:
            spread = ([scale * time[which] for time in times] for which in ("least", "most"))
            axes.fill_between(places, *spread, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(places, [_short(place) for place in places], fontsize=8)
    axes.xaxis.minorticks_off()
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=8)


def _short(place: int) -> str:
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if place >= 10 * size or place == size:
            return f"{place / size:.0f}{letter}"
    return str(place)


def _speedups(panels: Panels) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(panels) + 1.4), layout="constrained")
    for place, points in enumerate(panels.values()):
        one, most = points[0]["methods"], points[-1]["methods"]
        floor = points[0]["floors"][0]
        axes.barh(place, one["ours"]["median"] / most["ours"]["median"], color="C0", height=0.6)
        axes.plot(
            one[floor]["median"] / most[floor]["median"], place, "|", color="black", markersize=18, markeredgewidth=2.5
        )
    count = next(iter(panels.values()))[-1]["x"]
    axes.axvline(count, color="grey", linestyle=":")
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_yticks(range(len(panels)), list(panels))
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast on {count} threads as on one (black: the floor)")
    return figure


# The page.


def write(result: dict[str, Any], docs: Path) -> None:
    """``scaling.md`` in this folder with its tables written anew, and the figures beside it."""
    page, machine, versions = docs / "scaling.md", result["machine"], result["versions"]
    where = f"{machine['cpu']} with {machine['cores']} cores, torch {versions['torch']}, {versions['isa']}"
    blocks = {"machine": f"`python -m benchmarks --only scaling` ({where}, commit {result['commit']})."}
    blocks |= {family: _block(family, lines) for family, lines in markdown(result["results"]).items()}
    text = fill(page.read_text(), {f"scaling-{name}": block for name, block in blocks.items()})
    (docs / "figures").mkdir(exist_ok=True)
    for family, panels in families(result["results"]).items():
        save(draw(family, panels), docs / "figures" / f"scaling-{family}.png")
    with replacing(page) as file:
        file.write(text.encode())


def _block(family: str, lines: list[str]) -> str:
    """The figure, and folded the tables."""
    return f"![Cost over {AXES[family]}](figures/scaling-{family}.png)\n\n{details('All figures', chr(10).join(lines))}"
