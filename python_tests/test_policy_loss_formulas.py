"""policy_loss against plain transcriptions: every preset as its paper writes it, and the table of coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference

GROUPS, SIZE, LEVELS = 4, 6, 3
BOTH = pytest.mark.parametrize("function", [rx.policy_loss, reference.policy_loss], ids=["operator", "reference"])


class Batch:
    """Groups of one expert and five rollouts, of different SIDs of 1 to 3 tokens; far enough to clip."""

    def __init__(self, seed: int = 0) -> None:
        rows = GROUPS * SIZE
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        lengths = torch.randint(1, LEVELS + 1, (rows,), generator=generator)
        tokens = torch.arange(rows * LEVELS).view(rows, LEVELS)
        offsets = torch.arange(0, rows + 1, SIZE)
        self.sessions = rx.SessionBatch(tokens, lengths, offsets, torch.ones(GROUPS, dtype=torch.int64))
        self.mask = self.sessions.mask()
        self.logps = (-2 * randn(rows, LEVELS).abs() - 0.01).requires_grad_()
        self.old = (self.logps.detach() + 0.4 * randn(rows, LEVELS)).clamp(max=-0.01)
        self.ref = self.logps.detach() + 0.4 * randn(rows, LEVELS)
        self.A = randn(rows)
        self.expert = self.sessions.is_positive()

    def rows(self, values: Tensor) -> Tensor:
        """The sum over each row's tokens."""
        return torch.where(self.mask, values, 0.0).sum(1)

    def means(self, values: Tensor) -> Tensor:
        return self.rows(values) / self.mask.sum(1)


def surrogate(rho: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return torch.min(rho * advantage, rho.clamp(1 - low, 1 + high) * advantage)


def token_terms(b: Batch, low: float = 0.2, high: float = 0.2) -> Tensor:
    return surrogate((b.logps - b.old).exp(), b.A[:, None], low, high)


def k3(b: Batch) -> Tensor:
    return (b.ref - b.logps).exp() - (b.ref - b.logps) - 1


def grpo(b: Batch, beta: float) -> Tensor:
    return -b.means(token_terms(b) - beta * k3(b)).mean()


def dr_grpo(b: Batch, beta: float) -> Tensor:
    return -b.rows(token_terms(b) - beta * k3(b)).mean() / LEVELS


def dapo(b: Batch, beta: float) -> Tensor:
    return -b.rows(token_terms(b, 0.2, 0.28) - beta * k3(b)).sum() / b.mask.sum()


def gspo(b: Batch, beta: float) -> Tensor:
    s = b.means(b.logps - b.old).exp()
    return -(surrogate(s, b.A, 3e-4, 4e-4) - beta * b.means(k3(b))).mean()


def cispo(b: Batch, beta: float) -> Tensor:
    weight = (b.logps - b.old).exp().clamp(max=5.0).detach()
    return -b.rows(weight * b.A[:, None] * b.logps - beta * k3(b)).sum() / b.mask.sum()


def sapo(b: Batch, beta: float) -> Tensor:
    rho, tau = (b.logps - b.old).exp(), torch.where(b.A > 0, b.A.new_tensor(1.0), 1.05)[:, None]
    return -b.means(torch.sigmoid(tau * (rho - 1)) * 4 / tau * b.A[:, None] - beta * k3(b)).mean()


def grpo_sr(b: Batch, beta: float) -> Tensor:
    policy = b.means(token_terms(b) - beta * k3(b))[~b.expert].mean()
    return -policy + 0.1 * -(b.rows(b.logps)[b.expert].sum() / b.mask[b.expert].sum())


def minionerec(b: Batch, beta: float) -> Tensor:
    return -b.means((b.logps - b.logps.detach()).exp() * b.A[:, None] - beta * k3(b)).mean()


def ecpo(b: Batch, beta: float) -> Tensor:
    pi, old = b.rows(b.logps).exp(), b.rows(b.old).exp()
    old = torch.max(pi.detach() / (1 + 0.2 + 0.1), old)
    return -(surrogate(pi / old, b.A, 0.2, 0.2) - beta * b.means(k3(b))).mean()


def gbpo(b: Batch, beta: float) -> Tensor:
    pi, old = b.rows(b.logps).exp(), b.rows(b.old).exp()
    old = torch.where(b.A >= 0, torch.max(old, pi.detach()), torch.max(old, 1 - pi.detach()))
    return -(pi / old * b.A - beta * b.means(k3(b))).mean()


#: EG-GRPO is GRPO over a group that holds the expert.
PUBLISHED: dict[str, Callable[[Batch, float], Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "grpo_sr": grpo_sr,
    "eg_grpo": grpo,
    "minionerec": minionerec,
    "ecpo": ecpo,
    "gbpo": gbpo,
}


def both(function: Callable[..., Any], b: Batch, expected: Tensor, tolerance: float = 1e-13, **options: Any) -> None:
    """The loss and its gradient."""
    got = function(b.logps, b.sessions, b.A, old_logps=b.old, ref_logps=b.ref, **options).loss
    gradients = [torch.autograd.grad(loss, b.logps)[0] for loss in (got, expected)]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*gradients, rtol=10 * tolerance, atol=0.1 * tolerance)
    assert gradients[0].any()


def test_all_presets_are_transcribed() -> None:
    assert PUBLISHED.keys() == rx.POLICY_PRESETS.keys()


@BOTH
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", rx.POLICY_PRESETS)
def test_presets(name: str, beta: float, function: Callable[..., Any]) -> None:
    b = Batch()
    both(function, b, PUBLISHED[name](b, beta), **rx.POLICY_PRESETS[name], kl_weight=beta)


@BOTH
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"])
def test_equals_trl(name: str, beta: float, function: Callable[..., Any]) -> None:
    """The loss of TRL's GRPOTrainer on the same log-probs, with what its documentation recommends for each."""
    trl = pytest.importorskip("trl", reason="needs trl")
    b = Batch()
    trainer = MagicMock(
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if name == "gspo" else "token",
        beta=beta,
        loss_type="grpo" if name == "gspo" else name,
        epsilon_low=3e-4 if name == "gspo" else 0.2,
        epsilon_high={"gspo": 4e-4, "dapo": 0.28, "cispo": 5.0}.get(name, 0.2),
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LEVELS,
        _entropy_bonus_enabled=False,
    )
    trainer.args = trl.GRPOConfig(
        output_dir="unused", bf16=False, use_cpu=True, report_to="none", use_bias_correction_kl=False
    )
    trainer.args.steps_per_generation = trainer.accelerator.num_processes = 1
    trainer.accelerator.gather = lambda values: values
    trainer._get_per_token_logps_and_entropies.return_value = b.logps, torch.zeros_like(b.logps), None
    ids = b.sessions.tokens
    batch = {"prompt_ids": ids[:, :1], "prompt_mask": torch.ones_like(ids[:, :1]), "completion_ids": ids}
    batch |= {"completion_mask": b.mask.double(), "advantages": b.A, "num_items_in_batch": b.mask.sum()}
    batch |= {"old_per_token_logps": b.old, "ref_per_token_logps": b.ref}
    expected = trl.GRPOTrainer._compute_loss(trainer, None, batch)
    options = {**rx.POLICY_PRESETS[name], "kl_weight": beta}
    both(function, b, expected, **options, tolerance=1e-7 if name == "sapo" else 1e-13)  # its temperatures are float32


@BOTH
@pytest.mark.parametrize("name", rx.POLICY_PRESETS)
def test_dead_groups(name: str, function: Callable[..., Any]) -> None:
    """``count="all"`` divides by their rows too, as published, and regularises them; the default leaves them out."""
    b = Batch()
    b.A[:SIZE] = 0
    both(function, b, PUBLISHED[name](b, 0.04), **(rx.POLICY_PRESETS[name] | {"count": "all"}), kl_weight=0.04)
    live, rows = b.sessions.select(torch.arange(GROUPS) > 0)
    rest = Batch()
    rest.sessions, rest.mask, rest.expert = live, b.mask[rows], b.expert[rows]
    rest.logps, rest.old, rest.ref, rest.A = b.logps[rows], b.old[rows], b.ref[rows], b.A[rows]
    both(function, b, PUBLISHED[name](rest, 0.04), **(rx.POLICY_PRESETS[name] | {"count": "active"}), kl_weight=0.04)


@BOTH
@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_gspo_token(aggregate: str, function: Callable[..., Any]) -> None:
    """``s_i,t = sg(s_i) pi_t / sg(pi_t)`` with an advantage per token."""
    b = Batch(1)
    advantages = torch.randn(b.logps.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    s = b.means(b.logps - b.old).exp().detach()[:, None] * (b.logps - b.logps.detach()).exp()
    terms = torch.where(b.mask, surrogate(s, advantages, 0.2, 0.2), 0.0)
    expected = -(terms.sum() / b.mask.sum() if aggregate == "token" else (terms.sum(1) / b.mask.sum(1)).mean())
    b.A = advantages
    both(function, b, expected, ratio="sequence", aggregate=aggregate)


@BOTH
def test_dual_clip(function: Callable[..., Any]) -> None:
    """As verl writes it: two maxima, and a minimum where the advantage is negative."""
    b, c = Batch(3), 1.5
    b.old = b.old - 0.5
    rho, A = (b.logps - b.old).exp(), b.A[:, None]
    clipped = torch.maximum(-A * rho, -A * rho.clamp(0.8, 1.2))
    expected = b.means(torch.where(A < 0, torch.min(-A * c, clipped), clipped)).mean()
    both(function, b, expected, dual_clip=c)


@BOTH
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_divergences(kl: str, function: Callable[..., Any]) -> None:
    b = Batch(4)
    x = b.logps - b.ref
    value = {"k1": x, "k2": x**2 / 2, "k3": (-x).exp() + x - 1}[kl]
    both(function, b, grpo(b, 0.0) + 0.5 * b.means(value).mean(), kl=kl, kl_weight=0.5)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


RHO = [0.5, 0.75, 1.0, 1.25, 1.5, 3.0]
#: The derivative of a token's term in its log-prob, at clip = (0.2, 0.4), by ratio, old probability and advantage.
TABLE: dict[str, Callable[[float, float, float], float]] = {
    "reinforce": lambda rho, old, A: -A,
    "clip": lambda rho, old, A: 0.0 if (A > 0 and rho > 1.4) or (A < 0 and rho < 0.8) else -rho * A,
    "dual clip": lambda rho, old, A: 0.0 if (A > 0 and rho > 1.4) or (A < 0 and (rho < 0.8 or rho > 2.0)) else -rho * A,
    "cispo": lambda rho, old, A: -min(rho, 1.4) * A,
    "sapo": lambda rho, old, A: (
        -4 * sigmoid((t := 0.2 if A > 0 else 0.4) * (rho - 1)) * (1 - sigmoid(t * (rho - 1))) * rho * A
    ),
    "ecpo": lambda rho, old, A: 0.0 if (A > 0 and rho > 1.4) or (A < 0 and rho < 0.8) else -min(rho, 1.5) * A,
    "gbpo": lambda rho, old, A: -rho * old / max(old, rho * old if A > 0 else 1 - rho * old) * A,
}


@BOTH
@pytest.mark.parametrize("name", TABLE)
def test_table_of_coefficients(name: str, function: Callable[..., Any]) -> None:
    for rho in RHO:
        for old in (0.01, 0.3):
            for advantage in (-2.0, 0.5):
                logps = torch.tensor([[math.log(rho * old)]], dtype=torch.float64, requires_grad=True)
                one = torch.ones(1, dtype=torch.int64)
                sessions = rx.SessionBatch(one[:, None], one, torch.tensor([0, 1]), 0 * one)
                options: dict[str, Any] = {"objective": "clip" if name == "dual clip" else name, "clip": (0.2, 0.4)}
                if name == "dual clip":
                    options["dual_clip"] = 2.0
                if name in ("reinforce", "gbpo"):
                    del options["clip"]
                given = torch.tensor([advantage], dtype=torch.float64)
                before = torch.tensor([[math.log(old)]], dtype=torch.float64)
                loss = function(logps, sessions, given, old_logps=before, **options).loss
                (got,) = torch.autograd.grad(loss, logps)
                assert float(got) == pytest.approx(TABLE[name](rho, old, advantage), rel=1e-12, abs=1e-15)
