"""Preference training of the experiment: the methods, and one pass over the sessions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.alignment.sessions import FURTHER, KINDS
from demo.sft import rate
from raddpo_ext.data.metrics import squeezing
from raddpo_ext.integrations.transformers import session_states

BATCH = 32
WARM_UP = 0.1  # share of the steps
CURVE = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)  # of the steps, after which the drift is measured
LEARNING_RATES = (2e-5, 5e-5, 1e-4)
LOWER_LEARNING_RATES = (5e-6, 1e-5, 2e-5)  # of the wide grid
GROUPS = ("winner", "positives", "negatives")  # whose drift is measured
SFT_LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)  # as many settings for methods without a beta
LOWER_SFT_LEARNING_RATES = (1e-6, 2e-6, 5e-6)  # of the wide grid, beside those


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        options: of :class:`rx.RADDPOLoss`.
        betas: that are tuned; none where there is no preference.
        positives, negatives: most candidates of a session that it sees.
        reference: rewards are relative to the supervised checkpoint.
        weighted: pairs are weighted by similarity (RDRW).
    """

    options: dict[str, Any]
    betas: tuple[float, ...] = (0.5, 2.0)
    positives: int = 1 + FURTHER
    negatives: int = sum(KINDS.values())
    reference: bool = False
    weighted: bool = True

    def settings(self, wide: bool) -> list[dict[str, float]]:
        """The grid; the wide one goes on where the narrow one's best setting was its lowest."""
        if not self.betas:
            return [{"lr": lr} for lr in (*(LOWER_SFT_LEARNING_RATES if wide else ()), *SFT_LEARNING_RATES)]
        rates = LOWER_LEARNING_RATES if wide else LEARNING_RATES
        betas = self.betas
        if wide:  # without a reference the higher beta was the worse one at every rate
            betas = (betas[0] / 5, *(betas if self.reference else betas[:1]))
        return [{"lr": lr, "beta": beta} for lr in rates for beta in betas]


def _rad_dpo(**options: Any) -> dict[str, Any]:
    return {**rx.PRESETS["rad_dpo"], **options}


_SUPERVISED: dict[str, Any] = {"betas": (), "negatives": 0, "weighted": False}
_REFERENCE: dict[str, Any] = {"betas": (0.1, 1.0), "positives": 1, "reference": True, "weighted": False}

PARTS: dict[str, Method] = {
    "sft_continued": Method({}, positives=1, **_SUPERVISED),
    "sft_all_positives": Method({}, **_SUPERVISED),
    "dpo": Method(rx.PRESETS["dpo"], negatives=1, **_REFERENCE),
    "s_dpo": Method(rx.PRESETS["s_dpo"], **_REFERENCE),
    "simpo": Method(rx.PRESETS["simpo"], positives=1, negatives=1, weighted=False),
    "simpo_all_negatives": Method(rx.PRESETS["simpo"], positives=1, weighted=False),
    "rad_dpo": Method(rx.PRESETS["rad_dpo"]),
    "rad_dpo_margins": Method(rx.PRESETS["rad_dpo_margins"]),
    "rad_dpo_no_tlgd": Method(_rad_dpo(protect="none")),
    "rad_dpo_no_rdrw": Method(_rad_dpo(), weighted=False),
    "rad_dpo_no_positives": Method(_rad_dpo(), positives=1),
    "rad_dpo_negatives_reward": Method(_rad_dpo(weighting="reward")),
    "rad_dpo_margins_loss": Method(_rad_dpo(aggregation="margins")),
    "rad_dpo_protect_positives": Method(_rad_dpo(protect="positives")),
    "rad_dpo_each": Method(_rad_dpo(positives="each")),
    "rad_dpo_pooled": Method(_rad_dpo(positives="pooled")),
}
SFT_WEIGHTS = {"rad_dpo_sft_weight_0.1": Method(_rad_dpo(sft_weight=0.1))}
METHODS = {**PARTS, **SFT_WEIGHTS}


def align(
    data: Any, start: Any, method: Method, setting: dict[str, float], train: Any, held_out: Any, seed: int
) -> tuple[Any, dict[str, Any]]:
    """One pass over ``train``, from a copy of the model ``start``.

    Args:
        data: what the sessions' ``batch`` is given.
        start: the supervised checkpoint.
        method: a row of the table.
        setting: ``lr``, and arguments of :class:`rx.RADDPOLoss`.
        train, held_out: sessions: ``count``, ``prompt_lengths``, ``rows`` and ``batch``, as :class:`Sessions` has them.
        seed: of the order of the batches.

    Returns:
        The model, in evaluation mode, and its record: ``losses`` (means of a tenth of the steps each), ``metrics`` (the
        last tenth's means) and ``drift``: by step, :func:`squeezing` on ``held_out``.
    """
    model = copy.deepcopy(start).train()
    weighting = rx.SimilarityWeighting() if method.weighted else None
    preference = {name: value for name, value in setting.items() if name != "lr"}
    loss_fn = rx.RADDPOLoss(weighting, **{**method.options, **preference})
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting["lr"], weight_decay=0.0)
    batches = list(_batches(train.prompt_lengths, np.random.default_rng([seed, 2])))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(batches), WARM_UP))
    measured = {round(share * len(batches)) for share in CURVE}
    probe = rx.pack_sessions(*held_out.batch(data, 1 + FURTHER, sum(KINDS.values())), layout="trie", embeddings=False)
    before = token_logps(start, probe)
    drift: dict[str, list[float]] = {"step": [0], **{group: [0.0] for group in GROUPS}}
    log: list[dict[str, float]] = []
    for step, rows in enumerate(batches, 1):
        candidates = train.rows(rows).batch(data, method.positives, method.negatives)
        packed = rx.pack_sessions(*candidates, layout="trie", embeddings=method.weighted)
        states = session_states(model, packed)
        reference = token_logps(start, packed) if method.reference else None
        output = loss_fn(sessions=packed.sessions, ref_logps=reference, **states._asdict())
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if weighting is not None:
            weighting.commit()
        log.append({name: float(value) for name, value in output.metrics.items()})
        if step in measured:
            drift["step"].append(step)
            for name, value in squeezing(before, token_logps(model, probe), probe.sessions).items():
                drift[name].append(round(float(value), 4))
    tenths = [part for part in np.array_split(np.array([line["loss"] for line in log]), 10) if len(part)]
    last = log[-max(1, len(log) // 10) :]
    return model.eval(), {
        "losses": [round(float(part.mean()), 5) for part in tenths],
        "metrics": {name: round(float(np.mean([line[name] for line in last])), 5) for name in last[0]},
        "drift": drift,
    }


def _batches(prompt_lengths: np.ndarray, rng: np.random.Generator) -> Iterator[Tensor]:
    """Rows of prompts of like length, the batches in random order."""
    order = rng.permutation(len(prompt_lengths))
    order = order[np.argsort(prompt_lengths[order], kind="stable")]
    parts = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    return (torch.from_numpy(parts[place]) for place in rng.permutation(len(parts)))


@torch.no_grad()
def token_logps(model: Any, packed: rx.PackedSessions) -> Tensor:
    states = session_states(model, packed)
    return rx.linear_token_logps(states.hidden, states.weight, packed.sessions.tokens, rows=states.rows)
