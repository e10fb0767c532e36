"""The losses on a CUDA device against the CPU: values, gradients, streams and graphs. Skipped without a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.on_gpu import NEEDS_GPU, REPEATS, no_synchronisation
from support.session_cases import CORES, Case, assert_results_close, build, name_of, run, scale_of
from torch import Tensor

import raddpo_ext as rx

pytestmark = NEEDS_GPU
VOCAB = rx.SIDVocab([40, 40, 40], offset=5, eos=3)
SHAPES = [[(1, 3), (2, 5), (0, 2), (3, 0)], [(2, 17)] * 300, [(5, 2000)], []]


def on_cuda(case: Case, arguments: dict[str, Any]) -> list[Tensor]:
    """Loss parts, metrics and gradient, back on the CPU."""
    moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    logps = case.logps.detach().cuda().requires_grad_()
    result = rx.rad_dpo_loss(logps, case.sessions.to("cuda"), **moved)
    sum(part.sum() * factor for part, factor in zip(result[:3], (1, -0.7, 0.4), strict=True)).backward()
    assert logps.grad is not None
    return [value.detach().cpu() for value in (*result, logps.grad)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("core", CORES, ids=name_of)
def test_session_loss_equals_the_cpu(core: dict[str, Any], dtype: torch.dtype) -> None:
    for seed, counts in enumerate(SHAPES):
        case = build(counts, 4, seed, dtype)
        arguments = case.arguments({**core, "pair_weights": True, "ref_logps": True, "level_weights": True})
        got = on_cuda(case, arguments)
        expected, gradient = run(rx.rad_dpo_loss, case, arguments, (1, -0.7, 0.4))
        assert_results_close(got, (*expected, gradient), 4 * scale_of(expected))


def test_session_loss_is_the_same_every_time() -> None:
    case = build([(3, 40)] * 500, 4, 1, torch.float32)
    first = on_cuda(case, {"positives": "each"})
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, on_cuda(case, {"positives": "each"}), strict=True))


def test_session_loss_never_synchronises_and_replays() -> None:
    case = build([(2, 9)] * 50, 3, 2, torch.float32)
    sessions, logps = case.sessions.to("cuda"), case.logps.detach().cuda().requires_grad_()
    weights = case.pair_weights.cuda()

    def step() -> Tensor:
        loss = rx.rad_dpo_loss(logps, sessions, pair_weights=weights).loss
        return torch.autograd.grad(loss, logps)[0]

    expected = step()
    with no_synchronisation():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(5):
        got.zero_()
        graph.replay()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("positives", ["winner", "each", "pooled"])
def test_the_module_never_synchronises(positives: str) -> None:
    """From hidden states to the gradient with its weighting and metrics, and what the trainer asks of the sessions."""
    case = build([(2, 9), (1, 3), (3, 5)] * 8, 3, 3, torch.float32)
    sessions = case.sessions.to("cuda")
    sessions.tokens.remainder_(16)
    generator = torch.Generator().manual_seed(4)
    hidden, weight, embeddings = (
        torch.randn(*shape, generator=generator).cuda()
        for shape in ((sessions.num_candidates, 3, 8), (16, 8), (sessions.num_candidates, 5))
    )
    weight.requires_grad_()
    module = rx.RADDPOLoss(rx.SimilarityWeighting(window=64), positives=positives).cuda()

    def step() -> list[Tensor]:
        output = module(hidden, weight, sessions, embeddings=embeddings)
        output.loss.backward()
        return [*output.metrics.values(), sessions.counts(positives), sessions.kept_pairs(positives)]

    step()
    with no_synchronisation():
        found = step()
    assert all(bool(value.isfinite().all()) for value in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
@pytest.mark.parametrize("budget", [0, 2**30])
def test_linear_token_logps_equals_the_cpu(normalize: str, dtype: torch.dtype, budget: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sids = torch.randint(40, (300, 3), generator=generator)
    tokens = VOCAB.encode(sids)
    index = rx.TrieIndex.build(sids, vocab=VOCAB)
    hidden = torch.randn(300, 4, 64, generator=generator).to(dtype)
    weight = (torch.randn(130, 64, generator=generator) / 8).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [x.detach().to(device).requires_grad_() for x in (hidden, weight)]
        at = index.to(device)
        logps = rx.linear_token_logps(
            *inputs,
            tokens.to(device),
            normalize=normalize,
            vocab=VOCAB,
            index=at,
            nodes=at.nodes(tokens.to(device)),
            logits_budget=budget,
        )
        logps.sum().backward()
        results.append([logps.detach(), *(x.grad for x in inputs)])
    for got, expected in zip(*reversed(results), strict=True):
        error = (got.cpu().float() - expected.float()).norm() / expected.float().norm()
        assert float(error) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_similarity_weighting_equals_the_cpu() -> None:
    case = build([(2, 9)] * 30, 3, 3, torch.float32)
    embeddings = torch.randn(len(case.sessions.tokens), 16, generator=torch.Generator().manual_seed(4))
    weights = []
    for device in ("cpu", "cuda"):
        module = rx.SimilarityWeighting(window=64).to(device)
        for _ in range(2):
            found = module(embeddings.to(device), case.sessions.to(device))
        weights.append(found.cpu())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
