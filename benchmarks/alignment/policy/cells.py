"""The cells of the policy experiment: the search shop's, with other training and more metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.alignment.policy import methods as policy
from benchmarks.alignment.records import Cell
from benchmarks.alignment.search.cells import Scale, SearchLab, rng_of
from benchmarks.harness.report import RESULTS, ROOT
from demo.search import model as search_model

KS = (1, 10, 50)
REFERENCE = ("sft", "sft_all_positives", "rad_dpo")  # rows of the search experiment, at the settings that it chose
SETTINGS = {"sft_all_positives": {"lr": 1e-3}, "rad_dpo": {"lr": 3e-4, "beta": 2.0, "sft_weight": 1.0}}


class PolicyLab(SearchLab):
    """Runs cells at one scale; ``methods`` of the scale are rows of :data:`policy.METHODS`."""

    def __init__(self, scale: Scale, cache: Path = ROOT / ".alignment") -> None:
        super().__init__(scale, cache)
        self._run, self._module = "policy", "benchmarks.alignment.policy"
        if scale.name == "policy":
            self.results = RESULTS / "alignment-policy.jsonl"

    def __reduce__(self) -> Any:
        return PolicyLab, (self.scale, self.cache.parent)

    def config(self, cell: Cell) -> dict[str, Any]:
        method = cell.args.get("method")
        if method not in policy.METHODS:
            return super().config(cell)
        config = super().config(cell._replace(args={**cell.args, "method": "sft"}))
        return {**config, "method": method, "definition": policy.definition(method)}

    def aligned(
        self, method: str, setting: dict[str, float], shop: int, init: int, world: dict[str, Any], knobs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if method not in policy.METHODS:
            return super().aligned(method, setting, shop, init, world, knobs)
        start = self.start(shop, init, world)
        args = {"method": method, "setting": setting, "shop": shop, "init": init, "world": world, "knobs": knobs}

        def train() -> dict[str, Any]:
            there = self.world(shop, world)
            log = there.shop.log(self.scale.aligned, rng_of(shop, "align"))
            seed = 1000 * shop + init
            rows = policy.rows_of_pages(log, there.tokens)
            model, record = policy.train(
                start, there.tokens.index, rows, policy.METHODS[method], setting["lr"], self.cache / "trainer", seed
            )
            return {"model": model.state_dict(), "record": record}

        state = self.cached("trained", self.config(Cell("", "align", args)), train)
        start.load_state_dict(state["model"])
        return start.eval(), state["record"]

    def test(self, **args: Any) -> dict[str, Any]:
        """As the search experiment, with the recall of ordered items in new pages, and how many items the first ten of
        all queries hold."""
        result = super().test(**args)
        there = self.world(args["shop"], args["world"])
        model, _ = self.aligned(**args)
        log = there.shop.log(8 * self.scale.validation, rng_of(args["shop"], "test pages"))
        log = log.rows(np.flatnonzero(log.ordered.any(1))[: self.scale.validation])
        wanted = log.shown[np.arange(len(log.shown)), log.ordered.argmax(1)]
        found: Tensor = search_model.retrieve(model, there.tokens, log.queries, self.scale.beams, max(KS))
        hit = found.numpy() == wanted[:, None]
        result |= {f"recall@{k}": round(float(hit[:, :k].any(1).mean()), 6) for k in KS}
        return {**result, "distinct@10": len(np.unique(found[:, :10].numpy()))}
