"""policy_loss against the reference, and as an operator: autograd, torch.compile, accumulation."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policy_cases import (
    CORES,
    Case,
    assert_policy_close,
    build_policy,
    name_of,
    policy_cases,
    policy_options,
    run,
)
from support.session_cases import on, settings_of_machine
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import _C, reference

CORE = pytest.mark.parametrize("core", CORES, ids=name_of)
EVERYTHING: dict[str, Any] = dict.fromkeys(("old_logps", "ref_logps", "weights", "gates", "level_weights"), True)
EVERYTHING |= {"kl_weight": 0.3, "nll_weight": 0.7, "protect": "positives"}


@CORE
@settings(max_examples=30)
@given(st.data())
def test_equals_the_reference(core: dict[str, Any], data: st.DataObject) -> None:
    """Value, metrics and gradient, on every instruction set and number of threads; padding is NaN."""
    case, options = data.draw(policy_cases((torch.float64, torch.float32))), data.draw(policy_options(core))
    with on(data.draw(settings_of_machine())):
        got = run(rx.policy_loss, case, options)
    assert_policy_close(got, run(reference.policy_loss, case.to(torch.float64), options))
    assert all(value.dtype == case.logps.dtype for value in got[0])


@pytest.mark.parametrize("core", [CORES[1], CORES[2]], ids=name_of)
def test_many_groups_on_two_threads(core: dict[str, Any]) -> None:
    """More than one piece of work: the same bits."""
    case = build_policy([(1, 15)] * 150 + [(2, 200)] + [(0, 1)] * 50, 4, seed=3)
    results = []
    for threads in (1, 2):
        with on((_C.isa(), threads)):
            results.append(run(rx.policy_loss, case, core | EVERYTHING))
    (first, gradient), (second, other) = results
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert torch.equal(gradient, other)
    plain = core | EVERYTHING | {"protect": "none"}
    assert_policy_close(run(rx.policy_loss, case, plain), run(reference.policy_loss, case, plain))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("core", [c for c in CORES if c["objective"] in ("clip", "sapo")], ids=name_of)
def test_gradcheck(core: dict[str, Any], reduction: str) -> None:
    """Numerically, where the terms have no constants that depend on the log-probs."""
    case = build_policy([(1, 3), (0, 2), (2, 1)], 3, seed=4)
    options = core | {"old_logps": True, "ref_logps": True, "kl_weight": 0.3, "nll_weight": 0.7, "reduction": reduction}
    arguments = case.arguments(options)
    if core.get("ratio") == "sequence":
        arguments["advantages"] = case.advantages  # GSPO-token holds part of the ratio constant
        options["aggregate"] = "token"
    logps = case.logps.nan_to_num(-1.0).requires_grad_()
    torch.autograd.gradcheck(lambda x: rx.policy_loss(x, case.sessions, **arguments).loss, logps)


def test_only_the_loss_has_a_gradient_and_only_one() -> None:
    case = build_policy([(1, 3)], 2, seed=4)
    logps = case.logps.nan_to_num(-1.0).requires_grad_()
    output = rx.policy_loss(logps, case.sessions, case.advantages, nll_weight=1.0)
    assert [value.requires_grad for value in output] == [True, *[False] * 6]
    (gradient,) = torch.autograd.grad(output.loss, logps, create_graph=True)
    with pytest.raises(RuntimeError, match="policy_loss has no second derivative"):
        torch.autograd.grad(gradient.sum(), logps)
    assert not rx.policy_loss(logps.detach(), case.sessions, case.advantages).loss.requires_grad
    with torch.no_grad():
        assert not rx.policy_loss(logps, case.sessions, case.advantages).loss.requires_grad
    with pytest.raises(NotImplementedError, match="policy_loss does not work within vmap"):
        torch.func.grad(lambda x: rx.policy_loss(x, case.sessions, case.advantages).loss)(logps.detach())


@pytest.mark.parametrize("aggregate", ["sequence", "token", "constant"])
def test_batches_add_up(aggregate: str) -> None:
    """Parts with the counts of the whole as normalizer: accumulation and DDP."""
    case = build_policy([(1, 5), (2, 3), (0, 4), (1, 0)], 3, seed=8)
    options = EVERYTHING | {"aggregate": aggregate, "experts": "nll"}
    whole, gradient = run(rx.policy_loss, case, options)
    parts = []
    for s in range(4):
        sessions, rows = case.sessions.select(torch.arange(4) == s)
        parts.append(
            Case(sessions, *(getattr(case, name)[rows] for name in list(vars(case))[1:-1]), case.level_weights)
        )
    counts = sum(rx.policy_counts(part.sessions, part.advantages, aggregate=aggregate, experts="nll") for part in parts)
    results = [run(rx.policy_loss, part, options | {"normalizer": counts}) for part in parts]
    torch.testing.assert_close(sum(result.loss for result, _ in results), whole.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in results]), gradient, rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(st.data())
def test_counts(data: st.DataObject) -> None:
    """By hand; the parts' add up to the whole's."""
    case, by_token = data.draw(policy_cases((torch.float64, torch.float32))), data.draw(st.booleans())
    advantages = case.token_advantages if by_token else case.advantages
    options = {
        "experts": data.draw(st.sampled_from(["group", "nll"])),
        "aggregate": data.draw(st.sampled_from(["sequence", "token", "constant"])),
        "count": data.draw(st.sampled_from(["active", "all"])),
    }
    sids = [
        tuple(row[:n]) for row, n in zip(case.sessions.tokens.tolist(), case.sessions.lengths.tolist(), strict=True)
    ]
    expected, parts = [0, 0], torch.zeros(2, dtype=torch.float64)
    for s, positives in enumerate(case.sessions.num_positives.tolist()):
        first, end = case.sessions.offsets[s : s + 2].tolist()
        experts = sids[first : first + positives]
        among = experts if options["experts"] == "group" else []
        kept = [i for i in range(first, end) if i >= first + positives or among]
        kept = [i for i in kept if sids[i] and (i < first + positives or sids[i] not in among)]
        if options["count"] == "all" or any(
            bool(advantages[i, : len(sids[i])].any() if by_token else advantages[i]) for i in kept
        ):
            expected[0] += sum(len(sids[i]) for i in kept) if options["aggregate"] == "token" else len(kept)
            expected[1] += sum(map(len, experts))
        part, rows = case.sessions.select(torch.arange(case.sessions.num_sessions) == s)
        parts += rx.policy_counts(part, advantages[rows], **options)
    counts = rx.policy_counts(case.sessions, advantages, **options)
    assert counts.dtype == torch.float64
    assert counts.tolist() == expected == parts.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_advantages_of_any_float_type(dtype: torch.dtype) -> None:
    case = build_policy([(1, 7), (0, 5)], 3, seed=1, dtype=torch.float32)
    given = case.advantages.to(dtype)
    got = rx.policy_loss(case.logps, case.sessions, given, gates=case.gates.to(dtype), weights=case.weights.to(dtype))
    expected = rx.policy_loss(
        case.logps,
        case.sessions,
        given.float(),
        gates=case.gates.to(dtype).float(),
        weights=case.weights.to(dtype).float(),
    )
    assert got.loss == expected.loss
    assert got.loss.dtype == torch.float32


def test_strided_tensors() -> None:
    case = build_policy([(1, 7), (0, 5)], 3, seed=1)

    def strided(values: Tensor) -> Tensor:
        return torch.stack([values, -values], -1)[..., 0]

    got = rx.policy_loss(
        strided(case.logps), case.sessions, strided(case.advantages), old_logps=strided(case.old_logps)
    )
    assert got.loss == rx.policy_loss(case.logps, case.sessions, case.advantages, old_logps=case.old_logps).loss


def test_compiles() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    case = build_policy([(1, 7), (0, 5), (2, 0)], 3, seed=1, dtype=torch.float32)
    logps = case.logps.nan_to_num(-1.0)
    arguments = case.arguments({"old_logps": True, "nll_weight": 0.5})

    def step(logps: Tensor) -> tuple[Tensor, Tensor]:
        output = rx.policy_loss(logps * 2, case.sessions, **arguments)
        return output.loss * 3, output.ratios + 0

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    results = []
    for function in (step, compiled):
        leaf = logps.clone().requires_grad_()
        loss, ratios = function(leaf)
        loss.backward()
        assert leaf.grad is not None
        results.append((loss.detach(), ratios, leaf.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
