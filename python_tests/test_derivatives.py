"""Whatever autograd can be asked for beyond one derivative in reverse mode: an error that names the op, never 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from support.session_cases import build
from torch import Tensor

import raddpo_ext as rx

CASE = build([(2, 3), (1, 2)], 2, seed=1)
SESSIONS = CASE.sessions
INDEX = rx.TrieIndex.build([[0, 1], [1, 2], [3, 0]], vocab=rx.SIDVocab([4, 4], offset=2))
TARGETS = torch.tensor([[2, 7], [3, 8], [5, 6]])
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(3, 2, 12, dtype=torch.float64, generator=GENERATOR)
HIDDEN = torch.randn(3, 2, 5, dtype=torch.float64, generator=GENERATOR)
WEIGHT = torch.randn(12, 5, dtype=torch.float64, generator=GENERATOR)
BIAS = torch.randn(12, dtype=torch.float64, generator=GENERATOR)
LOGPS = -torch.rand(SESSIONS.tokens.shape, dtype=torch.float64, generator=GENERATOR)
STATES = torch.randn(*SESSIONS.tokens.shape, 5, dtype=torch.float64, generator=GENERATOR)
SMALL = rx.SessionBatch(SESSIONS.tokens % 20, SESSIONS.lengths, SESSIONS.offsets, SESSIONS.num_positives)
HEAD = torch.randn(20, 5, dtype=torch.float64, generator=GENERATOR)
ROWS = torch.arange(6).view(3, 2) % 4


def linear(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: rx.linear_token_logps(x, WEIGHT, TARGETS, **options)


def of_weight(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: rx.linear_token_logps(HIDDEN, x, TARGETS, **options)


def raw_session_loss(x: Tensor) -> Tensor:
    s = SESSIONS
    layout = (s.tokens, s.lengths, s.offsets, s.num_positives, s.pair_offsets, s.num_pairs)
    numbers = (0.0, 0.0, 2.0, 0.0, 1.0, 0.0, True, 0, 0, 0, 0, 0)
    return torch.ops.raddpo.session_loss(x, *layout, *[None] * 5, *numbers, x.requires_grad)[0]


TRIE = {"normalize": "trie", "index": INDEX, "nodes": INDEX.nodes(TARGETS)}
LEVEL = {"normalize": "level", "vocab": INDEX.vocab}
#: name, function, where, and the op that its errors name
OPS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, str]] = {
    "token_logps": (lambda x: rx.token_logps(x, TARGETS), LOGITS, "token_logps"),
    "token_logps level": (lambda x: rx.token_logps(x, TARGETS, **LEVEL), LOGITS, "token_logps"),
    "token_logps trie": (lambda x: rx.token_logps(x, TARGETS, **TRIE), LOGITS, "token_logps"),
    "token_logps in place": (
        lambda x: rx.token_logps(x * 1, TARGETS, inplace_backward=True),
        LOGITS,
        "token_logps",
    ),
    "linear of hidden": (linear(bias=BIAS), HIDDEN, "linear_token_logps"),
    "linear in tiles": (linear(logits_budget=0), HIDDEN, "linear_token_logps"),
    "linear level": (linear(**LEVEL), HIDDEN, "linear_token_logps"),
    "linear trie": (linear(**TRIE), HIDDEN, "linear_token_logps"),
    "linear with rows": (linear(rows=ROWS), HIDDEN.view(6, 5), "linear_token_logps"),
    "linear of weight": (of_weight(), WEIGHT, "linear_token_logps"),
    "linear of weight in tiles": (of_weight(logits_budget=0), WEIGHT, "linear_token_logps"),
    "linear of bias": (
        lambda x: rx.linear_token_logps(HIDDEN, WEIGHT, TARGETS, bias=x, logits_budget=0),
        BIAS,
        "linear_token_logps",
    ),
    "legal_mass": (lambda x: rx.legal_mass(x, INDEX, INDEX.nodes(TARGETS)), LOGITS, "legal_mass"),
    "rad_dpo_loss": (lambda x: rx.rad_dpo_loss(x, SESSIONS).loss, LOGPS, "rad_dpo_loss"),
    "rad_dpo_loss preference": (lambda x: rx.rad_dpo_loss(x, SESSIONS).preference, LOGPS, "rad_dpo_loss"),
    "rad_dpo_loss sft": (lambda x: rx.rad_dpo_loss(x, SESSIONS).sft, LOGPS, "rad_dpo_loss"),
    "multilabel": (
        lambda x: rx.multilabel_contrastive_loss(x[:, 0], SESSIONS),
        LOGPS,
        "multilabel_contrastive_loss",
    ),
    "RADDPOLoss": (lambda x: rx.RADDPOLoss()(x, HEAD, SMALL).loss, STATES, "linear_token_logps"),
    "torch.ops token_logps": (
        lambda x: torch.ops.raddpo.token_logps(x, TARGETS, None, None, None, 1.0, 0.0, -100, 0, 12)[0],
        LOGITS,
        "token_logps",
    ),
    "torch.ops session_loss": (raw_session_loss, LOGPS, "session_loss"),
}
#: Neither has a derivative at all.
SEARCH: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, str]] = {
    "beam_step": (
        lambda x: rx.beam_step(x, rx.BeamState.start(INDEX, 1), INDEX, 2).scores,
        LOGITS[:1, :1].float(),
        "beam_step",
    ),
    "linear_beam_step": (
        lambda x: rx.linear_beam_step(x, WEIGHT.float(), rx.BeamState.start(INDEX, 1), INDEX, 2).scores,
        HIDDEN[:1, :1].float(),
        "linear_beam_step",
    ),
    "sample_step": (
        lambda x: rx.sample_step(x, rx.SampleState.start(INDEX, 1), INDEX, 2, seed=0).scores,
        LOGITS[:1, :1].float(),
        "sample_step",
    ),
    "beam_search": (
        lambda x: (
            rx.beam_search(
                lambda tokens, parents, level: x.expand(*tokens.shape, -1), INDEX, batch_size=1, beam_width=2
            ).scores
        ),
        LOGITS[0, 0].float(),
        "beam_step",
    ),
}


def forward_mode(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, torch.ones_like(x)))


def total(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).sum()


def second(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return torch.autograd.grad((gradient**2).sum() + (x * 0).sum(), x)


def second_backward(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = x.clone().requires_grad_()
    f(x).sum().backward(create_graph=True)
    assert x.grad is not None
    (x.grad**2).sum().backward()


def twice_reverse(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """A jvp as older code works it out: the gradient's derivative by what is upstream of it."""
    x = x.clone().requires_grad_()
    y = f(x)
    upstream = torch.ones_like(y, requires_grad=True)
    (gradient,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    return torch.autograd.grad(gradient.sum(), upstream)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "forward_ad": forward_mode,
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "func.grad": lambda f, x: torch.func.grad(total(f))(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x + 1])),
}
SECOND = {"grad": second, "backward": second_backward, "upstream": twice_reverse}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", [*OPS, *SEARCH])
def test_no_transform_is_passed_over(name: str, transform: str, requires_grad: bool) -> None:
    function, x, op = (OPS | SEARCH)[name]
    x = x.clone().requires_grad_(requires_grad)
    if transform == "vmap" and name.startswith("torch.ops"):
        found = TRANSFORMS[transform](function, x.detach())  # torch runs it once for each
        torch.testing.assert_close(found, torch.stack([function(x.detach()), function(x.detach() + 1)]))
        return
    with pytest.raises(NotImplementedError, match=op):
        TRANSFORMS[transform](function, x)


@pytest.mark.parametrize("order", SECOND)
@pytest.mark.parametrize("name", OPS)
def test_no_second_derivative_is_passed_over(name: str, order: str) -> None:
    function, x, op = OPS[name]
    with pytest.raises(RuntimeError, match=rf"{op}\b.* has no second derivative"):
        SECOND[order](function, x)


@pytest.mark.parametrize("name", OPS)
def test_the_first_derivative_within_a_graph(name: str) -> None:
    """With ``create_graph`` it is the same, and still a constant where nothing asks for its derivative."""
    function, x, _ = OPS[name]
    found = []
    for create_graph in (False, True):
        y = x.clone().requires_grad_()
        found += torch.autograd.grad(function(y).sum(), y, create_graph=create_graph)
    assert torch.equal(found[0], found[1].detach())
    assert found[1].requires_grad


def test_accumulated_gradients_are_no_part_of_a_graph() -> None:
    weight = WEIGHT.clone().requires_grad_()
    loss = rx.linear_token_logps(HIDDEN, weight, TARGETS, accumulate_grad=True).sum()
    with pytest.raises(RuntimeError, match=r"linear_token_logps with accumulate_grad .* create_graph"):
        loss.backward(create_graph=True)


def test_embeddings_of_a_weighting() -> None:
    embeddings = torch.randn(len(SESSIONS.tokens), 4)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="SimilarityWeighting"):
        rx.SimilarityWeighting()(forward_ad.make_dual(embeddings, embeddings), SESSIONS)


@pytest.mark.parametrize("name", SEARCH)
def test_searches_have_no_gradient(name: str) -> None:
    """Whatever asks for one."""
    function, x, _ = SEARCH[name]
    plain = function(x)
    found = function(x.clone().requires_grad_())
    assert torch.equal(found, plain)
    assert not found.requires_grad
