"""The counts of PolicyTrainer's objective: what the policy loss itself divides by."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given

pytest.importorskip("transformers")
from support.policy_cases import Case, policy_cases

import raddpo_ext as rx
from raddpo_ext.integrations.policy_objective import counts

OPTIONS = [
    {"experts": experts, "aggregate": aggregate, "count": count}
    for experts, aggregate, count in product(["group", "nll"], ["sequence", "token", "constant"], ["active", "all"])
]


@given(case=policy_cases())
def test_counts_are_the_divisors_of_the_loss(case: Case) -> None:
    for options in OPTIONS:
        for advantages in (case.advantages, case.token_advantages):
            more: dict[str, Any] = {"ref_logps": case.ref_logps, "kl_weight": 0.5, "nll_weight": 0.5, **options}
            total = rx.policy_loss(case.logps, case.sessions, advantages, reduction="sum", **more)
            mean = rx.policy_loss(case.logps, case.sessions, advantages, **more)
            rows, tokens = counts(case.sessions, advantages, options).clamp(min=1).tolist()
            torch.testing.assert_close(mean.policy, total.policy / rows)
            torch.testing.assert_close(mean.kl, total.kl / rows)
            torch.testing.assert_close(mean.nll, total.nll / tokens)
