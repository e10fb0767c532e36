"""torch's default dtype and device change nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import raddpo_ext as rx

CPU = torch.Generator().manual_seed(0)
SIDS = torch.randint(0, 5, (30, 3), generator=CPU)
LOGITS = torch.randn(2, 40, generator=CPU)
HIDDEN, WEIGHT = torch.randn(6, 3, 8, generator=CPU), torch.randn(40, 8, generator=CPU)
LOGPS = -torch.rand(6, 3, generator=CPU)
LENGTHS, OFFSETS, POSITIVES = torch.full((6,), 3), torch.tensor([0, 3, 6]), torch.tensor([1, 2])
WEIGHTING = rx.SimilarityWeighting(window=4)  # a module's buffers are on the default device, as torch's are
PROMPTS = [[1, 2], [3]]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def everything(folder: Path) -> list[Tensor]:
    """A call of every kind, by fixed inputs."""
    found: list[Tensor] = []
    for eos in (None, 39):
        vocab = rx.SIDVocab([5, 5, 5], offset=3, eos=eos)
        index = rx.TrieIndex.build(SIDS, vocab=vocab)
        index.save(folder / "index.trie")
        loaded = rx.TrieIndex.load(folder / "index.trie")
        found += [index.data, loaded.data, *loaded.lookup(SIDS[:4]), loaded.contains(SIDS + 1), index.node_tokens]
        found += [index.children([1]), index.sids_of([0, 5]), index.restrict([1, 2]).items, vocab.encode(SIDS)]
        found += [index.add(SIDS[:2]).data, index.discard([3]).items]
        for normalize in ("vocab", "level", "trie"):
            step = lambda tokens, parents, level: LOGITS[:, None].expand(2, tokens.shape[1], 40)  # noqa: E731
            search = {"batch_size": 2, "beam_width": 4, "normalize": normalize, "return_token_logps": True}
            found += rx.beam_search(step, index, **search, top_k=6, length_penalty=0.5)
            states = lambda tokens, parents, level: HIDDEN[:2, :1].expand(2, tokens.shape[1], 8)  # noqa: E731
            found += rx.beam_search(states, index, **search, weight=WEIGHT)
    tokens = vocab.encode(SIDS[:6])[:, :3].contiguous()
    sessions = rx.SessionBatch(tokens, LENGTHS, OFFSETS, POSITIVES)
    found += [sessions.counts(), sessions.kept_pairs(), *sessions.pairs()]
    weighting = copy.deepcopy(WEIGHTING)
    for _ in range(3):
        weights = weighting(HIDDEN[:, 0], sessions)
    found += [weights, weighting.history, weighting.thresholds]
    nodes = index.nodes(tokens)
    for options in ({}, {"normalize": "level", "vocab": vocab}, {"normalize": "trie", "index": index, "nodes": nodes}):
        for budget in (2**30, 0):
            hidden, weight = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
            logps = rx.linear_token_logps(hidden, weight, tokens, logits_budget=budget, **options)
            found += [logps, *torch.autograd.grad(logps[logps.isfinite()].sum(), (hidden, weight))]
        logits = (HIDDEN @ WEIGHT.T).requires_grad_()
        logps = rx.token_logps(logits, tokens, **options)
        found += [logps, *torch.autograd.grad(logps[logps.isfinite()].sum(), logits)]
    found.append(rx.legal_mass(HIDDEN @ WEIGHT.T, index, nodes))
    rows = LENGTHS[:, None].expand(6, 3)
    found.append(rx.linear_token_logps(HIDDEN.view(18, 8), WEIGHT, tokens, rows=rows))
    logps = LOGPS.clone().requires_grad_()
    for options in ({"level_weights": [0.1, 0.2, 0.3]}, {"normalizer": (2.0, 3)}, {"pair_weights": weights}):
        loss = rx.rad_dpo_loss(logps, sessions, **options)
        found += [*loss, *torch.autograd.grad(loss.loss, logps)]
    found.append(rx.multilabel_contrastive_loss(logps[:, 0], sessions))
    for options in ({}, {"credit": "siblings"}, {"credit": "marginal", "level_weights": [0.1, 0.2, 0.3]}):
        found += [value for value in rx.group_advantages(LOGPS[:, 0], sessions, **options) if value is not None]
    for options in (
        {"level_weights": [0.1, 0.2, 0.3], "nll_weight": 0.5},
        {"normalizer": (2.0, 3)},
        {"dual_clip": 2.0},
    ):
        output = rx.policy_loss(logps, sessions, LOGPS[:, 0], **options)
        found += [*output, *torch.autograd.grad(output.loss, logps)]
    selected, kept = sessions.select(OFFSETS[1:] > 3)
    found += [selected.tokens, selected.offsets, kept]
    output = rx.RADDPOLoss(weighting)(HIDDEN, WEIGHT, sessions, embeddings=HIDDEN[:, 0])
    found += [output.loss, output.logps, *output.metrics.values()]
    packed = rx.pack_sessions(PROMPTS, sessions)
    found += [packed.input_ids, packed.position_ids, packed.predictors]
    return [value.detach() for value in found]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return everything(tmp_path_factory.mktemp("expected"))


@pytest.mark.parametrize("other", ["bfloat16", "float64", "meta"])
def test_defaults_change_nothing(other: str, expected: list[Tensor], tmp_path: Path) -> None:
    with default_device() if other == "meta" else default_dtype(getattr(torch, other)):
        found = everything(tmp_path)
    for position, (value, right) in enumerate(zip(found, expected, strict=True)):
        assert (value.dtype, value.device, value.shape) == (right.dtype, right.device, right.shape), position
        assert value.contiguous().numpy().tobytes() == right.contiguous().numpy().tobytes(), position
