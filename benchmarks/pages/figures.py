"""The suite's charts, and how the benchmarks' pictures look and are written."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import e, log2, nan, prod
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.harness.results import Results, milliseconds
from benchmarks.peers import compare_whole_steps
from raddpo_ext._files import replacing

Rows = list[tuple[str, dict[str, float], float]]  # a case's label, each method's value, the floor
Panels = dict[str, tuple[str, str, Rows]]  # by title: the unit, what the floor is
Bars = dict[str, dict[str, tuple[dict[str, float], float]]]  # by case and way: the parts, the floor
MARKERS = "oDs^vPX<>*dhp8"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "0.9",
    "legend.frameon": False,
}


def save(figure: plt.Figure, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)


def dots(panels: Panels) -> plt.Figure:
    """A line a case, with a mark for each method and one at the floor; that of ``ours`` is filled."""
    found = (name for *_, rows in panels.values() for _, values, _ in rows for name in values)
    names = list(dict.fromkeys(["ours", *found]))
    heights = [len(rows) + 2.5 for *_, rows in panels.values()]
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(panels),
            figsize=(9, 0.24 * sum(heights) + 0.6),
            height_ratios=heights,
            layout="constrained",
            squeeze=False,
        )
        drawn = {}
        for axes, (title, (unit, floor, rows)) in zip(grid[:, 0], panels.items(), strict=True):
            for i, name in enumerate(names):
                points = [(values[name], y) for y, (_, values, _) in enumerate(rows) if name in values]
                if points:
                    ours = name == "ours"
                    look = {"color": "C0" if ours else f"C{1 + i % 9}", "zorder": 4 if ours else 3}
                    look |= {"markersize": 7 if ours else 5.5, "fillstyle": "full" if ours else "none"}
                    (drawn[name],) = axes.plot(
                        *zip(*points, strict=True), MARKERS[i % len(MARKERS)], label=name, **look
                    )
            floors = [(value, y) for y, (*_, value) in enumerate(rows)]
            axes.plot(*zip(*floors, strict=True), "|", color="black", markersize=13, markeredgewidth=2.5)
            axes.set_xscale("log")
            axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel(f"{unit}; black bar: the floor, {floor}")
        order = [name for name in names if name in drawn]
        figure.legend([drawn[name] for name in order], order, loc="outside lower center", ncols=min(6, len(order)))
    return figure


def cases(results: Results, name: str) -> dict[str, dict[str, Any]]:
    """A member's results by case; those of its parts, which were measured later, stand for its own."""
    found = {}
    for key, result in results.items():
        if key.split("/")[0] == name:
            found |= {row["case"]: row for row in result.get("results", ()) if "case" in row and "skipped" not in row}
    return found


def rates(results: Results) -> tuple[float, float]:
    """Bytes a second of a bare read of the most logits, and operations a second of the fastest three bare float32
    products, one thread; nan where they were not measured."""
    steps = cases(results, "beam-search").values()
    reads = {row["logit_bytes"]: 1e3 * row["logit_bytes"] / row["costs"]["read"]["ms"] for row in steps}
    products = []
    for case, row in cases(results, "losses").items():
        shape = re.match(r"head (\d+)x(\d+) H(\d+) float32", case)
        if shape:
            products.append(6e3 * prod(map(int, shape.groups())) / row["costs"]["bare_gemms"]["ms"])
    return reads[max(reads)] if reads else nan, max(products, default=nan)


def bars(rows: Bars) -> plt.Figure:
    """A bar for each way of each case, cut into its parts, with a mark at the floor."""
    parts = list(dict.fromkeys(part for ways in rows.values() for values, _ in ways.values() for part in values))
    labels, y = [], 0.0
    count = sum(len(ways) + 0.8 for ways in rows.values())
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 0.2 * count + 1.2), layout="constrained")
        for case, ways in rows.items():
            axes.text(0, y, case, va="center", fontsize=9)
            for way, (values, floor) in ways.items():
                y += 1
                left = 0.0
                for i, part in enumerate(parts):
                    width = max(values.get(part, 0.0), 0.0)
                    axes.barh(y, width, 0.8, left, color=f"C{i}", label=part if not labels else None)
                    left += width
                axes.plot(floor, y, "|", color="black", markersize=9, markeredgewidth=2)
                labels.append((y, way))
            y += 1.3
        axes.set_yticks(*zip(*labels, strict=True))
        axes.set_ylim(y - 0.3, -0.8)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("CPU ms of a step, forward and backward; black mark: its matrix products at the best rate")
        figure.legend(loc="outside lower center", ncols=len(parts))
    return figure


# Charts.


def beam_search_chart(results: Results) -> Panels:
    bytes_a_second, _ = rates(results)
    rows = []
    for case, row in cases(results, "beam-search").items():
        values = {name: ms for name, ms in milliseconds(row).items() if name != "read"}
        rows.append((case, values, 1e3 * row["logit_bytes"] / bytes_a_second))
    return {"One decoding step": ("ms", "the logits read once", rows)} if rows else {}


def losses_chart(results: Results) -> Panels:
    chosen = {
        "Log-probs from logits, forward and backward": ("logits", "bytes", "the bytes, at the speed of a copy"),
        "A SimPO loss with the head fused in": ("peers", "bare_gemms", "three bare matrix products"),
        "The session loss": ("session", "bare_bytes", "the bytes, at the speed of a copy"),
    }
    hidden = {
        "copy",
        "bare_passes",
        "bare_passes_in_place",
        "loss_only",
        "prepared",
        "torch_lce_auto",
        "gather_lse",
        "gather_lse_fp32",
    }
    panels = {}
    for title, (section, floor, text) in chosen.items():
        rows = []
        for case, row in cases(results, "losses").items():
            if row["section"] == section:
                times = milliseconds(row)
                floor_ms = times.pop(floor)
                rows.append((case, {name: ms for name, ms in times.items() if name not in hidden}, floor_ms))
        if rows:
            panels[title] = ("ms", text, rows)
    return panels


def retriever_chart(results: Results) -> Panels:
    _, operations = rates(results)
    panels = {}
    for normalize in ("vocab", "level"):
        rows = []
        for case, row in cases(results, "retriever").items():
            if "gflop" in row:
                named = {
                    "ours": f"shared {normalize}",
                    "ours, reordered": f"reordered {normalize}",
                    "generate": "generate",
                }
                times = milliseconds(row)
                values = {name: times[key] for name, key in named.items() if key in times}
                rows.append((case, values, 1e3 * 1e9 * row["gflop"][normalize] / operations))
        if rows:
            panels[f'Whole retrievals, normalize="{normalize}"'] = ("ms", "the matrix products at the best rate", rows)
    return panels


def packing_chart(results: Results) -> Panels:
    _, operations = rates(results)
    rows = []
    for case, row in cases(results, "packing").items():
        named = {"ours" if layout == "trie" else layout: found for layout, found in row["layouts"].items()}
        values = {name: 1e3 * found["seconds"] for name, found in named.items()}
        rows.append((case, values, 1e3 * 1e9 * named["ours"]["gflop"] / operations))
    title = "A training step of one session (ours: the trie layout)"
    return {title: ("ms", "the trie's matrix products at the best rate", rows)} if rows else {}


def whole_steps_bars(results: Results) -> Bars:
    found = cases(results, "whole-steps").items()
    return {
        case: {way: (row["parts"][way], compare_whole_steps.floor_ms(row, way)) for way in row["parts"]}
        for case, row in found
        if not compare_whole_steps.is_trainer(row)
    }


def trie_chart(results: Results) -> Panels:
    bytes_a_second, _ = rates(results)
    builds, sizes = [], []
    for case, row in cases(results, "trie").items():
        if "peers" not in row:
            continue
        methods = {"ours": row} | {name: found for name, found in row["peers"].items() if "unavailable" not in found}
        code_bytes = 2 if row["dtype"] == "uint16" else 4
        moved = row["items"] * (code_bytes * row["levels"] + row["index_bytes_per_item"])
        builds.append((case, {name: found["build_s"] for name, found in methods.items()}, moved / bytes_a_second))
        stored = {name: found["index_bytes_per_item"] for name, found in methods.items()}
        bits = row["levels"] * log2(row["codes"]) - log2(row["sids"] / e)  # of a set of so many SIDs among all, a SID
        sizes.append((case, {name: value for name, value in stored.items() if value}, bits / 8))
    if not builds:
        return {}
    return {
        "Building the index": ("seconds", "SIDs read, index written", builds),
        "Its size": ("bytes an item", "the bits that tell one set of SIDs from another", sizes),
    }


CHARTS: dict[str, Callable[[Results], Panels]] = {
    "beam-search": beam_search_chart,
    "losses": losses_chart,
    "retriever": retriever_chart,
    "packing": packing_chart,
    "trie": trie_chart,
}
BARS: dict[str, Callable[[Results], Bars]] = {"whole-steps": whole_steps_bars}


def has_figure(results: Results, name: str) -> bool:
    """Whether there is something to draw of a member."""
    return bool((CHARTS | BARS)[name](results)) if name in CHARTS | BARS else False


def figure(results: Results, name: str) -> plt.Figure:
    return dots(CHARTS[name](results)) if name in CHARTS else bars(BARS[name](results))
