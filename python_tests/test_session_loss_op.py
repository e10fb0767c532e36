"""The session losses as operators: autograd's rules, strides, empty batches, determinism, opcheck, torch.compile."""

from __future__ import annotations

import itertools
import shutil
from itertools import product
from typing import Any

import pytest
import torch
from support.operator_calls import OPERATORS, Recorder
from support.session_cases import CORES, FIELDS, Case, assert_close, build, name_of, on, run
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext.losses import session_loss

DTYPE = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
EVERYTHING: dict[str, Any] = {
    "ref_logps": True,
    "pair_weights": True,
    "level_weights": True,
    "label_smoothing": 0.1,
    "gamma": 0.5,
    "normalizer": (2, torch.tensor(9)),
}
OPTIONS = [{}, EVERYTHING | {"positives": "each"}, EVERYTHING | {"positives": "pooled", "detach": True}]


def small(dtype: torch.dtype = torch.float64) -> Case:
    return build([(2, 4), (0, 2), (1, 3)], 3, seed=2, dtype=dtype)


def scores_of(case: Case) -> Tensor:
    return case.logps[:, 0].nan_to_num(0.0)


def test_only_the_losses_have_a_gradient_and_only_for_the_log_probs() -> None:
    case = small()
    constants = [case.ref_logps, case.pair_weights, case.level_weights]
    for tensor in (case.logps, *constants):
        tensor.requires_grad_()
    result = rx.rad_dpo_loss(case.logps, case.sessions, **case.arguments(EVERYTHING))
    assert [getattr(result, name).requires_grad for name in FIELDS] == [True] * 3 + [False] * 3
    result.loss.backward()
    assert case.logps.grad is not None
    scores = scores_of(case.to(torch.float64)).detach().requires_grad_()
    rx.multilabel_contrastive_loss(scores, case.sessions, pair_weights=case.pair_weights).backward()
    assert scores.grad is not None
    assert [tensor.grad for tensor in constants] == [None] * 3


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_add_up(options: dict[str, Any]) -> None:
    """Of the three losses, together and one by one; ``loss`` is the sum of the two others."""
    case, options = small(), options | {"sft_weight": 0.3}
    loss, preference, sft = (
        run(rx.rad_dpo_loss, case, options, parts)[1] for parts in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    )
    assert_close(loss, preference + 0.3 * sft)
    assert_close(run(rx.rad_dpo_loss, case, options, (2, -1, 0.5))[1], 2 * loss - preference + 0.5 * sft)
    logps = case.logps.clone().requires_grad_()
    for name, expected in [("loss", loss), ("preference", preference), ("sft", sft)]:  # the others' unused
        value = getattr(rx.rad_dpo_loss(logps, case.sessions, **case.arguments(options)), name)
        assert_close(torch.autograd.grad(value, logps)[0], expected)


def test_without_gradient() -> None:
    case = small()
    expected = rx.rad_dpo_loss(case.logps, case.sessions)
    assert not any(part.requires_grad for part in expected)
    logps = case.logps.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = rx.rad_dpo_loss(logps, case.sessions)
            loss = rx.multilabel_contrastive_loss(scores_of(case).requires_grad_(), case.sessions)
        assert not any(part.requires_grad for part in (*result, loss))
        assert all(map(torch.equal, result, expected))


def test_a_second_backward() -> None:
    """Needs ``retain_graph``, and then gives the same again."""
    case = small()
    logps = case.logps.clone().requires_grad_()
    loss = rx.rad_dpo_loss(logps, case.sessions).loss
    first, second = (torch.autograd.grad(3 * loss, logps, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_no_gradient_of_the_gradient() -> None:
    """TLGD has none that would mean anything: an error, not a wrong number."""
    case = small()
    logps = case.logps.clone().requires_grad_()
    loss = rx.rad_dpo_loss(logps, case.sessions).loss

    def twice() -> None:
        (gradient,) = torch.autograd.grad(loss, logps, create_graph=True)
        gradient.sum().backward()

    with pytest.raises(RuntimeError, match=r"second derivative|twice|not implemented"):
        twice()


@DTYPE
def test_the_dtype_is_the_log_probs(dtype: torch.dtype) -> None:
    """Weights of any float type are cast."""
    case = small(dtype)
    other = {torch.float64: torch.float32, torch.float32: torch.float64}[dtype]
    weights = case.pair_weights.to(torch.float16)
    expected = rx.rad_dpo_loss(case.logps, case.sessions, pair_weights=weights.to(dtype))
    for kind in (torch.float16, torch.bfloat16, other):
        given = weights.to(kind)
        same = given.to(dtype) == weights.to(dtype)
        result = rx.rad_dpo_loss(case.logps, case.sessions, pair_weights=given)
        assert {getattr(result, name).dtype for name in FIELDS} == {dtype}
        if same.all():
            assert all(map(torch.equal, result, expected))
    loss = rx.multilabel_contrastive_loss(scores_of(case), case.sessions, pair_weights=weights)
    assert loss.dtype == dtype


def test_level_weights_and_normalizers_of_any_kind() -> None:
    case = small()
    expected = rx.rad_dpo_loss(case.logps, case.sessions, level_weights=[0.5, 2.0, 1.0], normalizer=(2, 9.5))
    for levels in [(0.5, 2, 1), torch.tensor([0.5, 2, 1]), torch.tensor([0.5, 2, 1], dtype=torch.float64)]:
        for counts in [[2.0, 9.5], (torch.tensor(2), torch.tensor(9.5))]:
            result = rx.rad_dpo_loss(case.logps, case.sessions, level_weights=levels, normalizer=counts)
            assert all(map(torch.equal, result, expected))
    scores = scores_of(case)
    losses = [rx.multilabel_contrastive_loss(scores, case.sessions, normalizer=n) for n in (3, 3.0, torch.tensor(3))]
    total = rx.multilabel_contrastive_loss(scores, case.sessions, reduction="sum")
    assert {loss.item() for loss in losses} == {(total / 3).item()}


def scattered(tensor: Tensor) -> Tensor:
    """The same values at strides of 2, the last dimension's outermost."""
    spread = torch.zeros([2 * size for size in tensor.shape[::-1]], dtype=tensor.dtype)
    view = spread[tuple(slice(None, None, 2) for _ in tensor.shape)].permute(*range(tensor.dim())[::-1])
    view.copy_(tensor)
    return view


@DTYPE
@pytest.mark.parametrize("options", OPTIONS)
def test_strided_inputs(dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = small(dtype)
    parts = (case.sessions.tokens, case.sessions.lengths, case.sessions.offsets, case.sessions.num_positives)
    strided = Case(
        rx.SessionBatch(*map(scattered, parts)),
        *map(scattered, (case.logps, case.ref_logps, case.pair_weights, case.detach, case.level_weights)),
    )
    assert not strided.logps.is_contiguous()
    logps = strided.logps.detach().requires_grad_()  # a clone would be dense
    result = rx.rad_dpo_loss(logps, strided.sessions, **strided.arguments(options))
    expected, expected_gradient = run(rx.rad_dpo_loss, case, options)
    assert all(map(torch.equal, result, expected))
    assert torch.equal(torch.autograd.grad(result.loss, logps)[0], expected_gradient)
    # A gradient that is one number in memory, and a vector's that is strided.
    terms, logps = [], case.logps.clone().requires_grad_()
    each = rx.rad_dpo_loss(logps, case.sessions, **case.arguments(options | {"reduction": "none", "normalizer": None}))
    for upstream in (torch.full((1,), 0.5, dtype=dtype).expand(3), scattered(torch.full((3,), 0.5, dtype=dtype))):
        terms.append(torch.autograd.grad(each.loss, logps, upstream, retain_graph=True)[0])
    assert torch.equal(*terms)


@DTYPE
@pytest.mark.parametrize("counts", [[], [(0, 0)] * 3], ids=["no sessions", "empty sessions"])
@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batches(dtype: torch.dtype, counts: list[tuple[int, int]], levels: int, reduction: str) -> None:
    case = build(counts, levels, seed=0, dtype=dtype)
    shape = (len(counts),) if reduction == "none" else ()
    for core, given in product(CORES, [None, True]):
        extra = {"ref_logps": given, "pair_weights": given, "level_weights": given, "reduction": reduction}
        result, gradient = run(rx.rad_dpo_loss, case, core | extra, (1, 1, 1))
        assert [getattr(result, name).shape for name in FIELDS] == [shape] * 3 + [(0,), (0,), ()]
        assert all((getattr(result, name) == 0).all() for name in FIELDS)
        assert gradient.shape == (0, levels)
    scores = torch.zeros(0, dtype=dtype, requires_grad=True)
    loss = rx.multilabel_contrastive_loss(scores, case.sessions, reduction=reduction)
    assert loss.shape == shape
    assert (loss == 0).all()
    assert torch.autograd.grad(loss.sum(), scores)[0].shape == (0,)


def test_candidates_without_tokens() -> None:
    """``L = 0``: every length is 0."""
    case = build([(2, 3), (1, 1)], 0, seed=0)
    result, gradient = run(rx.rad_dpo_loss, case, {}, (1, 1, 1))
    assert all((getattr(result, name) == 0).all() for name in FIELDS)
    assert gradient.shape == (7, 0)
    assert result.margins.shape == (7,)


@DTYPE
@pytest.mark.parametrize("core", CORES[::6], ids=name_of)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype, core: dict[str, Any]) -> None:
    """And inputs are left as they were."""
    few = build([(1, 3), (3, 17), (2, 0), (4, 9), (0, 5), (2, 33)], 4, seed=5, dtype=dtype)
    case = few.take(few.plan * 200)
    case.logps.mul_(torch.rand(case.logps.shape, generator=torch.Generator().manual_seed(0), dtype=dtype))
    before = [case.logps.clone(), case.pair_weights.clone(), case.ref_logps.clone()]
    arguments = core | EVERYTHING | {"normalizer": None}
    for reduction in ("mean", "none"):
        found = []
        for threads in (1, 2, 3, 4, 1):
            with on((rx._C.isa(), threads)):
                result, gradient = run(rx.rad_dpo_loss, case, arguments | {"reduction": reduction}, (1, 0.5, 0))
            found.append([part.detach().numpy().tobytes() for part in (*result, gradient)])
        assert all(bits == found[0] for bits in found)
    for now, then in zip((case.logps, case.pair_weights, case.ref_logps), before, strict=True):
        assert now.numpy().tobytes() == then.numpy().tobytes()


@pytest.mark.parametrize(
    ("name", "named", "results"),
    [
        ("session_loss", session_loss.Arguments, session_loss.Results._fields),
        ("session_loss_backward", session_loss.BackwardArguments, ("",)),
    ],
)
def test_arguments_are_named_as_in_the_schema(name: str, named: Any, results: tuple[str, ...]) -> None:
    schema = getattr(torch.ops.raddpo, name).default._schema
    assert tuple(argument.name for argument in schema.arguments) == named._fields
    assert tuple(result.name for result in schema.returns) == results


@pytest.mark.parametrize("options", [*OPTIONS, None])
def test_opcheck(options: dict[str, Any] | None) -> None:
    """With the very arguments that the public functions pass; None is the multi-label loss."""
    case = small()
    logps = case.logps.nan_to_num(0.0).requires_grad_()  # opcheck takes NaN for a difference
    case.ref_logps.nan_to_num_(0.0)
    with Recorder() as recorder:
        if options is None:
            rx.multilabel_contrastive_loss(logps[:, 0], case.sessions).backward()
        else:
            rx.rad_dpo_loss(logps, case.sessions, **case.arguments(options)).loss.backward()
    assert set(recorder.calls) == {name for name in OPERATORS if name.startswith("raddpo::session_loss")}
    for func, args in itertools.chain.from_iterable(recorder.calls.values()):
        args[0].requires_grad_(func._opname == "session_loss")
        torch.library.opcheck(func, args)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "options"), [*(("aot_eager", options) for options in OPTIONS), ("inductor", OPTIONS[1])]
)
def test_compiles_to_one_graph(backend: str, options: dict[str, Any]) -> None:
    """Forward and backward, with what a model does around it; other sizes too."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler for inductor")
    cases = [small(torch.float32)] * 2
    if backend == "aot_eager":
        cases.append(build([(1, 2), (2, 3)], 3, seed=4, dtype=torch.float32))

    def losses(logits: Tensor, case: Case, sessions: rx.SessionBatch) -> tuple[Tensor, Tensor, Tensor]:
        result = rx.rad_dpo_loss(logits * 2 - 1, sessions, **case.arguments(options))
        contrast = rx.multilabel_contrastive_loss(logits[:, 0] * 2, sessions, temperature=0.5)
        return result.loss + contrast * 0.5, result.margins + 1, result.accuracy

    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    for case in cases:
        values = case.logps.nan_to_num(0.0)
        found = []
        for function in (compiled, losses):
            logits = values.clone().requires_grad_()
            loss, margins, accuracy = function(logits, case, case.sessions)
            loss.backward()
            found.append((loss, margins, accuracy, logits.grad))
        for got, expected in zip(*found, strict=True):
            assert_close(got, expected)
