"""Policy training's operators on a CUDA device against the CPU. Skipped without a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.group_cases import CORES, assert_advantages_close, build_groups, name_of
from support.on_gpu import NEEDS_GPU, no_synchronisation
from support.policy_cases import CORES as LOSSES
from support.policy_cases import assert_policy_close, build_policy
from support.tolerances import close
from torch import Tensor

import raddpo_ext as rx

pytestmark = NEEDS_GPU
SHAPES = [[(1, 3), (2, 5), (0, 2), (3, 0), (0, 0)], [(1, 15)] * 600, [(5, 2000)], []]


def to_cuda(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to("cuda") if isinstance(v, Tensor | rx.SessionBatch) else v for k, v in arguments.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("core", CORES, ids=name_of)
def test_group_advantages_equal_the_cpu_without_synchronising(core: dict[str, Any], dtype: torch.dtype) -> None:
    for seed, counts in enumerate(SHAPES):
        case = build_groups(counts, 4, seed, dtype, few=bool(seed % 2))
        arguments = case.arguments(core | {"weights": True})
        expected = rx.group_advantages(case.rewards, case.sessions, **arguments)
        sessions, rewards, moved = case.sessions.to("cuda"), case.rewards.cuda(), to_cuda(arguments)
        with no_synchronisation():
            got = rx.group_advantages(rewards, sessions, **moved)
        back = rx.Advantages(*(None if value is None else value.cpu() for value in got))
        assert_advantages_close(back, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("core", LOSSES, ids=name_of)
def test_policy_loss_equals_the_cpu_without_synchronising(core: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = dict.fromkeys(("old_logps", "ref_logps", "weights", "gates", "level_weights"), True)
    options = core | tensors | {"kl_weight": 0.3, "nll_weight": 0.7, "protect": "positives"}
    for seed, counts in enumerate(SHAPES):
        case = build_policy(counts, 4, seed, dtype)
        arguments = case.arguments(options)
        leaf = case.logps.clone().requires_grad_()
        expected = rx.policy_loss(leaf, case.sessions, **arguments)
        (gradient,) = torch.autograd.grad(expected.loss, leaf)
        sessions, logps, moved = case.sessions.to("cuda"), case.logps.cuda().requires_grad_(), to_cuda(arguments)
        with no_synchronisation():
            got = rx.policy_loss(logps, sessions, **moved)
            (found,) = torch.autograd.grad(got.loss, logps)
        back = rx.PolicyLossOutput(*(value.detach().cpu() for value in got))
        assert_policy_close((back, found.cpu()), (expected, gradient))


def test_select_equals_the_cpu() -> None:
    case = build_groups([(1, 15), (0, 4), (2, 0), (0, 0), (1, 7)], 3, 0)
    keep = torch.tensor([True, False, True, True, False])
    (expected, rows), (got, got_rows) = case.sessions.select(keep), case.sessions.to("cuda").select(keep.cuda())
    assert got_rows.tolist() == rows.tolist()
    for name, value in expected.layout().items():
        assert torch.equal(getattr(got, name).cpu(), value) if isinstance(value, Tensor) else got.num_pairs == value


def test_infinite_rewards_raise_under_check() -> None:
    case = build_groups([(0, 4)], 2, 0, torch.float32)
    rewards, sessions = torch.tensor([0.0, torch.inf, 1.0, 0.0], device="cuda"), case.sessions.to("cuda")
    with pytest.raises(ValueError, match="rewards\\[1\\] must be NaN or at most"):
        rx.group_advantages(rewards, sessions, check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_legal_mass_equals_the_cpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sids = torch.randint(0, 40, (500, 3), generator=generator)
    index = rx.TrieIndex.build(sids, vocab=rx.SIDVocab([40, 40, 40], offset=5))
    nodes = index.nodes(index.vocab.encode(sids[:64]) if index.vocab else sids)
    logits = (3 * torch.randn(*nodes.shape, 4001, generator=generator)).to(dtype)
    found = []
    for device in ("cpu", "cuda"):
        leaf, places = logits.detach().to(device).requires_grad_(), nodes.to(device)
        moved = index.to(device)
        mass = rx.legal_mass(leaf, moved, places)
        mass[places >= 0].sum().backward()
        assert leaf.grad is not None
        found.append((mass.detach().cpu(), leaf.grad.float().cpu()))
    torch.testing.assert_close(found[1][0], found[0][0], **close("legal_mass"))
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 0.0)
    limits = close("legal_mass.grad")
    torch.testing.assert_close(found[1][1], found[0][1], rtol=limits["rtol"] + rounding, atol=limits["atol"])
