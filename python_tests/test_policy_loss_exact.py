"""What holds exactly: groups that do not count, rows that are left out, protected prefixes; and what is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policy_cases import CORES, Case, build_policy, name_of, policy_cases, policy_options, run
from torch import Tensor

import raddpo_ext as rx

CORE = pytest.mark.parametrize("core", CORES, ids=name_of)
NAN = math.nan
EVERYTHING: dict[str, Any] = dict.fromkeys(("old_logps", "ref_logps", "weights", "gates", "level_weights"), True)
EVERYTHING |= {"kl_weight": 0.3, "nll_weight": 0.7}


def group(tokens: Any, experts: int = 0) -> rx.SessionBatch:
    tokens = torch.tensor(tokens)
    lengths = torch.full((len(tokens),), tokens.shape[1])
    return rx.SessionBatch(tokens, lengths, torch.tensor([0, len(tokens)]), torch.tensor([experts]))


def gradient_of(sessions: rx.SessionBatch, advantages: Any, **options: Any) -> Tensor:
    """At log-probs of -1."""
    logps = torch.full(sessions.tokens.shape, -1.0, dtype=torch.float64, requires_grad=True)
    loss = rx.policy_loss(logps, sessions, torch.tensor(advantages, dtype=torch.float64), **options).loss
    return torch.autograd.grad(loss, logps)[0]


@CORE
@settings(max_examples=20)
@given(st.data())
def test_dead_groups_add_exactly_nothing(core: dict[str, Any], data: st.DataObject) -> None:
    """The batch without them gives the same bits, whatever the options; their coefficients are 0.0."""
    case = data.draw(policy_cases())
    options = data.draw(policy_options(core)) | {"count": "active", "reduction": "mean"}
    got, gradient = run(rx.policy_loss, case, options)
    advantages = case.token_advantages if options["advantages"] else case.advantages[:, None].expand_as(case.gates)
    live = ((advantages != 0) & case.sessions.mask()).any(1)
    owners = case.sessions.owners()
    keep = torch.tensor([bool(live[owners == s].any()) for s in range(case.sessions.num_sessions)], dtype=torch.bool)
    sessions, rows = case.sessions.select(keep)
    left = Case(sessions, *(getattr(case, name)[rows] for name in list(vars(case))[1:-1]), case.level_weights)
    expected, other = run(rx.policy_loss, left, options)
    for field in ("loss", "policy", "kl", "nll", "clipped", "approx_kl"):
        assert torch.equal(getattr(got, field), getattr(expected, field)), field
    assert torch.equal(got.ratios[rows], expected.ratios)
    assert torch.equal(gradient[rows], other)
    dead = torch.ones(len(gradient), dtype=torch.bool)
    dead[rows] = False
    assert not gradient[dead].any()
    assert not gradient[~case.sessions.mask()].any()


@CORE
@pytest.mark.parametrize("levels", [1, 3, 4, 5])
def test_groups_are_taken_together(isa: str, core: dict[str, Any], levels: int) -> None:
    """A group's results are, bit for bit, what they are without its neighbours, and however many it has."""
    counts = [(1, 7), (0, 3), (2, 0), (0, 0), (0, 16), (1, 15)] * 12 + [(1, 600), (0, 1)]
    case = build_policy(counts, levels, seed=levels)
    options = core | EVERYTHING | {"protect": "positives", "reduction": "none"}
    got, gradient = run(rx.policy_loss, case, options)
    for s in range(0, len(counts), 4):
        keep = torch.arange(len(counts)) == s
        sessions, rows = case.sessions.select(keep)
        alone = Case(sessions, *(getattr(case, name)[rows] for name in list(vars(case))[1:-1]), case.level_weights)
        expected, other = run(rx.policy_loss, alone, options)
        for field in ("loss", "policy", "kl", "nll"):
            assert torch.equal(getattr(got, field)[s], getattr(expected, field)[0]), (field, s)
        assert torch.equal(got.ratios[rows], expected.ratios)
        torch.testing.assert_close(gradient[rows], other * (1 + 0.5 * s), rtol=1e-15, atol=0)


@CORE
@pytest.mark.parametrize("count", ["active", "all"])
def test_a_batch_of_dead_groups(core: dict[str, Any], count: str) -> None:
    """0, not NaN; under "all" the policy term is 0 too."""
    case = build_policy([(1, 5), (0, 0), (0, 1), (2, 0)], 3, seed=2)
    case.advantages.zero_()
    got, gradient = run(rx.policy_loss, case, core | EVERYTHING | {"count": count})
    assert got.policy == 0
    assert got.loss.isfinite()
    assert (got.loss == 0) == (count == "active")
    assert bool(gradient.any()) == (count == "all")
    for counts in ([], [(0, 0)], [(1, 0)]):
        empty = build_policy(counts, 3, seed=0)
        empty.advantages.zero_()
        assert run(rx.policy_loss, empty, core)[0].loss == 0


@CORE
def test_rows_of_no_tokens(core: dict[str, Any]) -> None:
    """They add nothing and count nowhere, with an advantage too."""
    case = build_policy([(1, 6)], 3, seed=11)
    case.sessions.lengths[:] = torch.tensor([3, 0, 2, 1, 0, 3, 0])
    for tensor in (case.logps, case.old_logps, case.ref_logps, case.gates):
        tensor.nan_to_num_(-1.0)
        tensor[~case.sessions.mask()] = NAN
    case.advantages[:] = torch.arange(1.0, 8.0)
    got, gradient = run(rx.policy_loss, case, core | EVERYTHING)
    full = torch.tensor([0, 2, 3, 5])
    sessions = rx.SessionBatch(
        case.sessions.tokens[full], case.sessions.lengths[full], torch.tensor([0, 4]), torch.tensor([1])
    )
    left = Case(sessions, *(getattr(case, name)[full] for name in list(vars(case))[1:-1]), case.level_weights)
    expected, other = run(rx.policy_loss, left, core | EVERYTHING)
    assert got.loss == expected.loss
    assert torch.equal(gradient[full], other)
    assert got.ratios[[1, 4, 6]].tolist() == [1, 1, 1]


@CORE
@pytest.mark.parametrize("gap", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_gaps_are_finite(core: dict[str, Any], gap: float, dtype: torch.dtype) -> None:
    case = build_policy([(1, 7)], 3, seed=5, dtype=dtype)
    case.advantages[:] = torch.tensor([1.0, -1, 2, -2, 1, -1, 1, -1])
    case.old_logps += gap
    for kl in ("k1", "k2", "k3"):
        case.ref_logps = case.old_logps
        got, gradient = run(rx.policy_loss, case, core | EVERYTHING | {"kl": kl})
        assert all(value.isfinite().all() for value in got)
        assert gradient.isfinite().all()
    got, gradient = run(rx.policy_loss, case, core | {"old_logps": True})
    if core["objective"] in ("clip", "sapo") or (core["objective"] == "gbpo" and gap > 0):
        assert not gradient.any()  # no gradient beyond 20


@pytest.mark.parametrize("ratio", ["token", "sequence", "item"])
def test_the_first_step_has_a_ratio_of_one(ratio: str) -> None:
    """Old log-probs that are equal, or not given: exactly 1, and plain policy gradients."""
    case = build_policy([(1, 7), (0, 4)], 3, seed=9)
    expected = run(rx.policy_loss, case, {"ratio": ratio})
    case.old_logps = case.logps
    got = run(rx.policy_loss, case, {"ratio": ratio, "old_logps": True})
    assert set(got[0].ratios.tolist()) == {1.0}
    assert got[0].approx_kl == 0
    assert not got[0].clipped.any()
    assert torch.equal(got[1], expected[1])


def test_a_rollout_that_equals_an_expert() -> None:
    """It counts once: with the experts in the group it is left out; under "nll" the expert is, and it stays."""
    sessions = group([[1, 2], [3, 4], [1, 2], [5, 6]], experts=1)
    both = gradient_of(sessions, [1.0, -1.0, 1.0, -1.0])
    assert both.tolist() == [
        [pytest.approx(-1 / 6)] * 2,
        [pytest.approx(1 / 6)] * 2,
        [0, 0],
        [pytest.approx(1 / 6)] * 2,
    ]
    nll = gradient_of(sessions, [1.0, -1.0, 1.0, -1.0], experts="nll", nll_weight=1.0)
    assert nll[2].tolist() == [pytest.approx(-1 / 6)] * 2
    assert nll[0].tolist() == [-0.5, -0.5]


def test_experts_of_the_nll_have_no_advantage() -> None:
    """Their advantages do not make a group count, nor protect a prefix."""
    sessions = group([[1, 2], [1, 4]], experts=1)
    assert not gradient_of(sessions, [1.0, 0.0], experts="nll", nll_weight=1.0).any()
    pulled = gradient_of(sessions, [1.0, -1.0], experts="nll", protect="positives")
    assert pulled.tolist() == [[0, 0], [0.5, 0.5]]
    assert gradient_of(sessions, [1.0, -1.0], protect="positives").tolist() == [[-0.25, -0.25], [0, 0.25]]


@pytest.mark.parametrize("ratio", ["token", "sequence", "item"])
@pytest.mark.parametrize("objective", ["reinforce", "clip", "ecpo", "gbpo"])
def test_protected_prefixes(objective: str, ratio: str) -> None:
    """Exactly 0.0 where a row that is pushed down agrees with one that is pushed up, and nothing else changes."""
    sessions = group([[1, 2, 3], [1, 2, 4], [1, 5, 3], [6, 2, 3], [1, 2, 3]])
    advantages = [1.0, -1.0, -0.5, -0.5, -2.0]
    options = {"objective": objective, "ratio": ratio}
    free = gradient_of(sessions, advantages, **options)
    held = gradient_of(sessions, advantages, **options, protect="positives")
    protected = torch.tensor([[0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    assert (free[protected] > 0).all()
    assert held.tolist() == free.masked_fill(protected, 0.0).tolist()


def test_protection_by_token() -> None:
    """An advantage per token: the row above must be pushed up at that very token."""
    sessions = group([[1, 2], [1, 3], [4, 5]])
    advantages = [[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]
    assert gradient_of(sessions, advantages, protect="positives", reduction="sum")[1].tolist() == [0, 0.5]
    advantages[0] = [-1.0, 1.0]
    assert gradient_of(sessions, advantages, protect="positives", reduction="sum")[1].tolist() == [0.5, 0.5]


def test_a_weight_of_zero_and_a_gate_of_zero() -> None:
    """No term and no coefficient, but the rows still count."""
    sessions = group([[1, 2], [3, 4]])
    weights = torch.tensor([0.0, 2.0])
    assert gradient_of(sessions, [1.0, -1.0], weights=weights).tolist() == [[0, 0], [0.5, 0.5]]
    gates = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert gradient_of(sessions, [1.0, -1.0], gates=gates).tolist() == [[-0.25, 0], [0, 0.5]]


@CORE
def test_tokens_out_of_their_support(core: dict[str, Any]) -> None:
    """A log-prob of -inf, in old and reference too: nothing is NaN where the advantage is 0 or the two agree."""
    case = build_policy([(0, 4)], 2, seed=1)
    case.sessions.lengths[:] = 2
    for tensor in (case.logps, case.old_logps, case.ref_logps, case.gates):
        tensor.nan_to_num_(-1.0)
    case.advantages[:] = torch.tensor([0.0, 1.0, -1.0, 0.5])
    for tensor in (case.logps, case.old_logps, case.ref_logps):
        tensor[0, 1] = -math.inf
    got, gradient = run(rx.policy_loss, case, core | {"old_logps": True, "ref_logps": True, "kl_weight": 0.5})
    assert got.loss.isfinite()
    assert gradient.isfinite().all()


SESSIONS = group([[1, 2], [1, 3], [4, 5]])
LOGPS = torch.full((3, 2), -1.0)
A = torch.tensor([1.0, -0.5, -0.5])
FLOATS = "must be a float32, bfloat16, float16 or float64 tensor, got "
MESSAGES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logps": [[-1.0]]}, TypeError, "logps must be a Tensor, got list"),
    ({"logps": LOGPS.half()}, TypeError, "logps must be float32 or float64, got torch.float16"),
    ({"logps": LOGPS[:, :1]}, ValueError, "logps must have the shape of tokens, (3, 2), got (3, 1)"),
    ({"logps": LOGPS[0]}, ValueError, "logps must have 2 dimensions, got shape (2,)"),
    ({"logps": LOGPS.to("meta")}, ValueError, "logps must be on the device of sessions, cpu, got meta"),
    ({"logps": LOGPS / 0 * 0, "check": True}, ValueError, "logps[0, 0] is NaN"),
    ({"old_logps": LOGPS * NAN, "check": True}, ValueError, "old_logps[0, 0] is NaN"),
    ({"ref_logps": LOGPS * NAN, "check": True}, ValueError, "ref_logps[0, 0] is NaN"),
    ({"sessions": A}, TypeError, "sessions must be a SessionBatch, got Tensor"),
    ({"advantages": [1.0, 2.0, 3.0]}, TypeError, f"advantages {FLOATS}list"),
    ({"advantages": A.long()}, TypeError, f"advantages {FLOATS}torch.int64"),
    ({"advantages": A[:2]}, ValueError, "advantages must have shape (3,), got (2,)"),
    ({"advantages": A[:, None]}, ValueError, "advantages must have shape (3, 2), got (3, 1)"),
    ({"advantages": A.to("meta")}, ValueError, "advantages must be on cpu, got meta"),
    ({"advantages": torch.tensor([1.0, NAN, 0.0])}, ValueError, "advantages[1] must be finite, got nan"),
    ({"advantages": torch.tensor([1.0, 1.0, -math.inf])}, ValueError, "advantages[2] must be finite, got -inf"),
    ({"advantages": LOGPS / 0}, ValueError, "advantages[0, 0] must be finite, got -inf"),
    ({"gates": LOGPS / 0}, ValueError, "gates[0, 0] must be finite, got -inf"),
    ({"gates": A}, ValueError, "gates must have shape (3, 2), got (3,)"),
    ({"old_logps": LOGPS.double()}, TypeError, "old_logps must be torch.float32, got torch.float64"),
    ({"old_logps": LOGPS[:, 0]}, ValueError, "old_logps must have shape (3, 2), got (3,)"),
    ({"ref_logps": LOGPS[:2]}, ValueError, "ref_logps must have shape (3, 2), got (2, 2)"),
    ({"kl_weight": 0.1}, ValueError, "ref_logps must be given with kl_weight=0.1, got None"),
    ({"kl_weight": -0.1, "ref_logps": LOGPS}, ValueError, "kl_weight must be at least 0, got -0.1"),
    ({"nll_weight": NAN}, ValueError, "nll_weight must be finite, got nan"),
    ({"weights": A}, ValueError, "weights[1] must be finite and at least 0, got -0.5"),
    ({"weights": A * NAN}, ValueError, "weights[0] must be finite and at least 0, got nan"),
    ({"weights": A[:2]}, ValueError, "weights must have shape (3,), got (2,)"),
    ({"objective": "ppo"}, ValueError, "objective must be one of 'reinforce', 'clip', 'cispo', 'sapo', 'ecpo', 'gbpo'"),
    ({"ratio": "row"}, ValueError, "ratio must be one of 'token', 'sequence', 'item', got 'row'"),
    ({"ratio": "item", "objective": "cispo"}, ValueError, "ratio must be 'token' with objective='cispo', got 'item'"),
    ({"ratio": "sequence", "objective": "sapo"}, ValueError, "ratio must be 'token' with objective='sapo'"),
    ({"clip": 0.2}, ValueError, "clip must be two numbers, got 0.2"),
    ({"clip": (0.2, -1)}, ValueError, "clip[1] must be at least 0, got -1"),
    ({"clip": ("a", 1)}, TypeError, "clip[0] must be a number, got 'a'"),
    ({"clip": (0.0, 1.0), "objective": "sapo"}, ValueError, "clip[0] must be positive, got 0.0"),
    (
        {"clip": (0.1, 0.1), "objective": "gbpo"},
        ValueError,
        "clip must be (0.2, 0.2), its default, with objective='gbpo'",
    ),
    ({"dual_clip": 1.0}, ValueError, "dual_clip must be above 1, got 1.0"),
    ({"dual_clip": 3.0, "objective": "ecpo"}, ValueError, "dual_clip must be None with objective='ecpo', got 3.0"),
    ({"delta": 0.2}, ValueError, "delta must be 0.1, its default, with objective='clip', got 0.2"),
    ({"delta": 0.0, "objective": "ecpo"}, ValueError, "delta must be positive, got 0.0"),
    ({"kl": "k4"}, ValueError, "kl must be one of 'k1', 'k2', 'k3', got 'k4'"),
    ({"experts": "all"}, ValueError, "experts must be one of 'group', 'nll', got 'all'"),
    ({"protect": "winner"}, ValueError, "protect must be one of 'none', 'positives', got 'winner'"),
    ({"aggregate": "row"}, ValueError, "aggregate must be one of 'sequence', 'token', 'constant', got 'row'"),
    ({"max_length": 3}, ValueError, "max_length must be None with aggregate='sequence', got 3"),
    ({"max_length": 0, "aggregate": "constant"}, ValueError, "max_length must be positive, got 0"),
    ({"count": "dead"}, ValueError, "count must be one of 'active', 'all', got 'dead'"),
    ({"level_weights": [1.0]}, ValueError, "level_weights must have shape (2,), got (1,)"),
    ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
    ({"normalizer": (1, 2), "reduction": "sum"}, ValueError, "normalizer must be None with reduction='sum'"),
    ({"normalizer": 3}, ValueError, "normalizer must be (rows, tokens), got 3"),
    ({"normalizer": (0, 3)}, ValueError, "normalizer[0] must be positive, got 0"),
]


@pytest.mark.parametrize(("changed", "error", "message"), MESSAGES)
def test_refuses(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rx.policy_loss(**({"logps": LOGPS, "sessions": SESSIONS, "advantages": A} | changed))
