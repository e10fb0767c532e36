"""The cells: a model is trained on one kind of SIDs in one way, and measured."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.alignment import evaluate
from benchmarks.alignment.data import Data, make_data
from benchmarks.alignment.records import Cell, Records
from benchmarks.alignment.sft import BATCH, make_model
from benchmarks.alignment.sids.catalogues import catalogue
from benchmarks.alignment.statistics import ndcg, pack
from benchmarks.harness.report import RESULTS, ROOT
from demo.measure import invalid_shares, retrieve_freely
from demo.sft import HISTORY, LEARNING_RATE, WARM_UP, WEIGHT_DECAY, by_length, rate
from raddpo_ext.integrations.transformers import SessionCollator, session_states

PAGE = 3  # items of a page


class Arm(NamedTuple):
    """Which SIDs (see :func:`catalogue`), whether a page's items see each other, and whether prompts are merged."""

    sids: str = "given"
    page: str = "set"
    merged: bool = False


ARMS = {
    "given": Arm(),
    "own": Arm("own"),
    "balanced": Arm("balanced"),
    "pages": Arm(page="sequence"),
    "merged": Arm(merged=True),
}


@dataclass(frozen=True)
class Scale:
    """How much of the experiment is run. ``None`` sequences are all of them."""

    name: str = "sids"
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 5
    sequences: int | None = None
    users: int = 8000  # of the test
    beams: int = 50
    free_users: int = 1000  # for the unconstrained search


class SIDLab(Records):
    """Runs cells of one catalogue at one scale."""

    def __init__(self, folder: Path, scale: Scale, cache: Path = ROOT / ".alignment") -> None:
        self.folder, self.scale = folder, scale
        place = cache / f"{folder.name}-{scale.name}"
        results = RESULTS / f"alignment-sids-{folder.name}.jsonl" if scale == Scale() else place / "results.jsonl"
        super().__init__(place, results, "sids", "benchmarks.alignment.sids")

    def __reduce__(self) -> Any:
        return SIDLab, (self.folder, self.scale, self.cache.parent)

    def config(self, cell: Cell) -> dict[str, Any]:
        return {**cell.args, **asdict(self.scale), **ARMS[cell.args["arm"]]._asdict()}

    def test(self, arm: str, seed: int) -> dict[str, Any]:
        """Train one arm, and measure it on the test."""
        way, scale = ARMS[arm], self.scale
        data = make_data(catalogue(self.folder, way.sids))
        model = make_model(data, seed)
        model.config.max_position_embeddings = 1 + (HISTORY + PAGE) * data.levels  # rotary: no table of positions
        merger = rx.TokenMerger(model.get_input_embeddings(), data.index.vocab) if way.merged else None
        if merger is not None:
            model.set_input_embeddings(merger)
        begin = time.process_time()
        losses, tokens = train(model, data, way, scale, seed)
        seconds = time.process_time() - begin

        def prompts(count: int) -> tuple[list[int], list[list[int]]]:
            users = [place * len(data.test) // count for place in range(min(count, len(data.test)))]
            plain = data.prompts(data.test[user].history for user in users)
            return users, plain if merger is None else [merger.merge(prompt) for prompt in plain]

        users, given = prompts(scale.users)
        model.eval()
        begin = time.process_time()
        found = retrieve(model, data, given, scale.beams)
        search = time.process_time() - begin
        ranks = evaluate.ranks(found, [data.test[user].item for user in users])
        free = retrieve_freely(model, prompts(scale.free_users)[1], data.levels, scale.beams)
        return {
            "ndcg@10": float(ndcg(ranks).mean()),
            "users": len(users),
            "ranks": pack(ranks),
            "invalid@10": float(invalid_shares(data.index, free[:, :10]).mean()),
            "prompt_tokens": float(np.mean([len(prompt) for prompt in given])),
            "row_tokens": tokens,
            "losses": losses,
            "train_cpu_seconds": round(seconds, 2),
            "search_cpu_seconds": round(search, 2),
        }


def train(model: Any, data: Data, way: Arm, scale: Scale, seed: int) -> tuple[list[float], float]:
    """Each epoch cuts every training sequence anew: a prompt, and up to ``PAGE`` purchases after it.

    Returns:
        The mean loss of each epoch in nats per token, and the mean tokens per row.
    """
    collator = SessionCollator(
        page=way.page, vocab=data.index.vocab, vocab_size=data.vocab_size, merge=way.merged, layout="trie"
    )
    sequences = [items for items in data.train if len(items) > 1][: scale.sequences]
    steps = scale.epochs * math.ceil(len(sequences) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, WARM_UP))
    losses, tokens = [], 0
    for epoch in range(scale.epochs):
        rng, sums = np.random.default_rng([seed, epoch]), torch.zeros(2, dtype=torch.float64)
        for rows in _batches(data, sequences, rng):
            tokens += sum(map(collator.num_tokens, rows))
            batch = collator(rows)
            page, states = batch["page"], session_states(model, batch["packed"])
            logps = rx.linear_token_logps(states.hidden, states.weight, page["tokens"], rows=page["rows"])
            terms = torch.stack((-(page["weights"] * logps).sum(), page["weights"].sum()))
            optimizer.zero_grad()
            (terms[0] / terms[1]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            sums += terms.detach()
        losses.append(round(float(sums[0] / sums[1]), 4))
    return losses, tokens / (scale.epochs * len(sequences))


def retrieve(model: Any, data: Data, prompts: list[list[int]], beams: int) -> Tensor:
    """The best items of each prompt by constrained beam search: int64 ``[B, beams]``, padded with -1."""
    retriever = rx.SIDRetriever(model, data.index, beam_width=beams)
    return by_length(prompts, lambda ids: retriever.retrieve(ids, top_k=beams).items, evaluate.BATCH)


def _batches(data: Data, sequences: list[list[int]], rng: np.random.Generator) -> Iterator[list[dict[str, Any]]]:
    """Rows of like length together, the batches in random order."""
    cuts = [int(rng.integers(1, len(items))) for items in sequences]
    order = rng.permutation(len(sequences))
    order = order[np.argsort([cuts[row] for row in order], kind="stable")]
    starts = range(0, len(order), BATCH)
    for start in rng.permutation(len(starts)):
        batch = order[starts[start] : starts[start] + BATCH]
        prompts = data.prompts(sequences[row][: cuts[row]] for row in batch)
        yield [
            {"prompt_ids": prompt, "positives": data.tokens[sequences[row][cuts[row] : cuts[row] + PAGE]].tolist()}
            for prompt, row in zip(prompts, batch, strict=True)
        ]
