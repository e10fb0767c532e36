"""The cells of the experiment on the search shop."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.alignment import train
from benchmarks.alignment.records import Cell, Records
from benchmarks.alignment.search.methods import METHODS
from benchmarks.alignment.statistics import pack
from benchmarks.harness.report import RESULTS, ROOT
from demo.measure import invalid_shares, retrieve_freely
from demo.search import model as search_model
from demo.search.data import Sessions, Tokens, sessions_of
from demo.search.shop import Constants, Log, Queries, SearchShop, ndcg
from demo.sft import by_length

LOGS = {
    "sft": 1,
    "align": 2,
    "probe": 3,
    "validation": 4,
    "test": 5,
    "test pages": 6,
}  # seeds of what is drawn from a shop
GAIN = 50  # orders are kept in fiftieths


@dataclass(frozen=True)
class Scale:
    """How much of the experiment is run."""

    name: str = "full"
    shops: tuple[int, ...] = (10, 11, 12, 13, 14)
    inits: tuple[int, ...] = (0, 1, 2)
    tuned_on: int = 2  # of the shops, with the first initialization
    asked_on: int = 3  # of the shops, with the first initialization, for the questions
    epochs: int = search_model.EPOCHS
    supervised: int = 20_000  # sessions
    aligned: int = 5_000
    probes: int = 128
    validation: int = 1_500  # sessions with an order
    queries: int = 700
    beams: int = 50
    free_beams: int = 20
    resamples: int = 10_000
    settings: int | None = None  # tuned per method, None for all
    methods: tuple[str, ...] = tuple(METHODS)
    questions: tuple[str, ...] | None = None  # None for all


class World(NamedTuple):
    """A shop and what is drawn from it."""

    shop: SearchShop
    tokens: Tokens
    validation: Log
    wanted: np.ndarray  # the ordered item of each validation session
    queries: Queries
    truth: np.ndarray  # of the test queries: order probabilities [B, N]


class SearchLab(Records):
    """Runs cells at one scale.

    Args:
        scale: of the experiment.
        cache: for checkpoints; results that are not the full experiment's are kept there too.
    """

    def __init__(self, scale: Scale, cache: Path = ROOT / ".alignment") -> None:
        self.scale = scale
        full = scale.name == "full"
        folder = cache / f"search-{scale.name}"
        results = RESULTS / "alignment-search.jsonl" if full else folder / "results.jsonl"
        super().__init__(folder, results, "search", "benchmarks.alignment.search")

    def __reduce__(self) -> Any:
        return SearchLab, (self.scale, self.cache.parent)

    def config(self, cell: Cell) -> dict[str, Any]:
        """What it depends on, with digests of the method's definition and of the shop's constants."""
        args = cell.args
        scale = asdict(self.scale)
        fields = ["epochs", "supervised"]
        if cell.kind != "sft":
            fields += ["aligned", "probes", "beams"]
            fields += {"tune": ["validation"], "test": ["queries", "free_beams"], "align": []}[cell.kind]
        constants, _ = _constants(args["world"])
        config = {
            "kind": cell.kind,
            **args,
            **{name: scale[name] for name in fields},
            "constants": digest(asdict(constants)),
        }
        method = args.get("method", "sft")
        if method != "sft":
            config["definition"] = digest(asdict(METHODS[method].method))
        return config

    def world(self, shop: int, world: dict[str, Any]) -> World:
        return _world(shop, tuple(sorted(world.items())), self.scale)

    def sft(self, shop: int, init: int, world: dict[str, Any]) -> dict[str, Any]:
        model = self.start(shop, init, world)
        return self._validated(model, self.world(shop, world))

    def start(self, shop: int, init: int, world: dict[str, Any]) -> Any:
        """The supervised checkpoint: every click of the first log."""
        scale, there = self.scale, self.world(shop, world)
        model = search_model.make_model(there.tokens, init)
        config = {"shop": shop, "init": init, "world": world, "epochs": scale.epochs, "supervised": scale.supervised}

        def fit() -> dict[str, Tensor]:
            log = there.shop.log(scale.supervised, rng_of(shop, "sft"))
            clicks = sessions_of(log, np.random.default_rng([shop, init]), there.shop.constants.page, 0)
            search_model.train(model, there.tokens, clicks, init, scale.epochs)
            return dict(model.state_dict())

        model.load_state_dict(self.cached("sft", config, fit))
        return model.eval()

    def aligned(
        self, method: str, setting: dict[str, float], shop: int, init: int, world: dict[str, Any], knobs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The trained model and its training's record."""
        start = self.start(shop, init, world)
        if method == "sft":
            return start, {}
        args = {"method": method, "setting": setting, "shop": shop, "init": init, "world": world, "knobs": knobs}

        def align() -> dict[str, Any]:
            there = self.world(shop, world)
            fresh = Knobs(**knobs).make(there.shop, self.scale.aligned, rng_of(shop, "align"))
            probes = Knobs().make(there.shop, self.scale.probes, rng_of(shop, "probe"))
            seed = 1000 * shop + init
            model, record = train.align(there.tokens, start, METHODS[method].method, setting, fresh, probes, seed)
            return {"model": model.state_dict(), "drift": {name: record["drift"][name][-1] for name in train.GROUPS}}

        state = self.cached("aligned", self.config(Cell("", "align", args)), align)
        start.load_state_dict(state["model"])
        return start.eval(), {"drift": state["drift"]}

    def tune(self, **args: Any) -> dict[str, Any]:
        model, _ = self.aligned(**args)
        return self._validated(model, self.world(args["shop"], args["world"]))

    def test(self, **args: Any) -> dict[str, Any]:
        """Against the truth: NDCG@10, expected orders among ten, the share of the twenty best items among twenty, the
        entropy of the 50 best items (nats), and the invalid share of an unconstrained search."""
        there, scale = self.world(args["shop"], args["world"]), self.scale
        model, record = self.aligned(**args)
        retriever = rx.SIDRetriever(model, there.tokens.index, beam_width=scale.beams)

        def search(ids: Tensor) -> Tensor:
            found = retriever.retrieve(ids, top_k=scale.beams)
            return torch.stack([found.items.double(), found.scores.double()], 1)

        prompts = there.tokens.prompts(there.queries)
        found, scores = by_length(prompts, search, search_model.AT_ONCE).unbind(1)
        items = found.long().numpy()
        values = ndcg(there.truth, items)
        orders = np.where(items >= 0, np.take_along_axis(there.truth, np.maximum(items, 0), 1), 0)[:, :10].sum(1)
        best = np.argsort(-there.truth, 1, kind="stable")[:, :20]
        coverage = np.mean([np.isin(best[row], items[row, :20]).mean() for row in range(len(items))])
        shares = scores.softmax(1)
        result = {
            **record,
            "ndcg@10": round(float(values.mean()), 6),
            "orders@10": round(float(orders.mean()), 6),
            "coverage@20": round(float(coverage), 6),
            "entropy": round(float(-torch.xlogy(shares, shares).sum(1).mean()), 6),
            "ndcg": pack(np.round(255 * values)),
            "orders": pack(np.round(GAIN * orders)),
        }
        if there.tokens.vocab.eos is None:
            levels = there.tokens.vocab.levels
            free = retrieve_freely(model, prompts, levels, scale.free_beams)[:, :10]
            result["invalid@10"] = float(invalid_shares(there.tokens.index, free).mean())
        return result

    def _validated(self, model: Any, there: World) -> dict[str, Any]:
        """What a log can say: NDCG@10 of each validation session's ordered item in the retrieval, and its NDCG among
        the items that were shown with it (``page_ndcg``)."""
        found = search_model.retrieve(model, there.tokens, there.validation.queries, self.scale.beams, 10)
        hit = found.numpy() == there.wanted[:, None]
        scores = _page_scores(model, there.tokens, there.validation)
        ordered = scores[there.validation.shown == there.wanted[:, None]]
        place = (scores > ordered[:, None]).sum(1)
        return {
            "ndcg@10": round(float((hit / np.log2(np.arange(2, 12))).sum(1).mean()), 6),
            "page_ndcg": round(float((1 / np.log2(2 + place)).mean()), 6),
        }


@dataclass(frozen=True)
class Knobs:
    """What the sessions to align on are made of.

    Attributes:
        sessions: how many, None for the scale's.
        positives, negatives: most per session.
        random: negatives are drawn from the whole catalogue instead of from what was shown and passed over.
        false: share of the negatives that are replaced by one of the query's 20 truly best items.
        twins: share of the negatives that are replaced by a sibling of the winner: an item of its category and style.
        wrong_orders: of the simulator, in this log alone.
        clicks_only: the winner is any click, ordered or not.
    """

    sessions: int | None = None
    positives: int = 3
    negatives: int = 8
    random: bool = False
    false: float = 0.0
    twins: float = 0.0
    wrong_orders: float = 0.0
    clicks_only: bool = False

    def make(self, shop: SearchShop, count: int, rng: np.random.Generator) -> Sessions:
        """``count`` sessions where ``sessions`` is None. The loss drops a negative with a positive's SID."""
        noisy = replace(shop, constants=replace(shop.constants, wrong_orders=self.wrong_orders))
        log = noisy.log(count if self.sessions is None else self.sessions, rng)
        if self.clicks_only:
            log = log._replace(ordered=np.zeros_like(log.ordered))
        found = sessions_of(log, rng, self.positives, self.negatives)
        negatives = found.negatives.numpy()
        if self.random:
            negatives = np.where(negatives >= 0, rng.integers(len(shop.worth), size=negatives.shape), -1)
        if self.false:
            best = np.argsort(-shop.order_probability(log.queries), 1)[:, :20]
            drawn = np.take_along_axis(best, rng.integers(20, size=negatives.shape), 1)
            negatives = np.where((rng.random(negatives.shape) < self.false) & (negatives >= 0), drawn, negatives)
        if self.twins:
            drawn = _siblings(shop, found.positives[:, 0].numpy(), negatives.shape[1], rng)
            negatives = np.where((rng.random(negatives.shape) < self.twins) & (negatives >= 0), drawn, negatives)
        return found._replace(negatives=torch.from_numpy(negatives))


def _page_scores(model: Any, tokens: Tokens, log: Log) -> np.ndarray:
    """The log-prob of every item that was shown: float64 ``[S, page]``, ``-inf`` at an empty place."""
    shown = torch.from_numpy(log.shown)
    sessions = Sessions(log.queries, shown, torch.empty(len(shown), 0, dtype=torch.int64))
    scores = torch.full(shown.shape, -torch.inf, dtype=torch.float64)
    for rows in torch.arange(len(shown)).split(search_model.BATCH):
        packed = rx.pack_sessions(
            *sessions.rows(rows).batch(tokens, shown.shape[1], 0), layout="trie", embeddings=False
        )
        logps = train.token_logps(model, packed).double()
        real = torch.arange(logps.shape[1]) < packed.sessions.lengths[:, None]
        part = torch.full((len(rows), shown.shape[1]), -torch.inf, dtype=torch.float64)
        part[shown[rows] >= 0] = torch.where(real, logps, 0).sum(1)
        scores[rows] = part
    values: np.ndarray = scores.numpy()
    return values


def _siblings(shop: SearchShop, items: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` items that share category and style with each of ``items``, which may be among them: ``[B, count]``."""
    prefixes = shop.attributes[:, 0] * shop.constants.styles + shop.attributes[:, 1]
    order = np.argsort(prefixes, kind="stable")
    begin, end = (np.searchsorted(prefixes[order], prefixes[items], side) for side in ("left", "right"))
    return order[begin[:, None] + rng.integers((end - begin)[:, None], size=(len(items), count))]


@lru_cache(maxsize=4)
def _world(shop: int, world: tuple[tuple[str, Any], ...], scale: Scale) -> World:
    constants, ragged = _constants(dict(world))
    made = SearchShop.make(shop, constants)
    log = made.log(8 * scale.validation, rng_of(shop, "validation"))
    log = log.rows(np.flatnonzero(log.ordered.any(1))[: scale.validation])
    wanted = log.shown[np.arange(len(log.shown)), log.ordered.argmax(1)]
    queries = made.queries(scale.queries, rng_of(shop, "test"))
    return World(made, Tokens.of(made, ragged), log, wanted, queries, made.order_probability(queries))


def _constants(world: dict[str, Any]) -> tuple[Constants, bool]:
    """What a world changes of the simulator; ``ragged`` is the SIDs'."""
    changes = dict(world)
    ragged = changes.pop("ragged", False)
    return Constants(**changes), ragged


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def rng_of(shop: int, log: str) -> np.random.Generator:
    return np.random.default_rng([shop, LOGS[log]])
