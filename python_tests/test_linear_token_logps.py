"""linear_token_logps: every path through its tiles against float64, its precision, and how much memory it holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.beam_cases import generator_of
from support.logps_cases import Case, Watch, assert_result_close, cases, run, tiles, truth
from support.matmul import products_by_onednn
from torch import Tensor
from torch.nn import functional as F

import raddpo_ext as rx
from raddpo_ext import reference

LOW = [torch.bfloat16, torch.float16]


def in_torch(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.log_softmax(F.linear(hidden, weight, bias), -1).gather(-1, targets[..., None])[..., 0]


def vocab_case(*shape: int, columns: int, seed: int = 0, **options: Any) -> Case:
    return Case(torch.randint(0, columns, shape, generator=generator_of(seed)), columns, options, seed)


@settings(max_examples=150)
@given(
    cases(),
    st.sampled_from([torch.float32, torch.float32, torch.float64]),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
    st.sampled_from(["none", "tiny", "exact", "short", "ample"]),
    st.tuples(st.sampled_from([1, 2, 100]), st.sampled_from([1, 3, 40, 1000]), st.booleans(), st.booleans()),
    st.booleans(),
)
def test_equals_reference(
    case: Case,
    dtype: torch.dtype,
    features: int,
    bias: bool,
    budget: str,
    sizes: tuple[int, int, bool, bool],
    onednn: bool,
) -> None:
    """Any support, budget, tiling and library; rows without a gradient left out or not, buffers reused or not."""
    inputs = case.head(features, dtype)[: 3 if bias else 2]
    exact = case.targets.numel() * case.columns * dtype.itemsize
    budgets = {"none": 0, "tiny": 40, "exact": exact, "short": max(0, exact - 1), "ample": 2**30}
    rows, columns, look, reuse = sizes
    with tiles(rows, columns, look, 0 if reuse else 1 << 25), products_by_onednn(onednn):
        got = run(rx.linear_token_logps, inputs, case, case.upstream(), logits_budget=budgets[budget])
    assert got[0].dtype == dtype
    assert got[0].shape == case.targets.shape
    expected = truth(reference.linear_token_logps, inputs, case, case.upstream())
    assert_result_close(got, expected, "linear_token_logps")
    none = (case.upstream() == 0) | (case.targets == case.options["ignore_index"]) | (got[0] == -math.inf)
    assert (got[1][0][none] == 0).all()
    assert (got[0][case.targets == case.options["ignore_index"]] == 0).all()


def test_all_tilings_agree(isa: str, threads: int) -> None:
    """Larger shapes, cut in rows, in columns and in both; columns enough for two threads."""
    case = vocab_case(12, columns=17_011)
    inputs = case.head(3)
    expected = truth(in_torch, inputs, case, case.upstream())
    for budget, sizes in (
        (0, (5, 30_000, False)),
        (0, (12, 7000, False)),
        (0, (5, 7000, True)),
        (2**30, (12, 30_000, True)),
    ):
        with tiles(*sizes):
            got = run(rx.linear_token_logps, inputs, case, case.upstream(), logits_budget=budget)
        assert_result_close(got, expected, "linear_token_logps")


@pytest.mark.parametrize("sizes", [(1, 1, True), (2, 3, False), (100, 100, False)])
@pytest.mark.parametrize("budget", [0, 2**30])
def test_masked_columns_and_rows(sizes: tuple[int, int, bool], budget: int) -> None:
    """A bias of -inf masks columns: exact zeros in the weight's gradient, and whole tiles of them leave nothing NaN."""
    case = vocab_case(4, columns=9)
    case.targets[:] = torch.tensor([7, 8, 6, 7])
    hidden, weight, bias = case.head(5)
    bias[:6] = -math.inf
    with tiles(*sizes):
        got = run(rx.linear_token_logps, (hidden, weight, bias), case, torch.ones(4), logits_budget=budget)
    assert_result_close(got, truth(in_torch, (hidden, weight, bias), case, torch.ones(4)), "linear_token_logps")
    assert (got[1][1][:6] == 0).all()
    assert (got[1][2][:6] == 0).all()
    bias[:] = -math.inf
    with tiles(*sizes):
        logps, gradients = run(rx.linear_token_logps, (hidden, weight, bias), case, torch.ones(4), logits_budget=budget)
    assert (logps == -math.inf).all()
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
def test_nothing_to_do(look: bool, budget: int, normalize: str) -> None:
    """No rows, none but ignored ones, none with a gradient: zeros of the right shapes."""
    vocab = rx.SIDVocab([4, 3])
    index = rx.TrieIndex.build([[0, 1], [3, 2]], vocab=vocab)
    for targets in (torch.zeros(0, 2).long(), torch.full((3, 2), -100), torch.tensor([[0, 5], [3, 6]])):
        nodes = index.nodes(targets) if len(targets) else targets.clone()
        options = {"vocab": vocab, "index": index, "nodes": nodes, "normalize": normalize}
        case = Case(targets, 9, options, 0)
        with tiles(1, 2, look):
            upstream = torch.zeros(targets.shape)
            logps, gradients = run(rx.linear_token_logps, case.head(5), case, upstream, logits_budget=budget)
        assert (logps[targets == -100] == 0).all()
        assert [gradient.shape for gradient in gradients] == [(*targets.shape, 5), (9, 5), (9,)]
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
def test_any_token_may_be_the_ignored_one(look: bool, normalize: str) -> None:
    """Also one of the support, whatever its number there, and the numbers of columns."""
    vocab = rx.SIDVocab([4, 3], token_ids=[[2, 3, 4, 5], [1, 6, 8]])
    index = rx.TrieIndex.build([[a, b] for a in range(4) for b in range(3)], vocab=vocab)
    targets = torch.tensor([[a, b] for a in (2, 3, 4, 5) for b in (1, 6, 8)])
    options = {"vocab": vocab, "index": index, "nodes": index.nodes(targets), "normalize": normalize}
    for ignore_index in range(-3, 9):
        case = Case(targets, 9, options | {"ignore_index": ignore_index}, 0)
        inputs, upstream = case.head(5)[:2], torch.ones(targets.shape)
        expected = truth(reference.linear_token_logps, inputs, case, upstream)
        with tiles(1, 2, look):
            assert_result_close(run(rx.linear_token_logps, inputs, case, upstream), expected, "linear_token_logps")


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("normalize", ["vocab", "level"])
def test_rows_left_out(budget: int, normalize: str) -> None:
    """Ignored rows are not multiplied, nor backward those without a gradient: what they hold, NaN, is nowhere seen."""
    vocab = rx.SIDVocab([4, 3])
    targets = torch.tensor([[0, 5], [3, -100], [-100, 4], [2, 6]]).repeat(5, 1)
    upstream = torch.randn(targets.shape)
    upstream[3], upstream[7] = 0, 0
    case = Case(targets, 9, {"vocab": vocab, "normalize": normalize}, 0)
    hidden, weight, bias = case.head(5)
    expected = truth(reference.linear_token_logps, (hidden, weight, bias), case, upstream)
    hidden[targets == -100], hidden[3] = math.nan, math.nan
    with tiles(3, 3, True):
        got = run(rx.linear_token_logps, (hidden, weight, bias), case, upstream, logits_budget=budget)
    assert got[0].isnan().nonzero().tolist() == [[3, 0], [3, 1]]
    expected[0][3] = got[0][3] = 0
    assert_result_close(got, expected, "linear_token_logps")


def test_other_layouts() -> None:
    """Strided and transposed hidden states, weights, targets and upstream gradients."""
    hidden = torch.randn(6, 5, 4, requires_grad=True)
    weight = torch.randn(4, 11, requires_grad=True)
    targets, upstream = torch.randint(0, 11, (3, 6)).T, torch.randn(3, 6).T
    got, expected = (
        torch.autograd.grad((op(hidden[:, ::2], weight.T, targets) * upstream).sum(), (hidden, weight))
        for op in (rx.linear_token_logps, in_torch)
    )
    for mine, right in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, right)
    one = rx.linear_token_logps(hidden[0, 0], weight.T, targets[0, 0])
    torch.testing.assert_close(one, in_torch(hidden[0, 0], weight.T, targets[0, 0]))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("budget", [0, 2**30])
def test_no_worse_than_torch(dtype: torch.dtype, bias: bool, budget: int) -> None:
    """The error of F.linear, log_softmax and gather in the same type. Torch rounds the product of each tile to that."""
    case = vocab_case(60, columns=700)
    inputs = case.head(64, dtype)[: 3 if bias else 2]
    expected = truth(in_torch, inputs, case, case.upstream())
    with tiles(16, 200, False):
        ours = run(rx.linear_token_logps, inputs, case, case.upstream(), logits_budget=budget)
    theirs = run(in_torch, inputs, case, case.upstream())
    for mine, other, right in zip(
        (ours[0], *ours[1]), (theirs[0], *theirs[1]), (expected[0], *expected[1]), strict=True
    ):
        error, torchs = (mine.double() - right).abs(), (other.double() - right).abs()
        assert error.max() <= (1.2 if budget else 2.5) * torchs.max()
        assert error.mean() <= 1.05 * torchs.mean()


@pytest.mark.parametrize("dtype", LOW)
def test_row_tiles_add_up_in_float32(dtype: torch.dtype) -> None:
    """The weight's gradient over many row tiles is nearer the truth than sums in the weight's type are."""
    case = vocab_case(1024, columns=20)
    hidden, weight, _ = case.head(16, dtype)
    upstream = torch.ones(1024)
    expected = truth(in_torch, (hidden, weight), case, upstream)[1][1]
    with tiles(16, 20, False):
        got = run(rx.linear_token_logps, (hidden, weight), case, upstream, logits_budget=0)[1][1]
    naive = torch.zeros_like(weight)
    for begin in range(0, 1024, 16):
        part = Case(case.targets[begin : begin + 16], 20, {}, 0)
        naive += run(rx.linear_token_logps, (hidden[begin : begin + 16], weight), part, upstream[:16])[1][1]
    assert got.dtype == dtype
    error, naives = (got.double() - expected).abs().mean(), (naive.double() - expected).abs().mean()
    assert error < naives / 3
    assert error < torch.finfo(dtype).eps * expected.abs().mean()


@pytest.mark.parametrize("frozen", ["", "weight", "hidden"])
@pytest.mark.parametrize("bias", [False, True])
def test_number_of_products(frozen: str, bias: bool) -> None:
    """Three within the budget, four beyond it; none for a gradient that nobody wants."""
    case = vocab_case(10, columns=50)
    for budget, forward in ((2**30, 1), (0, 2)):
        hidden, weight, offset = case.head(8)
        hidden.requires_grad_(frozen != "hidden")
        weight.requires_grad_(frozen != "weight")
        with Watch() as watch:
            logps = rx.linear_token_logps(
                hidden, weight, case.targets, bias=offset.requires_grad_() if bias else None, logits_budget=budget
            )
            assert watch.products == 1
            logps.sum().backward()
        assert watch.products == forward + (2 if not frozen else 1)
        assert (weight.grad is None) == (frozen == "weight")
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (offset.grad is not None) == bias


@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
def test_no_grad(normalize: str) -> None:
    """One product a part, and nothing to go backward through."""
    vocab = rx.SIDVocab([40, 30])
    index = rx.TrieIndex.build([[a, b] for a in range(0, 40, 3) for b in range(0, 30, 2)], vocab=vocab)
    targets = torch.tensor([[3, 42], [6, 40]])
    options = {"vocab": vocab, "index": index, "nodes": index.nodes(targets), "normalize": normalize}
    hidden, weight, _ = Case(targets, 500, {}, 0).head(8)
    with Watch() as watch, torch.no_grad():
        logps = rx.linear_token_logps(hidden, weight.requires_grad_(), targets, **options)
    assert not logps.requires_grad
    assert watch.products == (1 if normalize == "vocab" else 2)


def test_level_multiplies_its_own_rows_only() -> None:
    """The memory held is that of the levels, not of the vocabulary, and the trie's that of the children."""
    vocab = rx.SIDVocab([40, 30], offset=5)
    index = rx.TrieIndex.build([[a, b] for a in range(0, 40, 3) for b in range(0, 30, 2)], vocab=vocab)
    targets = torch.tensor([[8, 47], [11, 45]]).repeat(50, 1)
    hidden, weight, _ = Case(targets, 100_000, {}, 0).head(4)
    for normalize, most in (("level", 50 * 70), ("trie", 50 * (14 + 15))):
        options = {"vocab": vocab, "index": index, "nodes": index.nodes(targets), "normalize": normalize}
        with Watch() as watch:
            rx.linear_token_logps(hidden.requires_grad_(), weight, targets, **options)
        assert 4 * most < watch.most_bytes < 3 * 4 * most + 20_000


@pytest.mark.parametrize("normalize", ["vocab", "level"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(16, 8192), (512, 100), (64, 1024)])
def test_memory_stays_within_the_budget(normalize: str, dtype: torch.dtype, tile: tuple[int, int]) -> None:
    """Beyond the gradients, forward and backward hold the budget's bytes of logits, or one tile of the least size."""
    vocab = rx.SIDVocab([5000, 3000])
    case = Case(torch.randint(0, 3000, (256, 2)) + torch.tensor([0, 5000]), 8192, {}, 0)
    hidden, weight, _ = case.head(4, dtype)
    hidden.requires_grad_()
    logits = dtype.itemsize * 512 * 8192
    small = 5 * (weight.numel() + hidden.numel()) * 4
    for budget in (0, logits // 20, logits // 3, 256 * 5000 * dtype.itemsize):
        with tiles(*tile, False), Watch() as watch:
            logps = rx.linear_token_logps(
                hidden,
                weight.requires_grad_(),
                case.targets,
                vocab=vocab,
                normalize=normalize,
                logits_budget=budget,
            )
            most_forward = watch.most_bytes
            logps.sum().backward()
        room = max(budget, tile[0] * tile[1] * dtype.itemsize)
        assert watch.most_bytes <= room + small
        assert most_forward + small >= min(budget, logits) / 2
    with Watch() as watch, torch.no_grad():  # nothing is kept: one part after the other
        rx.linear_token_logps(hidden, weight, case.targets, vocab=vocab, normalize=normalize)
    assert watch.most_bytes <= (256 * 5000 * dtype.itemsize if normalize == "level" else logits) + small
