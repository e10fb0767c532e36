"""The groups whose policy loss is timed: those of the advantages, one update away from the policy that drew them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from raddpo_ext.bench import group_advantages_cases
from raddpo_ext.policy.group_advantages import group_advantages

KL_WEIGHT = 0.04
Step = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """``preset`` is one of :data:`raddpo_ext.POLICY_PRESETS`; ``ref``: with a KL."""

    preset: str
    rows: int
    ref: bool = False

    @property
    def name(self) -> str:
        return f"{self.preset} {self.rows} rows{' with KL' if self.ref else ''}"


CASES = [Case(preset, rows) for preset in ("grpo", "gspo", "cispo") for rows in (512, 16_384)]
CASES += [Case("grpo", rows, ref=True) for rows in (512, 16_384)]


class Batch:
    """A case's groups, advantages and log-probs, a leaf."""

    def __init__(self, case: Case, device: torch.device | str = "cpu") -> None:
        groups = group_advantages_cases.Batch(group_advantages_cases.Case("sequence", case.rows), device)
        generator = torch.Generator().manual_seed(1)
        shape = groups.sessions.tokens.shape
        logps = -3 * torch.rand(shape, generator=generator)
        near = [(logps + 0.2 * torch.randn(shape, generator=generator)).to(device) for _ in range(2)]
        self.case, self.sessions = case, groups.sessions
        self.old_logps, self.ref_logps = near[0], near[1] if case.ref else None
        self.logps = logps.to(device).requires_grad_()
        self.advantages = group_advantages(groups.rewards, groups.sessions).values

    def differentiate(self, loss: Callable[[Tensor], Tensor]) -> Step:
        def step() -> tuple[Tensor, Tensor]:
            value = loss(self.logps)
            return value.detach(), torch.autograd.grad(value, self.logps)[0]

        return step
