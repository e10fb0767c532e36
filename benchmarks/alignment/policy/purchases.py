"""Policy training on purchases: from the supervised checkpoint of the experiment on purchases to retrieval.

Its cells are that experiment's, with the same checkpoints, prompts and users; only the training is another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alignment import grid
from benchmarks.alignment.cells import Lab, Scale
from benchmarks.alignment.policy import methods as policy
from benchmarks.alignment.records import Cell
from benchmarks.alignment.report import METRICS, interval, metrics
from benchmarks.alignment.statistics import ndcg, over_seeds, paired_bootstrap, unpack
from benchmarks.harness.report import RESULTS, ROOT, markdown

LEARNING_RATES = (1e-6, 1e-5, 3e-5)
PURCHASES = Scale(name="policy", false_shares=(), methods=("grpo_sr, sample, trie", "eg_grpo, sample, trie"))
SHARES = ("invalid@10", "invalid@50")


class PurchasesLab(Lab):
    """Runs cells of one catalogue at one scale; ``methods`` of the scale are rows of :data:`policy.METHODS`."""

    def __init__(self, folder: Path, scale: Scale, cache: Path = ROOT / ".alignment") -> None:
        super().__init__(folder, scale, cache)
        self._run, self._module = "policy", "benchmarks.alignment.policy"
        if scale.name == "policy":
            self.results = RESULTS / f"alignment-policy-{folder.name}.jsonl"

    def __reduce__(self) -> Any:
        return PurchasesLab, (self.folder, self.scale, self.cache.parent)

    def config(self, cell: Cell) -> dict[str, Any]:
        method = cell.args.get("method", "sft")
        if method == "sft":
            return super().config(cell)
        config = super().config(cell._replace(args={**cell.args, "method": "sft"}))
        return {**config, "method": method, "definition": policy.definition(method)}

    def settings(self, method: str) -> list[dict[str, float]]:
        return [{"lr": lr} for lr in LEARNING_RATES[: self.scale.settings]]

    def train(self, method: str, setting: dict[str, float], seed: int, share: float) -> tuple[Any, dict[str, Any]]:
        rows = policy.rows_of_purchases(self.data, self.sessions(seed)[0])
        return policy.train(
            self.start(seed), self.data.index, rows, policy.METHODS[method], setting["lr"], self.cache, seed
        )


def stages(lab: PurchasesLab) -> Iterator[list[Cell]]:
    """The grid, in stages that need only the results of those before."""
    scale = lab.scale
    yield [Cell(f"sft-s{seed}", "sft", {"seed": seed}) for seed in scale.seeds]
    yield [cell for method in scale.methods for cell in grid.tuning(lab, method)]
    yield [grid.reporting(lab, method, seed, 0.0) for method in ("sft", *scale.methods) for seed in scale.seeds]


def table(lab: PurchasesLab) -> str:
    """By method the means over the seeds, and the change of NDCG@10 from SFT."""
    names = ("sft", *lab.scale.methods)
    groups = {
        name: [lab.run(grid.reporting(lab, name, seed, 0.0))["result"] for seed in lab.scale.seeds] for name in names
    }
    ranks = {name: [unpack(result["ranks"]) for result in group] for name, group in groups.items()}
    users = {name: over_seeds([ndcg(seed) for seed in seeds]) for name, seeds in ranks.items()}
    changes = paired_bootstrap(np.stack([users[name] - users["sft"] for name in names], 1), lab.scale.resamples)
    body = []
    for name, change in zip(names, changes, strict=True):
        seeds = [metrics(seed) for seed in ranks[name]]
        line = [f"`{name}`", *(f"{value:g}" for value in grid.tuned(lab, name).values())] + [""] * (name == "sft")
        line += [f"{np.mean([seed[metric] for seed in seeds]):.4f}"[1:] for metric in METRICS]
        line.append("" if name == "sft" else interval(change._asdict()))
        line += [f"{np.mean([result[share] for result in groups[name]]):.2%}" for share in SHARES]
        seconds = [result["train_seconds"] for result in groups[name] if "train_seconds" in result]
        body.append([*line, f"{np.mean(seconds):.0f}" if seconds else ""])
    return markdown(["method", "lr", *METRICS, "NDCG@10 - SFT, 95 %", *SHARES, "training s"], body)
