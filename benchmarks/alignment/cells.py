"""The cells of the experiment on purchases."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.alignment import evaluate
from benchmarks.alignment import sessions as alignment_sessions
from benchmarks.alignment import sft as alignment_sft
from benchmarks.alignment import train as alignment_train
from benchmarks.alignment.data import Data, load
from benchmarks.alignment.records import Cell, Records
from benchmarks.alignment.sessions import Sessions
from benchmarks.alignment.statistics import ndcg, pack
from benchmarks.alignment.train import METHODS, PARTS
from benchmarks.harness.report import RESULTS, ROOT
from demo.measure import invalid_shares, retrieve_freely


@dataclass(frozen=True)
class Scale:
    """How much of the experiment is run. ``None`` users are all of them."""

    name: str = "full"
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = alignment_sft.EPOCHS
    sessions: int = 8000
    probes: int = 256  # further sessions, which the drift is measured on
    beams: int = 50
    users: int | None = None  # of the validation and of the test
    tune_users: int = 5000
    tune_beams: int = 20
    free_users: int = 1000  # for the unconstrained search
    next_users: int = 4000  # for the next three, of those without a session
    next_beams: int = 20
    false_shares: tuple[float, ...] = (0.1, 0.25)
    resamples: int = 10_000
    methods: tuple[str, ...] = tuple(PARTS)
    settings: int | None = None  # tuned a method, None for all
    wide: bool = False  # lower learning rates and betas; every method is tested


class Lab(Records):
    """Runs cells of one catalogue at one scale.

    Args:
        folder: the catalogue.
        scale: of the experiment.
        cache: for checkpoints and mined sessions; results that are not the full experiment's are kept there too.
    """

    def __init__(self, folder: Path, scale: Scale, cache: Path = ROOT / ".alignment") -> None:
        self.folder, self.scale = folder, scale
        cache = cache / f"{folder.name}-{scale.name}"
        kept = {"full": f"alignment-{folder.name}.jsonl", "wide": f"alignment-{folder.name}-wide.jsonl"}
        results = RESULTS / kept[scale.name] if scale.name in kept else cache / "results.jsonl"
        super().__init__(cache, results, "alignment", "benchmarks.alignment")

    def __reduce__(self) -> Any:
        return Lab, (self.folder, self.scale, self.cache.parent)

    @cached_property
    def data(self) -> Data:
        return load(self.folder)

    def config(self, cell: Cell) -> dict[str, Any]:
        """Everything that the cell's result depends on."""
        scale = asdict(self.scale)
        fields = ["epochs"]
        if cell.kind != "sft":
            fields += ["sessions", "probes"]
        fields += {"tune": ["tune_users", "tune_beams"], "validate": ["beams", "users"]}.get(cell.kind, [])
        if cell.kind == "test":
            fields += ["beams", "users", "free_users", "next_users", "next_beams"]
        config = {"kind": cell.kind, **cell.args, **{name: scale[name] for name in fields}}
        method = cell.args.get("method", "sft")
        if method != "sft":
            config["definition"] = asdict(METHODS[method])
        return config

    def settings(self, method: str) -> list[dict[str, float]]:
        """That are tuned."""
        return METHODS[method].settings(self.scale.wide)[: self.scale.settings]

    def sft(self, seed: int) -> dict[str, Any]:
        path = self.file("sft", {"seed": seed, "epochs": self.scale.epochs})
        state = alignment_sft.train(self.data, seed, path, self.scale.epochs)
        return {"losses": [round(loss, 5) for loss in state["losses"]], "epoch_seconds": state["seconds"]}

    def mine(self, seed: int) -> dict[str, Any]:
        train, _ = self.sessions(seed)
        shares = {}
        for share in (0.0, *self.scale.false_shares):
            noisy = alignment_sessions.with_false_negatives(self.data, train, share, seed)
            shares[str(share)] = round(alignment_sessions.false_share(self.data, noisy), 4)
        return {
            "users": len(train.users.unique()),
            "positives": float((train.positives >= 0).sum(1).double().mean()),
            "negatives": float((train.negatives >= 0).sum(1).double().mean()),
            "taken_later": shares,  # share of the negatives, by the share that was asked for
        }

    def tune(self, method: str, setting: dict[str, float], seed: int) -> dict[str, Any]:
        model, record = self.aligned(method, setting, seed)
        chosen = _spread(len(self.data.validation), self.scale.tune_users)
        return {**record, **self._retrieval(model, "validation", chosen, self.scale.tune_beams)}

    def validate(self, method: str, setting: dict[str, float], seed: int) -> dict[str, Any]:
        model, _ = self.aligned(method, setting, seed)
        chosen = _spread(len(self.data.validation), self.scale.users)
        return self._retrieval(model, "validation", chosen, self.scale.beams)

    def test(self, method: str, setting: dict[str, float], seed: int, share: float = 0.0) -> dict[str, Any]:
        scale, data = self.scale, self.data
        model, record = self.aligned(method, setting, seed, share)
        begin = time.perf_counter()
        result = {**record, **self._retrieval(model, "test", _spread(len(data.test), scale.users), scale.beams)}
        histories = [data.test[user].history for user in _spread(len(data.test), scale.free_users)]
        free = retrieve_freely(model, data.prompts(histories), data.levels, scale.beams)
        for k in evaluate.KS[1:]:
            result[f"invalid@{k}"] = float(invalid_shares(data.index, free[:, :k]).mean())
        trained = set(torch.cat([part.users for part in self.sessions(seed)]).tolist())
        others = [user for user, case in enumerate(data.test) if user not in trained and len(case.history) > 2]
        chosen = [others[place] for place in _spread(len(others), scale.next_users)]
        hits = evaluate.next_three(model, data, chosen, scale.next_beams)
        result |= {"next_three@10": float(hits.mean() / 3), "next_three_hits": pack(hits)}
        return {**result, "evaluate_seconds": round(time.perf_counter() - begin, 2)}

    def _retrieval(self, model: Any, split: str, users: list[int], beams: int) -> dict[str, Any]:
        cases = [getattr(self.data, split)[user] for user in users]
        found = evaluate.retrieve(model, self.data, [case.history for case in cases], beams)
        ranks = evaluate.ranks(found, [case.item for case in cases])
        return {"ndcg@10": float(ndcg(ranks).mean()), "users": len(users), "ranks": pack(ranks)}

    def start(self, seed: int) -> Any:
        """The supervised checkpoint."""
        path = self.file("sft", {"seed": seed, "epochs": self.scale.epochs})
        model = alignment_sft.make_model(self.data)
        model.load_state_dict(alignment_sft.train(self.data, seed, path, self.scale.epochs)["model"])
        return model.eval()

    def sessions(self, seed: int) -> tuple[Sessions, Sessions]:
        """Those to train on, and those the drift is measured on."""
        scale = self.scale
        config = {"seed": seed, "epochs": scale.epochs, "sessions": scale.sessions, "probes": scale.probes}

        def mine() -> list[torch.Tensor]:
            cuts = alignment_sessions.cut(self.data, scale.sessions + scale.probes)
            return [*alignment_sessions.mine(self.data, self.start(seed), cuts, seed)]

        mined = Sessions(*self.cached("sessions", config, mine))
        return mined.rows(slice(0, scale.sessions)), mined.rows(slice(scale.sessions, None))

    def aligned(
        self, method: str, setting: dict[str, float], seed: int, share: float = 0.0
    ) -> tuple[Any, dict[str, Any]]:
        """The trained model and its training's record."""
        if method == "sft":
            return self.start(seed), {}
        args = {"method": method, "setting": setting, "seed": seed, "share": share}

        def align() -> dict[str, Any]:
            model, record = self.train(method, setting, seed, share)
            return {"model": model.state_dict(), "record": record}

        state = self.cached("aligned", self.config(Cell("", "align", args)), align)
        model = alignment_sft.make_model(self.data)
        model.load_state_dict(state["model"])
        return model.eval(), state["record"]

    def train(self, method: str, setting: dict[str, float], seed: int, share: float) -> tuple[Any, dict[str, Any]]:
        """A model trained from the supervised checkpoint, and the training's record."""
        train, probes = self.sessions(seed)
        if share:
            train = alignment_sessions.with_false_negatives(self.data, train, share, seed)
        begin = time.perf_counter()
        start = self.start(seed)
        model, record = alignment_train.align(self.data, start, METHODS[method], setting, train, probes, seed)
        return model, {**record, "train_seconds": round(time.perf_counter() - begin, 2)}


def _spread(count: int, most: int | None) -> list[int]:
    """At most ``most`` of ``count`` places, evenly spread."""
    if most is None or most >= count:
        return list(range(count))
    return [place * count // most for place in range(most)]
