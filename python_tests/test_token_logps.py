"""token_logps against float64, and at the edges of what logits, targets and supports can be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.agreement import assert_scores_close
from support.beam_cases import generator_of
from support.logps_cases import DTYPES, Case, assert_result_close, cases, run, truth
from torch import Tensor
from torch.nn import functional as F

import raddpo_ext as rx
from raddpo_ext import reference


def in_torch(logits: Tensor, targets: Tensor) -> Tensor:
    return F.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]


def vocab_case(*shape: int, columns: int, seed: int = 0, **options: Any) -> Case:
    """Targets anywhere in the vocabulary."""
    return Case(torch.randint(0, columns, shape, generator=generator_of(seed)), columns, options, seed)


@settings(max_examples=60)
@given(cases(), st.sampled_from(DTYPES), st.booleans(), st.sampled_from([0.0, 0.0, 0.5, 1.0]))
def test_equals_reference(isa: str, case: Case, dtype: torch.dtype, inplace: bool, hidden: float) -> None:
    """Any shape, support and option; values and gradients, each gradient row of an upstream 0 exactly 0."""
    logits, upstream = case.logits(dtype, hidden), case.upstream(dtype)
    got = run(rx.token_logps, (logits,), case, upstream, inplace_backward=inplace)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got[0].shape == case.targets.shape
    assert (got[0] <= 0).all()
    expected = truth(reference.token_logps, (logits,), case, upstream)
    if hidden:  # a target that is itself -inf: only in the gradient of its own row
        lost = got[0] == -math.inf
        assert got[1][0].isfinite().all()
        got[1][0][lost], expected[1][0][lost] = 0, 0
    assert_result_close(got, expected, "token_logps")
    none = (upstream == 0) | (case.targets == case.options["ignore_index"])
    assert (got[1][0][none] == 0).all()
    assert (got[0][case.targets == case.options["ignore_index"]] == 0).all()
    if case.options["logit_softcap"] is None:
        masked = (logits == -math.inf).scatter(-1, case.targets.clamp(0, case.columns - 1)[..., None], False)
        assert (got[1][0][masked] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_many_rows(isa: str, threads: int, dtype: torch.dtype, inplace: bool) -> None:
    """Enough for every thread, and columns that fill no vector."""
    case = vocab_case(151, columns=1027)
    logits, upstream = case.logits(dtype), case.upstream(dtype)
    got = run(rx.token_logps, (logits,), case, upstream, inplace_backward=inplace)
    assert_result_close(got, truth(in_torch, (logits,), case, upstream), "token_logps")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (4.0, 20.0), (30.0, 0.0), (1e4, 0.0), (1.0, -60.0)])
def test_no_worse_than_torch(isa: str, dtype: torch.dtype, scale: float, shift: float) -> None:
    """The largest and the mean error of log_softmax().gather() in the same type.

    The slack is a unit in the last place of float32: of the log-prob, and for the gradient of the log-sum-exp, which is
    saved in float32 where torch saves the log-probs.
    """
    generator = generator_of(3)
    logits = (scale * torch.randn(40, 1500, generator=generator) + shift).to(dtype)
    targets = torch.where(torch.arange(40) < 20, logits.argmax(-1), torch.randint(0, 1500, (40,), generator=generator))
    case = Case(targets, 1500, {}, 0)
    upstream = torch.ones(40, dtype=dtype)

    values, (gradient,) = truth(in_torch, (logits,), case, upstream)
    ours, theirs = (run(op, (logits,), case, upstream) for op in (rx.token_logps, in_torch))
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for mine, other, right in ((ours[0], theirs[0], values), (ours[1][0], theirs[1][0], gradient)):
        error, torchs = (mine.double() - right).abs(), (other.double() - right).abs()
        size = max(1.0, float(logits.abs().max())) if right is gradient else max(1.0, float(-values.min()))
        assert error.max() <= 1.1 * torchs.max() + 2 * eps * size
        assert error.mean() <= 1.1 * torchs.mean() + eps * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_logits(isa: str, dtype: torch.dtype, softcap: float | None) -> None:
    """Gaps that overflow an exponential, and numbers near the largest, leave nothing NaN."""
    most = torch.finfo(dtype).max
    rows = [[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [1e4, 1e4, 1e4], [1e30, -1e30, 1e30], [most, -most, 0], [-most] * 3]
    logits = torch.tensor(rows, dtype=torch.float64).clamp(-most, most).to(dtype)
    for target in range(3):
        case = Case(torch.full((len(rows),), target), 3, {"logit_softcap": softcap}, 0)
        got = run(rx.token_logps, (logits,), case, torch.ones(len(rows)))
        expected = truth(reference.token_logps, (logits,), case, torch.ones(len(rows)))
        assert not got[0].isnan().any()
        assert got[1][0].isfinite().all()
        near = torch.tensor([0, 1, 2] if softcap is None else [*range(6)])
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(got[0].double()[near], expected[0][near], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1][0].double()[near], expected[1][0][near], rtol=1e-2, atol=1e4 * eps)


def test_masked_columns_and_rows(isa: str) -> None:
    """-inf logits: exact zeros; a row of nothing else, and a target outside its support, have no gradient at all."""
    logits = torch.randn(4, 2100)
    logits[:, 1000:2050] = -math.inf
    logits[2] = -math.inf
    vocab = rx.SIDVocab([5, 7])
    got = run(rx.token_logps, (logits,), Case(torch.tensor([3, 2099, 1, 5]), 2100, {}, 0), torch.ones(4))
    assert got[0].isfinite().tolist() == [True, True, False, True]
    assert got[0][2] == -math.inf
    assert (got[1][0][:, 1000:2050] == 0).all()
    assert (got[1][0][2] == 0).all()
    options = {"normalize": "level", "vocab": vocab, "levels": torch.tensor([0, 1, 1, 0])}
    got = run(rx.token_logps, (logits,), Case(torch.tensor([5, 2, 6, 4]), 2100, options, 0), torch.ones(4))
    assert got[0].isfinite().tolist() == [False, False, False, True]
    assert (got[0][:3] == -math.inf).all()
    assert (got[1][0][:3] == 0).all()
    assert (got[1][0][3, 5:] == 0).all()
    assert (got[1][0][3, :5] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_without_gradient_are_not_read(isa: str, dtype: torch.dtype, inplace: bool) -> None:
    """Ignored rows, and those whose upstream gradient is 0, are exactly 0 though their logits are NaN."""
    case = vocab_case(6, columns=70)
    case.targets[1] = -100
    logits = case.logits(dtype)
    logits[1], logits[4] = math.nan, math.nan
    upstream = torch.tensor([1.0, 1.0, 0.0, -2.0, 0.0, 1.0])
    logps, (gradient,) = run(rx.token_logps, (logits,), case, upstream, inplace_backward=inplace)
    assert logps[1] == 0
    assert logps.isnan().tolist() == [False, False, False, False, True, False]
    assert [bool((row == 0).all()) for row in gradient] == [False, True, True, False, True, False]
    assert gradient.isfinite().all()


def test_nan_is_not_hidden(isa: str) -> None:
    """A NaN or infinite logit in a row shows, in its log-prob and its gradient."""
    for bad in (math.nan, math.inf):
        logits = torch.zeros(1, 1500)
        logits[0, 1400] = bad
        logps, (gradient,) = run(rx.token_logps, (logits,), Case(torch.tensor([2]), 1500, {}, 0), torch.ones(1))
        assert logps.isnan().all()
        assert gradient.isnan().any()


def test_one_column(isa: str) -> None:
    logps, (gradient,) = run(rx.token_logps, (torch.randn(3, 1),), vocab_case(3, columns=1), torch.ones(3))
    assert logps.tolist() == [0.0] * 3
    assert (gradient.abs() < 1e-6).all()


def test_level_and_trie_supports_agree_with_sliced_logits() -> None:
    """Without the reference: the softmax over the support's own columns."""
    vocab = rx.SIDVocab([4, 5], offset=2, eos=1)
    logits = torch.randn(3, 3, 12)
    targets = torch.tensor([[2, 6, 1], [5, 10, 1], [3, 1, 1]])
    got = rx.token_logps(logits, targets, vocab=vocab, normalize="level")
    for position, tokens in enumerate(([2, 3, 4, 5], [1, 6, 7, 8, 9, 10], [1])):
        own = logits[:, position, tokens].log_softmax(-1)
        expected = own[torch.arange(3), [tokens.index(target) for target in targets[:, position].tolist()]]
        assert_scores_close(got[:, position], expected, "token_logps")
    index = rx.TrieIndex.build([[0, 0], [0, 4], [3, 1]], vocab=vocab)
    targets = torch.tensor([[2, 6, 1], [5, 7, 1]])
    got = rx.token_logps(logits[:2], targets, index=index, nodes=index.nodes(targets), normalize="trie")
    first = logits[:2, 0][:, [2, 5]].log_softmax(-1).diagonal()
    assert_scores_close(got[:, 0], first, "token_logps")
    assert_scores_close(got[0, 1], logits[0, 1, [6, 10]].log_softmax(-1)[0], "token_logps")
    assert got[1, 1] == got[0, 2] == got[1, 2] == 0
