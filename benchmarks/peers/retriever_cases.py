"""Retrievals and their parts that are timed, and what they are timed against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.harness import catalogues
from benchmarks.harness.timing import best_rate
from benchmarks.peers.constraints import KINDS, Constraints
from raddpo_ext._matmul import linear
from raddpo_ext.bench.retriever import children_of, generate, random_model

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, HEAD_DIM = 151_936, 512, 1536, 4, 8, 64
CODES, FIRST = 256, 151_000  # of a level; token id of the first code
NORMALIZE = ("vocab", "level", "trie")


@dataclass(frozen=True)
class Case:
    """``batch`` prompts of ``prompt`` tokens and ``width`` beams.

    Attributes:
        kind: ``retrieval``, whole searches; ``head``, a step from hidden states; ``constraint``, the scores' constraint
            alone.
        generate: whether ``generate`` is timed, too; ``all``: in each of its ways.
    """

    prompt: int
    width: int
    batch: int
    generate: str = ""
    dtype: str = "float32"
    kv_heads: int = HEADS
    kind: str = "retrieval"

    @property
    def name(self) -> str:
        kind = {"retrieval": f"prompt={self.prompt}", "head": f"head {self.dtype}", "constraint": "constraint"}
        grouped = " GQA" if self.kv_heads < HEADS else ""
        return f"{kind[self.kind]} W={self.width} batch={self.batch}{grouped}"

    @property
    def supports(self) -> tuple[str, ...]:
        """What the log-probs are normalized over."""
        return NORMALIZE if self.generate == "all" or self.kind == "head" else NORMALIZE[:2]

    @property
    def peers(self) -> dict[str, str]:
        """The ways to call ``generate``, with the kind of the constraint, empty for none."""
        found = {"generate": "dict", "generate, no constraint": ""}
        found |= {f"generate, {kind}": kind for kind in KINDS[1:]}
        return {"": {}, "dict": {"generate": "dict"}, "all": found}[self.generate]

    @property
    def onednn(self) -> list[str]:
        """The methods that also run with ``use_onednn``, ``generate`` first."""
        return ["generate", *(f"shared {name}" for name in self.supports)] if self.generate == "all" else []


CASES = [Case(256, 50, 4, generate="dict")]
CASES += [Case(prompt, width, 1) for prompt in (64, 256, 1024) for width in (10, 50, 200)]
CASES += [Case(0, 50, 4, dtype=dtype, kind="head") for dtype in ("float32", "bfloat16")]
GENERATE = [Case(128, 50, batch, generate="all", kv_heads=2) for batch in (1, 4)]
GENERATE += [Case(128, 50, batch, kind="constraint") for batch in (1, 4)]


def catalogue() -> rx.TrieIndex:
    sids = catalogues.real("industrial")
    return rx.TrieIndex.build(sids, vocab=rx.SIDVocab([CODES] * sids.shape[1], offset=FIRST))


def children(index: rx.TrieIndex) -> dict[tuple[int, ...], list[int]]:
    assert index.vocab is not None
    return children_of(index.vocab.encode(catalogues.real("industrial")).tolist())


def prompts_of(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(FIRST, (case.batch, case.prompt), generator=generator)


class Search:
    """The model, the catalogue and prompts, and a retrieval by method: ``(scores [B, W], tokens or SIDs)``."""

    def __init__(self, case: Case) -> None:
        self.case, self.index = case, catalogue()
        self.model = random_model(VOCAB, HIDDEN, LAYERS, case.kv_heads)
        self.prompts = prompts_of(case)
        self.constraints = Constraints(self.index, children(self.index), case.width)

    def retriever(self, normalize: str, shared: bool) -> rx.SIDRetriever:
        return rx.SIDRetriever(
            self.model, self.index, beam_width=self.case.width, normalize=normalize, shared_prefix=shared
        )

    def generate(self, kind: str = KINDS[0]) -> tuple[Tensor, Tensor]:
        """With this kind of constraint, or with none."""
        length = self.prompts.shape[1]
        options = {"logits_processor": [self.constraints.make(kind, self.prompts)]} if kind else {}
        found = generate(
            self.model,
            self.prompts,
            width=self.case.width,
            levels=self.index.levels,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        levels = torch.arange(self.index.levels)
        sids = found.sequences[:, length:] - FIRST - CODES * levels
        return found.sequences_scores.view(self.case.batch, -1), sids.view(self.case.batch, -1, len(levels))

    def product_rate(self) -> float:
        """Operations per second of the faster of a layer's and the head's bare products."""
        case = self.case
        return best_rate((case.batch * case.prompt, INTERMEDIATE, HIDDEN), (case.batch * case.width, VOCAB, HIDDEN))

    def operations(self, normalize: str) -> float:
        """Of the products that shared beams need; a position meets every key before it."""
        case, steps = self.case, self.index.levels - 1
        width = HEADS * HEAD_DIM
        layer = 2 * HIDDEN * (width + case.kv_heads * HEAD_DIM) + 3 * HIDDEN * INTERMEDIATE
        tokens = case.prompt + steps * case.width
        keys = case.prompt * case.prompt / 2 + case.width * steps * (case.prompt + (steps + 1) / 2)
        rows = {"vocab": VOCAB, "level": CODES, "trie": 0}[normalize] * (1 + steps * case.width)
        return 2.0 * case.batch * (LAYERS * (tokens * layer + 2 * width * keys) + rows * HIDDEN)


@torch.no_grad()
def head_methods(case: Case) -> dict[str, Callable[[], Any]]:
    """Steps of the last level, whose beams are the best of the level before by random scores."""
    index, dtype = catalogue(), getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype)
    hidden = torch.randn(case.batch, case.width, HIDDEN, generator=generator).to(dtype)
    state = rx.BeamState.start(index, case.batch)
    for _ in range(index.levels - 1):
        logits = torch.randn(*state.nodes.shape, VOCAB, generator=generator)
        state = rx.beam_step(logits, state, index, case.width)
    rows = hidden.view(-1, HIDDEN)
    methods: dict[str, Callable[[], Any]] = {}
    for normalize in NORMALIZE:
        options = {"normalize": normalize}
        dense = lambda options=options: rx.beam_step(hidden @ weight.T, state, index, case.width, **options)  # noqa: E731
        fused = lambda options=options: rx.linear_beam_step(  # noqa: E731
            hidden, weight, state, index, case.width, level=index.levels - 1, **options
        )
        atol = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(fused().scores, dense().scores, rtol=0, atol=atol)
        needed = weight if normalize == "vocab" else weight[index.level_tokens(index.levels - 1)]
        out = torch.empty(len(rows), len(needed), dtype=dtype)
        methods[f"dense {normalize}"], methods[f"fused {normalize}"] = dense, fused
        methods[f"floor {normalize}"] = lambda needed=needed, out=out: linear(rows, needed, out=out)
    return methods


@torch.no_grad()
def constraint_methods(case: Case) -> dict[str, Callable[[], Any]]:
    """The constraint of every step of a search, for scores of the whole vocabulary; the beams are random prefixes."""
    index, prompts = catalogue(), prompts_of(case).repeat_interleave(case.width, 0)
    constraints = Constraints(index, children(index), case.width)
    generator = torch.Generator().manual_seed(0)
    assert index.vocab is not None
    sids = index.vocab.encode(catalogues.real("industrial"))
    beams = sids[torch.randint(len(sids), (len(prompts),), generator=generator)]
    scores = torch.randn(len(prompts), VOCAB, generator=generator).log_softmax(-1)
    inputs = [torch.cat([prompts, beams[:, :level]], 1) for level in range(index.levels)]

    def run(kind: str) -> list[Tensor]:
        processor = constraints.make(kind, prompts)
        return [processor(ids, scores) for ids in inputs]

    for kind in KINDS[1:]:
        for found, expected in zip(run(kind), run(KINDS[0]), strict=True):
            torch.testing.assert_close(found, expected)

    def timed(kind: str) -> None:
        """As ``generate``, which keeps no step's result."""
        processor = constraints.make(kind, prompts)
        for ids in inputs:
            processor(ids, scores)

    return {kind: lambda kind=kind: timed(kind) for kind in KINDS}
