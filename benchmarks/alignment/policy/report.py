"""The policy experiment's table, from the cells."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.alignment.policy import grid
from benchmarks.alignment.policy.cells import KS, REFERENCE, PolicyLab
from benchmarks.alignment.search.report import change, values_of
from benchmarks.harness.report import markdown

MEANS = {"ndcg@10": 4, "orders@10": 3, **{f"recall@{k}": 4 for k in KS}, "distinct@10": 0, "invalid@10": 4}


def table(lab: PolicyLab) -> str:
    """By method the means over the shops, and the change of NDCG@10 from SFT."""
    shops = lab.scale.shops
    start = [values_of(lab, grid.test(lab, "sft", shop), "ndcg") for shop in shops]
    body = []
    for method in (*REFERENCE, *lab.scale.methods):
        cells = [grid.test(lab, method, shop) for shop in shops]
        results: list[dict[str, Any]] = [lab.run(cell)["result"] for cell in cells]
        differences = [values_of(lab, cell, "ndcg") - base for cell, base in zip(cells, start, strict=True)]
        less = change(differences, lab.scale.resamples)
        lr = grid.tuned(lab, method).get("lr")
        line = [f"`{method}`", "" if lr is None else f"{lr:g}"]
        line += [f"{np.mean([result[name] for result in results]):.{digits}f}" for name, digits in MEANS.items()]
        line.insert(3, "" if method == "sft" else f"{less.mean:+.4f} [{less.low:+.4f}, {less.high:+.4f}]")
        seconds = [result["train_seconds"] for result in results if "train_seconds" in result]
        body.append([*line, f"{np.mean(seconds):.0f}" if seconds else ""])
    names = list(MEANS)
    return markdown(["method", "lr", names[0], "less SFT's, 95 %", *names[1:], "training s"], body)
