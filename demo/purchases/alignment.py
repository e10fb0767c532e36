"""RAD-DPO on mined sessions, and what it does to the log-probs of sessions that it does not train on."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Qwen3ForCausalLM, TrainerCallback

import raddpo_ext as rx
from demo.purchases.model import Tokens
from raddpo_ext.data.metrics import squeezing
from raddpo_ext.integrations.transformers import RADDPOConfig, RADDPOTrainer, SessionCollator, session_states

LEARNING_RATE = 2e-5
BETA = 0.5
EPOCHS = 1
BATCH = 32
LOOKS = 12  # times that the curves are given a point
GROUPS = ("winner", "positives", "negatives")


class Curves(NamedTuple):
    """What changed over the steps: the Trainer's log, and the mean drift of the followed sessions' log-probs."""

    log: list[dict[str, float]]
    drift: list[dict[str, float]]


def align(model: Qwen3ForCausalLM, tokens: Tokens, sessions: Any, followed: Any, folder: Path, seed: int) -> Curves:
    """Trains the model in place, on packed sessions: each prompt is computed once for all its candidates."""
    steps = EPOCHS * math.ceil(len(sessions) / BATCH)
    every = max(1, steps // LOOKS)
    arguments = RADDPOConfig(
        output_dir=str(folder),
        save_strategy="no",
        use_cpu=True,
        seed=seed,
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        beta=BETA,
        sft_weight=1.0,
        logging_steps=every,
        disable_tqdm=not sys.stderr.isatty(),
    )
    look = _Look(tokens, followed, every)
    trainer = RADDPOTrainer(model, arguments, train_dataset=sessions, vocab=tokens.vocab, callbacks=[look])
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Progress)
    trainer.train()
    model.eval()
    return Curves([entry for entry in trainer.state.log_history if "preference" in entry], look.drift)


@torch.no_grad()
def session_logps(model: Qwen3ForCausalLM, tokens: Tokens, sessions: Sequence[Any]) -> dict[str, Tensor]:
    """Of each session the log-prob of its winner, the mean one of its further positives and that of its negatives:
    float64 ``[S]`` each, in nats."""
    packed = SessionCollator(vocab=tokens.vocab, embeddings=False)(list(sessions))["packed"]
    batch = packed.sessions
    logps = rx.RADDPOLoss()(sessions=batch, **session_states(model, packed)._asdict()).logps
    means = []
    for begin, end, positives in zip(batch.offsets[:-1], batch.offsets[1:], batch.num_positives, strict=True):
        rows = slice(int(begin), int(end))
        one = rx.SessionBatch(
            batch.tokens[rows], batch.lengths[rows], torch.stack((begin, end)) - begin, positives[None]
        )
        # The drift from 0 is the log-prob itself.
        means.append(squeezing(torch.zeros_like(logps[rows]), logps[rows], one))
    return {group: torch.stack([mean[group] for mean in means]) for group in GROUPS}


class _Look(TrainerCallback):
    """Looks at the followed sessions before the first step, then every so many steps and after the last one."""

    def __init__(self, tokens: Tokens, followed: Any, every: int) -> None:
        self.tokens, self.followed, self.every = tokens, followed, every
        self.drift: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.before = self._means(parts["model"])
        self.drift.append({"step": 0} | dict.fromkeys(GROUPS, 0.0))

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            now = self._means(parts["model"])
            self.drift.append({"step": state.global_step} | {group: now[group] - self.before[group] for group in now})

    def _means(self, model: Qwen3ForCausalLM) -> dict[str, float]:
        logps = session_logps(model, self.tokens, self.followed)
        return {group: float(values.mean()) for group, values in logps.items()}


class _Progress(ProgressCallback):
    """The Trainer's bar with two figures beside it, in place of a line for each entry of the log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **parts: Any) -> None:
        if self.training_bar is not None and "preference" in logs:
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.3f}, {logs['rewards/accuracies']:.0%} of pairs right", refresh=False
            )
