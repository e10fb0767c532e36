"""The session losses against the formulas of the objectives they contain, against TRL, and worked by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.session_cases import Case, assert_close, build, run
from torch import Tensor
from torch.nn.functional import logsigmoid

import raddpo_ext as rx


def regular(sessions: int, negatives: int, levels: int = 3) -> Case:
    """Equal sessions of distinct SIDs, one positive before its negatives."""
    case = build([(1, negatives)] * sessions, levels, seed=5)
    tokens = torch.arange(case.logps.numel()).view(case.logps.shape)
    values = -4 * torch.rand(3, *case.logps.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lengths = torch.full((len(tokens),), levels)
    batch = rx.SessionBatch(tokens, lengths, case.sessions.offsets, case.sessions.num_positives)
    return Case(batch, values[0], values[1], 0.2 + case.pair_weights, case.detach, case.level_weights)


def assert_is(case: Case, arguments: dict[str, Any], formula: Any) -> None:
    """The preference's value and gradient are those of ``formula(logps [S, 1 + N, L])``, a loss per session."""
    (got, gradient) = run(rx.rad_dpo_loss, case, arguments, (0, 1, 0))
    logps = case.logps.clone().requires_grad_()
    expected = formula(logps.view(case.sessions.num_sessions, -1, logps.shape[1])).mean()
    assert_close(got.preference, expected)
    assert_close(gradient, torch.autograd.grad(expected, logps)[0])


def test_one_negative_is_simpo() -> None:
    case = regular(7, 1)

    def simpo(logps: Tensor) -> Tensor:
        chosen, rejected = logps.mean(2).unbind(1)
        return -logsigmoid(2.5 * (chosen - rejected) - 0.6)

    for aggregation in ("negatives", "margins"):
        arguments = {"beta": 2.5, "gamma": 0.6, "protect": "none", "aggregation": aggregation}
        assert_is(case, arguments, simpo)
    preset = rx.PRESETS["simpo"] | {"beta": 2.5, "gamma": 0.6}
    assert_is(case, preset, simpo)
    result = rx.rad_dpo_loss(case.logps, case.sessions, **preset)
    assert result.loss == result.preference


def test_sums_and_a_reference_are_dpo() -> None:
    case = regular(7, 1)
    ref = case.ref_logps.view(7, 2, 3).sum(2)

    def dpo(logps: Tensor) -> Tensor:
        ratios = logps.sum(2) - ref
        gap = 0.1 * (ratios[:, 0] - ratios[:, 1])
        return -0.8 * logsigmoid(gap) - 0.2 * logsigmoid(-gap)

    assert_is(case, rx.PRESETS["dpo"] | {"label_smoothing": 0.2, "ref_logps": True}, dpo)


def test_several_negatives_are_s_dpo() -> None:
    case = regular(5, 6)
    ref = case.ref_logps.view(5, 7, 3).sum(2)

    def s_dpo(logps: Tensor) -> Tensor:
        ratios = 0.1 * (logps.sum(2) - ref)
        return -logsigmoid(-torch.log(torch.exp(ratios[:, 1:] - ratios[:, :1]).sum(1)))

    assert_is(case, rx.PRESETS["s_dpo"] | {"ref_logps": True}, s_dpo)


@pytest.mark.parametrize("aggregation", ["negatives", "margins"])
@pytest.mark.parametrize("weighting", ["loss", "reward"])
def test_weighted_lists(aggregation: str, weighting: str) -> None:
    case = regular(5, 6)
    w = case.pair_weights.view(5, 6)

    def formula(logps: Tensor) -> Tensor:
        rewards = 2.0 * logps.mean(2)
        r_w, r_j = rewards[:, :1], rewards[:, 1:]
        if weighting == "reward":
            r_j, factor = w * r_j, torch.ones_like(w)
        else:
            factor = w
        if aggregation == "negatives":
            return torch.log(1 + (factor * torch.exp(r_j - r_w + 0.4)).sum(1))
        return torch.log(1 + 1 / (factor * torch.exp(r_w - r_j - 0.4)).sum(1))

    kind = {"aggregation": aggregation, "weighting": weighting, "gamma": 0.4, "protect": "none"}
    assert_is(case, kind | {"pair_weights": True}, formula)


def test_presets() -> None:
    """The two readings of RAD-DPO; the others stand in the tests above."""
    assert set(rx.PRESETS) == {"rad_dpo", "rad_dpo_margins", "simpo", "dpo", "s_dpo"}
    case = build([(2, 4), (1, 3)], 3, seed=1)
    for name, stands_for in [("rad_dpo", {}), ("rad_dpo_margins", {"aggregation": "margins", "weighting": "reward"})]:
        weights = {"pair_weights": True}
        for value, expected in zip(
            run(rx.rad_dpo_loss, case, rx.PRESETS[name] | weights)[0],
            run(rx.rad_dpo_loss, case, stands_for | weights)[0],
            strict=True,
        ):
            assert torch.equal(value, expected)


def test_pooled_is_the_multilabel_contrast() -> None:
    """Three positives, four negatives: ``-log(sum_p e^r / (sum_p e^r + sum_n w e^r))``, ``w`` the least."""
    case = regular(6, 6)
    batch = rx.SessionBatch(case.sessions.tokens, case.sessions.lengths, case.sessions.offsets, torch.full((6,), 3))
    weights = 0.1 + torch.rand(72, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    case = Case(batch, case.logps, case.ref_logps, weights, case.detach, case.level_weights)
    least = weights.view(6, 3, 4).amin(1)

    def formula(rewards: Tensor, gamma: float) -> Tensor:
        e = torch.exp(rewards)
        return -torch.log(e[:, :3].sum(1) / (e[:, :3].sum(1) + (least * e[:, 3:] * math.exp(gamma)).sum(1)))

    arguments = {"positives": "pooled", "gamma": 0.4, "protect": "none", "pair_weights": True}
    assert_is(case, arguments, lambda logps: formula(2.0 * logps.mean(2), 0.4))
    scores = case.logps[:, 0].clone().requires_grad_()
    loss = rx.multilabel_contrastive_loss(scores, batch, pair_weights=weights, temperature=0.5)
    expected = formula(2.0 * scores.view(6, 7), 0.0).mean()
    assert_close(loss, expected)
    assert_close(*(torch.autograd.grad(value, scores)[0] for value in (loss, expected)))


@pytest.mark.parametrize("kind", ["simpo", "sigmoid"])
def test_equals_trl(kind: str) -> None:
    """TRL's SimPO of mean log-probs, and its sigmoid loss (DPO) of summed log-ratios."""
    cpo = pytest.importorskip("trl.experimental.cpo", reason="needs trl")
    case = regular(7, 1)
    trainer = SimpleNamespace(
        alpha=0.0, beta=0.3, simpo_gamma=0.5, label_smoothing=0.1, loss_type=kind, accelerator=SimpleNamespace()
    )
    trainer.accelerator.device = case.logps.device
    arguments: dict[str, Any] = {"beta": 0.3, "protect": "none", "label_smoothing": 0.1}
    if kind == "simpo":
        arguments |= {"gamma": 0.5}
    else:
        arguments |= {"length_normalized": False, "ref_logps": True}

    def trl(logps: Tensor) -> Tensor:
        summed = (logps - case.ref_logps.view(logps.shape)).sum(2)
        values = logps.mean(2) if kind == "simpo" else summed
        return cpo.CPOTrainer.cpo_loss(trainer, values[:, 0], values[:, 1])[0]

    assert_is(case, arguments, trl)


def test_a_session_worked_by_hand() -> None:
    """Winner (1, 2), other positive (1, 3), negatives (1, 4) and (1, 3, 5): shared prefixes 1 and 1, with the other
    positive 1 and 2."""
    tokens = torch.tensor([[1, 2, -1], [1, 3, -1], [1, 4, -1], [1, 3, 5]])
    batch = rx.SessionBatch(tokens, torch.tensor([2, 2, 2, 3]), torch.tensor([0, 4]), torch.tensor([2]))
    pad = math.nan
    logps = torch.tensor(
        [[-1.0, -2.0, pad], [-1.0, -0.5, pad], [-1.0, -3.0, pad], [-1.0, -0.5, -1.5]], dtype=torch.float64
    ).requires_grad_()
    result = rx.rad_dpo_loss(logps, batch, sft_weight=0.5, level_weights=[1.0, 2.0, 9.0])
    rewards = [-3.0, -1.5, -4.0, -2.0]
    a = math.log(math.exp(-4) + math.exp(-2)) + 3
    assert result.rewards.tolist() == pytest.approx(rewards)
    assert result.margins.tolist() == pytest.approx([1.0, -1.0, 2.5, 0.5])
    assert result.accuracy.item() == 0.5
    assert result.preference.item() == pytest.approx(math.log1p(math.exp(a)))
    assert result.sft.item() == pytest.approx((1 + 2 * 2 + 1 + 2 * 0.5) / 4)
    assert result.loss.item() == pytest.approx(result.preference.item() + 0.5 * result.sft.item())
    (gradient,) = torch.autograd.grad(result.preference, logps)
    push = 1 / (1 + math.exp(-a))
    share = math.exp(-4) / (math.exp(-4) + math.exp(-2))
    assert gradient.flatten().tolist() == pytest.approx(
        [-push, -push, 0, 0, 0, 0, 0, push * share, 0, 0, push * (1 - share) * 2 / 3, push * (1 - share) * 2 / 3]
    )
    each = rx.rad_dpo_loss(logps, batch, positives="each")
    assert each.accuracy.item() == 0.75
