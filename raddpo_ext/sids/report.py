"""What a catalogue's SIDs are like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raddpo_ext._files import replacing
from raddpo_ext.sids.codebooks import Codebooks
from raddpo_ext.sids.embeddings import chunks
from raddpo_ext.sids.prefixes import numbered
from raddpo_ext.sids.resolve_collisions import ResolvedSIDs


@dataclass(frozen=True)
class SIDReport:
    """Figures of ``items`` items.

    Attributes:
        used: per level, how many codes an item has.
        sizes: per level, how many there are.
        entropy: per level, of the codes, in bits; at most ``log2`` of the size.
        counts: per level, the items of each code.
        collisions: items that shared their SID before collisions were resolved.
        longest: codes of the longest SID.
        long_sids: items whose SID has that many codes.
        error: what the codebooks leave of the embeddings' variance, from 0.
        purity: per level, the share of items whose category is the most frequent one under their prefix; None without
            categories.
    """

    items: int
    used: list[int]
    sizes: list[int]
    entropy: list[float]
    counts: list[list[int]]
    collisions: int
    longest: int
    long_sids: int
    error: float
    purity: list[float] | None


def measure(
    encoded: Tensor, resolved: ResolvedSIDs, x: Any, codebooks: Codebooks, categories: Tensor | None = None
) -> SIDReport:
    """Of the SIDs as encoded, int64 ``[N, L]``, and as resolved; ``categories`` are int64 ``[N]``."""
    counts = [torch.bincount(encoded[:, level], minlength=size) for level, size in enumerate(codebooks.sizes)]
    numbers = numbered(encoded)
    sharing = torch.bincount(numbers[:, -1])
    lengths = torch.full((len(encoded),), encoded.shape[1]) if resolved.lengths is None else resolved.lengths
    squares = sums = torch.zeros(codebooks.dim, dtype=torch.float64)
    left = 0.0
    for rows, part in chunks(x):
        sums = sums + part.double().sum(0)
        squares = squares + part.double().square().sum(0)
        left += float((part - codebooks.decode(encoded[rows])).square().double().sum())
    variance = float((squares - sums.square() / len(encoded)).sum())
    return SIDReport(
        items=len(encoded),
        used=[int((count > 0).sum()) for count in counts],
        sizes=list(codebooks.sizes),
        entropy=[_entropy(count) for count in counts],
        counts=[count.tolist() for count in counts],
        collisions=int(sharing[sharing > 1].sum()),
        longest=int(lengths.max()),
        long_sids=int((lengths == lengths.max()).sum()),
        error=left / variance if variance > 0 else 0.0,
        purity=None if categories is None else [_purity(number, categories) for number in numbers.T],
    )


def text(report: SIDReport) -> str:
    """The report in lines."""
    lines = [f"items        {report.items}"]
    for level, (used, size, entropy) in enumerate(zip(report.used, report.sizes, report.entropy, strict=True)):
        of = f", of at most {math.log2(size):.2f}" if size > 1 else ""
        lines.append(f"level {level}      {used} of {size} codes used, entropy {entropy:.2f} bits{of}")
    lines.append(f"collisions   {report.collisions} items shared their SID before they were resolved")
    lines.append(f"longest      {report.long_sids} items have a SID of {report.longest} codes")
    lines.append(f"error        {report.error:.1%} of the embeddings' variance is left")
    if report.purity is not None:
        shares = ", ".join(f"{share:.1%}" for share in report.purity)
        lines.append(f"purity       of the category, by length of the prefix: {shares}")
    return "\n".join(lines)


def draw(report: SIDReport, path: Path) -> None:
    """Write a PNG of how many items each code of each level has.

    Raises:
        ImportError: ``matplotlib`` is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a picture needs matplotlib, which `pip install matplotlib` brings: {error}") from error
    figure = Figure(figsize=(10, 2.4 * len(report.sizes)), layout="constrained")
    title = f"{report.items:,} items, {report.error:.1%} of the variance left, {report.collisions:,} collisions"
    figure.suptitle(title, fontsize=13, fontweight="bold")
    for level, panel in enumerate(figure.subplots(len(report.sizes), squeeze=False)[:, 0]):
        counts = sorted(report.counts[level], reverse=True)
        panel.fill_between(range(len(counts)), counts, step="mid", color="#2a9d8f")
        panel.axhline(report.items / report.sizes[level], color="black", linestyle=":", linewidth=1.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set(ylabel="items", xlim=(0, max(len(counts) - 1, 1)), ylim=(0, None))
        used, entropy = report.used[level], report.entropy[level]
        panel.set_title(f"level {level}: {used} of {len(counts)} codes used, entropy {entropy:.2f} bits", fontsize=10)
    panel.set_xlabel("codes, the most frequent first; dotted: equal shares")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _entropy(counts: Tensor) -> float:
    shares = counts.double() / counts.sum()
    return abs(float(torch.xlogy(shares, shares).sum()) / math.log(2))


def _purity(prefixes: Tensor, categories: Tensor) -> float:
    pairs, counts = torch.stack([prefixes, categories]).unique(dim=1, return_counts=True)
    largest = torch.zeros(int(prefixes.max()) + 1, dtype=torch.int64)
    largest.scatter_reduce_(0, pairs[0], counts, "amax")
    return float(largest.sum()) / len(prefixes)
