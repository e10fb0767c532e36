"""Random ragged groups with log-probs and advantages for hypothesis, and the options of policy_loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import raddpo_ext as rx

from .session_cases import build
from .tolerances import TOLERANCE

TENSORS = ("old_logps", "ref_logps", "weights", "gates", "level_weights")
#: How a token becomes a term: every combination.
CORES: list[dict[str, Any]] = [
    *(
        {"objective": o, "ratio": r}
        for o in ("reinforce", "clip", "ecpo", "gbpo")
        for r in ("token", "sequence", "item")
    ),
    {"objective": "clip", "ratio": "token", "dual_clip": 1.3},
    {"objective": "clip", "ratio": "sequence", "dual_clip": 1.3, "clip": (0.05, 0.1)},
    {"objective": "cispo", "clip": (1.0, 0.3)},
    {"objective": "sapo", "clip": (1.0, 1.05)},
]


def name_of(core: dict[str, Any]) -> str:
    return "-".join(str(value) for value in core.values())


@dataclass
class Case:
    """A batch with every tensor that policy_loss takes; NaN wherever a length forbids to read."""

    sessions: rx.SessionBatch
    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    advantages: Tensor  # [C]
    token_advantages: Tensor  # [C, L]
    weights: Tensor
    gates: Tensor
    level_weights: Tensor

    def arguments(self, options: dict[str, Any]) -> dict[str, Any]:
        """``options`` with this case's tensor for each ``True`` that stands for one."""
        by_token = options.get("advantages", False)
        chosen = {k: getattr(self, k) if k in TENSORS and v is True else v for k, v in options.items()}
        return chosen | {"advantages": self.token_advantages if by_token else self.advantages}

    def to(self, dtype: torch.dtype) -> Case:
        floats = {f.name: getattr(self, f.name).to(dtype) for f in fields(self) if f.name != "sessions"}
        return replace(self, **floats)


def build_policy(
    counts: list[tuple[int, int]], levels: int, seed: int, dtype: torch.dtype = torch.float64, far: float = 0.3
) -> Case:
    """Groups of (experts, rollouts), some of equal SIDs, some empty; one advantage in eight is 0, one group in four is
    dead. ``far``: how far old and reference log-probs are from ours."""
    case = build(counts, levels, seed)
    generator = torch.Generator().manual_seed(seed)
    candidates, padding = case.sessions.num_candidates, ~case.sessions.mask()

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def padded(values: Tensor) -> Tensor:
        return values.masked_fill(padding, math.nan)

    advantages, by_token = randn(candidates), randn(candidates, levels)
    dead = (randn(len(counts)) < -0.67)[case.sessions.owners()]
    few = randn(candidates).abs() < 0.15
    advantages[dead | few] = 0
    by_token[dead] = 0
    by_token[by_token.abs() < 0.15] = 0
    return Case(
        case.sessions,
        case.logps,
        case.logps + far * randn(candidates, levels),
        case.logps + far * randn(candidates, levels),
        advantages,
        padded(by_token),
        randn(candidates).abs(),
        padded(randn(candidates, levels).abs()),
        case.level_weights,
    ).to(dtype)


@st.composite
def policy_cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64,), most: int = 4) -> Case:
    experts, rollouts = st.integers(0, 2), st.sampled_from([0, 1, 2, 3, 5, 17])
    counts = draw(st.lists(st.tuples(experts, rollouts), max_size=most))
    levels, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**32))
    return build_policy(counts, levels, seed, draw(st.sampled_from(dtypes)), draw(st.sampled_from([0.3, 9.0])))


@st.composite
def policy_options(draw: st.DrawFn, core: dict[str, Any]) -> dict[str, Any]:
    """What is left to choose beside one of :data:`CORES`."""
    maybe = st.sampled_from([None, True])
    chosen: dict[str, Any] = {name: draw(maybe) for name in TENSORS}
    chosen |= {
        "advantages": draw(st.booleans()),  # per token
        "kl": draw(st.sampled_from(["k1", "k2", "k3"])),
        "kl_weight": draw(st.sampled_from([0.0, 0.3])) if chosen["ref_logps"] else 0.0,
        "nll_weight": draw(st.sampled_from([0.0, 0.7])),
        "experts": draw(st.sampled_from(["group", "nll"])),
        "protect": draw(st.sampled_from(["none", "positives"])),
        "aggregate": draw(st.sampled_from(["sequence", "token", "constant"])),
        "count": draw(st.sampled_from(["active", "all"])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    if chosen["aggregate"] == "constant":
        chosen["max_length"] = draw(st.sampled_from([None, 7]))
    if chosen["reduction"] == "mean":
        chosen["normalizer"] = draw(st.sampled_from([None, (3, 7.5), (torch.tensor(2.5), torch.tensor(4))]))
    return chosen | core


def run(function: Callable[..., Any], case: Case, options: dict[str, Any]) -> tuple[Any, Tensor]:
    """The result, and the gradient of the loss (of a vector times 1, 1.5, 2, ...)."""
    logps = case.logps.clone().requires_grad_()
    result = function(logps, case.sessions, **case.arguments(options))
    upstream = (1 + 0.5 * torch.arange(result.loss.numel(), dtype=logps.dtype)).view(result.loss.shape)
    (gradient,) = torch.autograd.grad(result.loss, logps, upstream)
    return result, gradient


def assert_policy_close(got: tuple[Any, Tensor], expected: tuple[Any, Tensor]) -> None:
    """Results and gradients. The absolute tolerance is times the largest of each, if that is above 1."""
    rtol, atol = TOLERANCE["policy_loss", got[1].dtype]
    for value, other in zip((*got[0], got[1]), (*expected[0], expected[1]), strict=True):
        scale = max([1.0, *other.detach().abs().flatten().tolist()])
        torch.testing.assert_close(value.detach().double(), other.detach().double(), rtol=rtol, atol=scale * atol)
