"""Short runs of PolicyTrainer on a catalogue of 27 SIDs, of one process or of several, that tests compare."""

from __future__ import annotations

import random
import tempfile
from typing import Any

import torch
from support.trainer_runs import OPTIONS, Run, parameters_of, without_timings

import raddpo_ext as rx
from raddpo_ext.integrations.transformers import PolicyConfig, PolicyTrainer

CODES = [[a, b, c] for a in range(3) for b in range(3) for c in range(3)]
VOCAB = rx.SIDVocab([4, 4, 4], offsets=[3, 7, 11])
INDEX = rx.TrieIndex.build(torch.tensor(CODES), item_ids=torch.arange(100, 127), vocab=VOCAB)


def prompt_rows(count: int) -> list[dict[str, Any]]:
    """Rows with a prompt, one or two positives (every fifth row has none) and their items."""
    source, rows = random.Random(0), []
    for number in range(count):
        items = [100 + (7 * number + 5 * i) % 27 for i in range(0 if number % 5 == 4 else 1 + number % 2)]
        sids = [[3 + a, 7 + b, 11 + c] for a, b, c in (CODES[item - 100] for item in items)]
        prompt = [source.randrange(15, 40) for _ in range(1 + number % 4)]
        rows.append({"prompt_ids": prompt, "positives": sids, "items": items, "first": number % 3})
    return rows


def prefix_reward(items: torch.Tensor, sids: torch.Tensor, rows: list[dict[str, Any]]) -> torch.Tensor:
    """1 for the row's own first code and a half for the second code 1; nothing in a row without items: a dead group."""
    first = torch.tensor([row["first"] for row in rows])
    known = torch.tensor([bool(row["items"]) for row in rows])
    return ((sids[:, 0] == first).float() + (sids[:, 1] == 1).float() / 2) * known


def policy_trainer(
    model: Any, rows: Any, *, output_dir: str, batch: int = 8, accumulate: int = 1, extra: Any = None, **options: Any
) -> PolicyTrainer:
    shared = {name: value for name, value in OPTIONS.items() if name != "similarity_window"}
    given = {"num_generations": 5, "train_sampling_strategy": "sequential", **options}
    config = PolicyConfig(
        output_dir=output_dir,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=accumulate,
        **{**shared, **given},
    )
    arguments = {"reward_fn": prefix_reward, "index": INDEX, **(extra or {})}
    return PolicyTrainer(model, config, train_dataset=rows, **arguments)


def run_policy(model: Any, rows: Any, *, output_dir: str | None = None, resume: Any = None, **options: Any) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        trainer = policy_trainer(model, rows, output_dir=output_dir or folder, **options)
        trainer.train(resume_from_checkpoint=resume)
    return Run(parameters_of(trainer.model), without_timings(trainer.state.log_history), trainer)
