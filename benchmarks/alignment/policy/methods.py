"""The rows of the policy experiment: how rollouts are drawn, what the log-probs run over, and the objective."""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PrinterCallback, Qwen3ForCausalLM

import raddpo_ext as rx
from benchmarks.alignment.data import Data
from benchmarks.alignment.search.cells import digest
from benchmarks.alignment.sessions import Sessions
from demo.search.align import BATCH, one_pass
from demo.search.data import Tokens
from demo.search.shop import Log
from raddpo_ext.integrations.transformers import PolicyConfig, PolicyTrainer

ROLLOUTS = 16
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
ORDERED, CLICKED = 1.0, 0.5  # rewards, of the next purchase and of later ones too; everything else has none


@dataclass(frozen=True)
class Method:
    """Fields of :class:`PolicyConfig`."""

    rollouts: str
    normalize: str
    preset: str


METHODS = {
    f"{preset}, {rollouts}, {normalize}": Method(rollouts, normalize, preset)
    for preset, rollouts, normalize in product(
        ("grpo", "grpo_sr", "eg_grpo"), ("beams", "independent", "sample"), ("vocab", "trie")
    )
}


def definition(method: str) -> str:
    """A digest of everything that the training of a method depends on but its learning rate and data."""
    return digest([asdict(METHODS[method]), [BATCH, ROLLOUTS, ORDERED, CLICKED]])


def train(
    start: Qwen3ForCausalLM,
    index: rx.TrieIndex,
    rows: list[dict[str, Any]],
    method: Method,
    lr: float,
    folder: Path,
    seed: int,
) -> tuple[Qwen3ForCausalLM, dict[str, float]]:
    """One pass over ``rows``: a trained copy of ``start``, and means of the last tenth of the steps."""
    arguments = PolicyConfig(
        learning_rate=lr,
        num_generations=ROLLOUTS,
        disable_tqdm=True,
        **one_pass(len(rows), folder, seed),
        **asdict(method),
    )
    trainer = PolicyTrainer(copy.deepcopy(start), arguments, train_dataset=rows, reward_fn=reward, index=index)
    trainer.remove_callback(PrinterCallback)
    begin = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - begin, 2)
    last = [entry for entry in trainer.state.log_history if "reward" in entry][-1]
    kept = ("reward", "active", "distinct", "entropy", "legal_mass", "invalid")
    return trainer.model.eval(), {**{name: last[name] for name in kept if name in last}, "train_seconds": seconds}


def rows_of_pages(log: Log, tokens: Tokens) -> list[dict[str, Any]]:
    """A row per page: its query, what was clicked (what was ordered first), and the reward of each of these items."""
    sids = rx.item_tokens(tokens.index, np.arange(len(tokens.of_item)))
    rows = []
    for prompt, shown, clicked, ordered in zip(
        tokens.prompts(log.queries), log.shown, log.clicked, log.ordered, strict=True
    ):
        rewards = {int(item): ORDERED for item in shown[ordered]}
        rewards |= {int(item): CLICKED for item in shown[clicked & ~ordered]}
        rows.append({"prompt_ids": prompt, "positives": [sids[item] for item in rewards], "rewards": rewards})
    return rows


def rows_of_purchases(data: Data, sessions: Sessions) -> list[dict[str, Any]]:
    """A row per session: its history, and the rewards of the next purchase and of those after it."""
    rows = []
    for row, items in enumerate(sessions.positives.tolist()):
        rewards = {item: CLICKED for item in items if item >= 0} | {items[0]: ORDERED}
        sids = [data.tokens[item].tolist() for item in rewards]
        prompt = data.prompts([sessions.history(data, row)])[0]
        rows.append({"prompt_ids": prompt, "positives": sids, "rewards": rewards})
    return rows


def reward(items: Tensor, sids: Tensor, rows: list[dict[str, Any]]) -> list[float]:
    return [row["rewards"].get(item, 0.0) for item, row in zip(items.tolist(), rows, strict=True)]
