"""linear_token_logps with rows: several targets a row of the hidden states, against float64 and a row a target."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.beam_cases import generator_of
from support.logps_cases import Case, Watch, assert_result_close, cases, run, tiles, truth
from support.matmul import products_by_onednn
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference


def shared(case: Case, distinct: int, features: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    """Hidden states of ``distinct`` rows, weight and bias; and a row for each target."""
    hidden, weight, bias = Case(torch.empty(distinct), case.columns, {}, case.seed).head(features, dtype)
    generator = generator_of(case.seed)
    return (hidden, weight, bias), torch.randint(0, distinct, case.targets.shape, generator=generator)


def run_rows(inputs: tuple[Tensor, ...], case: Case, rows: Tensor, **options):
    return run(rx.linear_token_logps, inputs, case, case.upstream(), rows=rows, **options)


@settings(max_examples=120)
@given(
    cases(),
    st.sampled_from([1, 2, 5, 40]),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
    st.sampled_from([0, 40, 2**30]),
    st.tuples(st.sampled_from([1, 2, 100]), st.sampled_from([1, 40, 1000]), st.booleans(), st.booleans()),
    st.booleans(),
)
def test_equals_reference(case, distinct, dtype, bias, budget, sizes, onednn):
    """Any support, number of rows, budget, tiling and library; rows that no target has among them."""
    inputs, rows = shared(case, distinct, 3, dtype)
    inputs = inputs[: 3 if bias else 2]
    tile_rows, tile_columns, look, reuse = sizes
    with tiles(tile_rows, tile_columns, look, 0 if reuse else 1 << 25), products_by_onednn(onednn):
        got = run_rows(inputs, case, rows, logits_budget=budget)
    assert got[0].dtype == dtype
    expected = truth(partial(reference.linear_token_logps, rows=rows), inputs, case, case.upstream())
    assert_result_close(got, expected, "linear_token_logps")
    assert (got[0][case.targets == case.options["ignore_index"]] == 0).all()
    unused = torch.ones(distinct, dtype=torch.bool).index_fill_(0, rows.flatten(), False)
    assert (got[1][0][unused] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_a_row_a_target(dtype):
    case = Case(torch.randint(0, 3000, (12, 4), generator=generator_of(0)), 3000, {"ignore_index": -100}, 0)
    inputs, rows = shared(case, 7, 32, dtype)
    expected = truth(partial(reference.linear_token_logps, rows=rows), inputs, case, case.upstream())
    replicated = run(rx.linear_token_logps, (inputs[0][rows], *inputs[1:]), case, case.upstream())
    got = run_rows(inputs, case, rows)

    def error(value: Tensor, truth: Tensor) -> float:
        return float((value.double() - truth).norm() / truth.norm())

    assert error(got[0], expected[0]) <= 1.1 * error(replicated[0], expected[0])
    summed = torch.zeros_like(expected[1][0]).index_put_((rows,), replicated[1][0].double(), accumulate=True)
    assert error(got[1][0], expected[1][0]) <= 2 * error(summed, expected[1][0])
    for mine, other, exact in zip(got[1][1:], replicated[1][1:], expected[1][1:], strict=True):
        assert error(mine, exact) <= 1.5 * error(other, exact)


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_certain_token_has_log_prob_0(dtype, budget):
    """Large logits, one far above the others: their rounding must not show in the difference."""
    generator = generator_of(0)
    weight = torch.randn(50, 64, generator=generator).to(dtype)
    targets = torch.arange(50).repeat(2)
    rows = targets.clone()
    logps = rx.linear_token_logps(20 * weight, weight, targets, rows=rows, logits_budget=budget)
    assert (logps <= 0).all()
    assert logps.abs().max() <= (1e-3 if budget == 0 else 0)


def test_masked_columns():
    """A bias of -inf: its targets have -inf and no gradient, and nothing is NaN."""
    targets = torch.tensor([[0, 3], [1, 2]])
    rows = torch.tensor([[0, 0], [0, 1]])
    case = Case(targets, 4, {}, 0)
    hidden, weight, bias = shared(case, 2, 3, torch.float32)[0]
    for masked in ([0, 1], [0, 1, 2, 3]):
        bias[masked] = -math.inf
        logps, gradients = run(rx.linear_token_logps, (hidden, weight, bias), case, torch.ones(2, 2), rows=rows)
        assert (logps == -math.inf).tolist() == [[0 in masked, 3 in masked], [1 in masked, 2 in masked]]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (gradients[1][masked] == 0).all()


def test_the_weight_s_gradient_is_added_in_place():
    case = Case(torch.tensor([1, 2, 2]), 6, {}, 0)
    (hidden, weight, _), rows = shared(case, 2, 3, torch.float32)
    expected = run_rows((hidden, weight), case, rows)[1][1]
    weight = weight.requires_grad_()
    weight.grad = torch.ones_like(weight)
    kept = weight.grad
    for step in (1, 2):
        logps = rx.linear_token_logps(hidden, weight, case.targets, rows=rows, accumulate_grad=True)
        logps.backward(case.upstream())
        assert weight.grad is kept
        torch.testing.assert_close(kept, 1 + step * expected)


def test_a_row_is_multiplied_once():
    """The only block of logits has a row a state, not a row a target."""
    case = Case(torch.randint(0, 500, (64,), generator=generator_of(1)), 500, {}, 0)
    (hidden, weight, _), rows = shared(case, 4, 8, torch.float32)
    with Watch() as watch:
        rx.linear_token_logps(hidden.requires_grad_(), weight, case.targets, rows=rows).sum().backward()
    assert watch.most_bytes < (4 + 4 * 8) * 500 * 4  # logits, the weight's gradient, and its rows at the targets


def test_backward_twice_is_refused():
    case = Case(torch.tensor([1, 2]), 6, {}, 0)
    (hidden, weight, _), rows = shared(case, 2, 3, torch.float32)
    logps = rx.linear_token_logps(hidden.requires_grad_(), weight, case.targets, rows=rows)
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwrote the logits"):
        logps.sum().backward()


@pytest.mark.parametrize("normalize", ["vocab", "level"])
def test_compiles(normalize):
    vocab = rx.SIDVocab([3, 3])
    targets, rows = torch.tensor([[0, 4], [0, 5]]), torch.tensor([[0, 1], [0, 2]])
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        return rx.linear_token_logps(hidden, weight, targets, rows=rows, normalize=normalize, vocab=vocab)

    expected = call(hidden, weight)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(hidden, weight)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(logps.sum(), (hidden, weight)) for logps in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.tensor([0, 2])}, ValueError, r"rows hold 2, outside \[0, 2\), the rows of hidden"),
        ({"rows": torch.tensor([-1, 0])}, ValueError, "rows hold -1"),
        ({"rows": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "rows must be an int64 tensor, got torch.int32"),
        ({"rows": torch.tensor([0])}, ValueError, r"rows must have the shape of targets, \(2,\)"),
        ({"rows": torch.tensor([0, 0], device="meta")}, ValueError, "got \\(2,\\) on meta"),
        ({"hidden": torch.zeros(1, 2, 4)}, ValueError, r"hidden must have shape \[U, H\] with rows"),
        ({"targets": torch.tensor([0, 9])}, ValueError, r"targets\[1\] = 9 is outside \[0, 5\)"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.tensor([0, 1]),
        "rows": torch.tensor([0, 1]),
    }
    with pytest.raises(error, match=message):
        rx.linear_token_logps(**(arguments | change))
