"""Preference training on a session log: what was clicked or ordered, above what was shown and passed over."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PrinterCallback, ProgressCallback, Qwen3ForCausalLM

import raddpo_ext as rx
from demo.search.data import Sessions, Tokens
from raddpo_ext.data.session_log import read_sessions, write_sessions
from raddpo_ext.integrations.transformers import RADDPOConfig, RADDPOTrainer

BATCH = 32
POSITIVES, NEGATIVES = 3, 8  # most per session

#: The settings that the experiment of docs/alignment-search.md chose by validation, on other shops than the demo's.
RAD_DPO: dict[str, Any] = {"learning_rate": 3e-4, "beta": 2.0, "sft_weight": 1.0}
S_DPO: dict[str, Any] = {
    **rx.PRESETS["s_dpo"],
    "learning_rate": 3e-4,
    "beta": 1.0,
    "use_reference": True,
    "similarity_weighting": False,
}


def write_log(sessions: Sessions, tokens: Tokens, path: Path) -> Any:
    """The session log as a file, and as it is read back: ``datasets.Dataset``."""
    items = np.arange(len(tokens.of_item))
    sids = rx.item_tokens(tokens.index, items)
    rows = zip(tokens.prompts(sessions.queries), sessions.positives.tolist(), sessions.negatives.tolist(), strict=True)
    write_sessions(
        path,
        (
            {
                "prompt_ids": prompt,
                "positives": [sids[item] for item in positives if item >= 0],
                "negatives": [sids[item] for item in negatives if item >= 0],
            }
            for prompt, positives, negatives in rows
        ),
    )
    return read_sessions(path, vocab=tokens.vocab, index=tokens.index)


def align(
    model: Qwen3ForCausalLM, tokens: Tokens, sessions: Any, options: dict[str, Any], folder: Path, seed: int
) -> tuple[Qwen3ForCausalLM, dict[str, float]]:
    """A trained copy of the model, and the last entry of the Trainer's log."""
    quiet = not sys.stderr.isatty()
    arguments = RADDPOConfig(layout="trie", disable_tqdm=quiet, **one_pass(len(sessions), folder, seed), **options)
    trainer = RADDPOTrainer(copy.deepcopy(model), arguments, train_dataset=sessions, vocab=tokens.vocab)
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Bar)
    trainer.train()
    return trainer.model.eval(), [entry for entry in trainer.state.log_history if "preference" in entry][-1]


def one_pass(sessions: int, folder: Path, seed: int) -> dict[str, Any]:
    """The arguments of a Trainer for one pass in batches of ``BATCH``, with a warm-up and a cosine."""
    steps = math.ceil(sessions / BATCH)
    return {
        "output_dir": str(folder),
        "save_strategy": "no",
        "use_cpu": True,
        "seed": seed,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 10,
        "logging_steps": max(1, steps // 10),
    }


class _Bar(ProgressCallback):
    """The Trainer's bar, without a line for each entry of the log."""

    def on_log(self, *args: Any, **options: Any) -> None:
        pass
