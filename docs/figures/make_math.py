"""The figures of docs/mathematics.md: ``python -m docs.figures.make_math [FOLDER]``, default this folder."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import raddpo_ext as rx

BLUE, ORANGE, GREEN, RED, GREY = "#4c78a8", "#f58518", "#54a24b", "#e45756", "#9aa0a6"
READINGS = {  # aggregation, weighting: colour, dashes
    ("negatives", "loss"): (BLUE, "-"),
    ("negatives", "reward"): (ORANGE, "-"),
    ("margins", "loss"): (GREEN, "--"),
    ("margins", "reward"): (RED, "--"),
}


def session(candidates: list[list[int]]) -> rx.SessionBatch:
    """One session of a winner and its negatives, all of one length."""
    return rx.SessionBatch(
        tokens=torch.tensor(candidates),
        lengths=torch.tensor([len(candidate) for candidate in candidates]),
        offsets=torch.tensor([0, len(candidates)]),
        num_positives=torch.tensor([1]),
    )


def push(logps: torch.Tensor, sessions: rx.SessionBatch, **options: Any) -> torch.Tensor:
    """Minus the gradient of the preference with respect to the log-probs."""
    logps = logps.detach().requires_grad_()
    rx.rad_dpo_loss(logps, sessions, sft_weight=0.0, **options).loss.backward()
    assert logps.grad is not None
    return -logps.grad


def tlgd() -> Figure:
    """The push per token without and with detachment, and in all on the log-probs of the winner's prefixes."""
    candidates = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 4], [1, 7, 3, 4], [8, 2, 3, 4]]
    names = ["winner", *(f"negative, {k} shared" for k in (3, 2, 1, 0))]
    logps = torch.tensor([[-1.0, -0.6, -0.9, -1.5]]).repeat(5, 1)
    logps[range(1, 5), [3, 2, 1, 0]] = torch.tensor([-1.3, -1.6, -1.1, -1.4])  # where they part from the winner
    labels = ("without TLGD", "with TLGD")
    pushes = [push(logps, session(candidates), protect=protect) for protect in ("none", "winner")]
    shared = torch.tensor([[i < k for i in range(4)] for k in (4, 3, 2, 1, 0)])

    figure = Figure(figsize=(11.5, 3.6), layout="constrained")
    grids = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
    for axes, values, label in zip(grids[:2], pushes, labels, strict=True):
        axes.imshow(values.numpy(), cmap="RdBu", vmin=-0.42, vmax=0.42, aspect="auto")
        for row, column in product(range(5), range(4)):
            text = f"{values[row, column]:+.2f}" if values[row, column] else "0"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if row == 0 else "black")
        for row, k in ((1, 3), (2, 2), (3, 1)):
            axes.add_patch(Rectangle((-0.48, row - 0.46), k - 0.04, 0.92, fill=False, edgecolor=BLUE, linewidth=1.5))
        axes.set(title=f"push on each token, {label}", xticks=range(4), xticklabels=range(1, 5), xlabel="token")
        axes.set_yticks(range(5), names if axes is grids[0] else [""] * 5)
    for values, label, colour, shift in zip(pushes, labels, (GREY, BLUE), (-0.2, 0.2), strict=True):
        net = (values * shared).sum(0).tolist()
        bars = grids[2].bar([i + shift for i in range(1, 5)], net, 0.38, color=colour, label=label)
        grids[2].bar_label(bars, fmt="%.2f", fontsize=8)
    grids[2].set(title="sum over the rows that share it", xticks=range(1, 5), xlabel="token of the winner")
    grids[2].set_ylim(0, 1.25 * float(pushes[0][0, 0]))
    grids[2].legend(loc="upper left", ncols=2, fontsize=8)
    return figure


def filled_weighting() -> tuple[rx.SimilarityWeighting, torch.Tensor]:
    """A weighting that has seen 4096 similarities, and these."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4096, generator=generator) * 0.16 + 0.35
    seen = torch.where(torch.arange(4096) % 5 == 0, spread * 0.5 + 0.6, spread).clamp(-0.3, 0.99)
    weighting = rx.SimilarityWeighting()
    weigh(weighting, seen)
    return weighting.eval(), seen


def weigh(weighting: rx.SimilarityWeighting, similarities: torch.Tensor) -> torch.Tensor:
    """The weights of a winner with the embedding (1, 0) and a negative for each similarity."""
    negatives = torch.stack([similarities, (1 - similarities**2).sqrt()], 1)
    embeddings = torch.cat([torch.tensor([[1.0, 0.0]]), negatives])
    return weighting(embeddings, session([[token] for token in range(len(embeddings))]))


def rdrw() -> Figure:
    """The weight over the similarity, with the quantiles and what they were taken of."""
    weighting, seen = filled_weighting()
    s = torch.linspace(-0.2, 1, 1000)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    counts = axes.twinx()
    counts.hist(seen.numpy(), bins=60, range=(-0.2, 1), color=GREY, alpha=0.45)
    counts.set(yticks=[], ylim=(0, 500))
    axes.set_zorder(counts.get_zorder() + 1)  # the curve over the bars
    axes.patch.set_visible(False)
    axes.plot(s.numpy(), weigh(weighting, s).numpy(), color=BLUE, linewidth=2)
    for threshold, name, level in zip(
        weighting.thresholds.tolist(), ("lo", "mid", "hi"), weighting.quantiles, strict=True
    ):
        axes.axvline(threshold, color=ORANGE, linewidth=1, linestyle="--")
        label = rf"$q_{{\mathrm{{{name}}}}}$" + f"\n{level:.0%}"
        axes.text(threshold, 1.14, label, ha="center", va="top", fontsize=9, backgroundcolor="white")
    axes.axhline(0.75, color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="similarity of winner and negative", ylabel="weight of the pair", ylim=(0.4, 1.16), xlim=(-0.2, 1))
    axes.set_yticks([0.5, 0.75, 1.0], ["0.5", "0.75", "1"])
    return figure


def readings() -> Figure:
    """What the weight of one negative does to the push on it: the four readings."""
    figure = Figure(figsize=(11.5, 3.8), layout="constrained")
    twin, alone, among = figure.subplots(1, 3)
    sizes = torch.linspace(0, 8, 60)
    for (aggregation, weighting), (colour, dashes) in READINGS.items():
        style = {"color": colour, "linestyle": dashes, "label": f"{aggregation}/{weighting}", "linewidth": 2}
        options = {"aggregation": aggregation, "weighting": weighting}
        ratio = []
        for size in sizes.tolist():
            up = pushed([-3.0, -size, -size], [0.5, 1.0], **options)
            ratio.append(up[0] / up[1])
        twin.plot(sizes.numpy(), torch.stack(ratio).numpy(), **style)
        weigher, _ = filled_weighting()
        s = torch.linspace(0.2, 0.9, 120)
        for axes, others in ((alone, []), (among, [-4.5, -5.0, -5.5, -6.0, -6.5, -7.0, -8.0])):
            rewards = [-4.0, -5.0, *others]
            curve = [pushed(rewards, [weight, *[1.0] * len(others)], **options)[0] for weight in weigh(weigher, s)]
            plain = pushed(rewards, [1.0] * (len(others) + 1), **options)[0]
            axes.plot(s.numpy(), (torch.stack(curve) / plain).numpy(), **style)
    twin.set(title="beside its twin of weight 1, at weight .5", xlabel="|r|, its reward is negative", yscale="log")
    twin.set_yticks([0.01, 0.1, 0.5, 1, 4, 20], ["0.01", "0.1", "0.5", "1", "4", "20"], minor=False)
    twin.set_ylabel("push down on a similar negative, ratio")
    alone.set(title="to itself unweighted, alone in its session", xlabel="similarity to the winner")
    among.set(title="to itself unweighted, with 7 unlike ones", xlabel="similarity to the winner")
    for axes in (twin, alone, among):
        axes.axhline(1, color=GREY, linewidth=1)
    among.legend(fontsize=8)
    return figure


def pushed(rewards: list[float], weights: list[Any], **options: Any) -> torch.Tensor:
    """How hard each negative is pushed down, by its reward."""
    logps = torch.tensor(rewards, dtype=torch.float64)[:, None]
    sessions = session([[token] for token in range(len(rewards))])
    given = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    return -push(logps, sessions, beta=1.0, pair_weights=given, **options)[1:, 0]


def beam() -> Figure:
    """Two and three beams on a trie whose best item begins badly."""
    sids = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 2, 1], [1, 0, 0], [1, 1, 1], [2, 1, 0], [2, 1, 2]])
    index = rx.TrieIndex.build(sids)
    shares = {(0,): 0.45, (1,): 0.33, (2,): 0.21, (0, 0): 0.36, (0, 1): 0.32, (0, 2): 0.31, (1, 0): 0.51, (1, 1): 0.48}
    shares |= {(2, 1): 0.98, (2, 1, 2): 0.08}  # of a code behind its prefix; the others have 0.9
    codes, depths = index.paths(torch.arange(index.node_bound))
    prefixes = [tuple(row[:depth]) for row, depth in zip(codes.tolist(), depths.tolist(), strict=True)]
    table = torch.zeros(len(prefixes), 4)  # column 3 is text
    for prefix in prefixes[1:]:
        table[prefixes.index(prefix[:-1]), prefix[-1]] = shares.get(prefix, 0.9)
    table[:, 3] = 1 - table.sum(1)
    table = table.log()

    figure = Figure(figsize=(11.5, 4), layout="constrained")
    for axes, width in zip(figure.subplots(1, 2), (2, 3), strict=True):
        states = [rx.BeamState.start(index, 1)]
        found = rx.beam_search(
            lambda tokens, parents, level, states=states: table[states[-1].nodes.clamp(min=0)],
            index,
            batch_size=1,
            beam_width=width,
            on_step=lambda level, state, states=states: states.append(state),
        )
        draw_trie(axes, prefixes, table, {int(node) for state in states for node in state.nodes[0]}, found)
        axes.set_title(f"beam_width={width}")
    return figure


def draw_trie(axes: Axes, prefixes: list[tuple[int, ...]], table: torch.Tensor, kept: set[int], found: Any) -> None:
    """Every prefix with its score; those that a beam held in colour, and the best item that was found."""
    number = {prefix: node for node, prefix in enumerate(prefixes)}
    score, height = {(): 0.0}, {}
    leaves = sorted(prefix for prefix in prefixes if len(prefix) == 3)
    for prefix in prefixes[1:]:
        score[prefix] = score[prefix[:-1]] + float(table[number[prefix[:-1]], prefix[-1]])
    for prefix in prefixes:
        below = [place for place, leaf in enumerate(leaves) if leaf[: len(prefix)] == prefix]
        height[prefix] = -sum(below) / len(below)
    best = tuple(found.sids[0, 0].tolist())
    for prefix in prefixes:
        held = number[prefix] in kept
        colour = GREEN if prefix == best else BLUE if held else GREY
        if prefix:
            parent = prefix[:-1]
            axes.plot(
                [len(parent), len(prefix)],
                [height[parent], height[prefix]],
                color=colour if held else "#d0d3d6",
                linewidth=2 if held else 1,
                zorder=1,
            )
        label = f"{prefix[-1]}: {score[prefix]:.2f}" if prefix else "start"
        box = {"boxstyle": "round", "facecolor": colour if held else "white", "edgecolor": colour}
        axes.text(
            len(prefix),
            height[prefix],
            label,
            ha="center",
            va="center",
            fontsize=9,
            bbox=box,
            color="white" if held else "#5f6368",
        )
    top = max(leaves, key=lambda leaf: score[leaf])
    text = "the best item" if top == best else "the best item, lost at once"
    axes.annotate(text, (3.35, height[top]), fontsize=9, va="center", color="#3c4043")
    axes.set(xlim=(-0.3, 4.7), ylim=(-len(leaves) + 0.4, 0.6), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


FIGURES = {"math-tlgd": tlgd, "math-rdrw": rdrw, "math-readings": readings, "math-beam": beam}


def main(folder: Path) -> None:
    for name, draw in FIGURES.items():
        draw().savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
