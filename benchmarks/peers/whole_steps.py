"""A whole training step, forward and backward, by several ways that differ in one thing from one to the next.

Model, sessions and loss are the same. Plain torch takes log-probs and loss as :mod:`raddpo_ext.bench` defines them for
its comparisons; the packed rows are those of ``pack_sessions`` in all ways.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import torch
from torch import Tensor

import raddpo_ext as rx
from benchmarks.peers.onednn import SUFFIX, by_onednn
from benchmarks.peers.packing_cases import CODES, FIRST, LEVELS, Case, Problem
from raddpo_ext.bench.session_loss_peers import Layout, shared_with_winner, winner_loss
from raddpo_ext.bench.token_logps_peers import gather_lse_fp32
from raddpo_ext.integrations.embedding_gradient import adding_rows
from raddpo_ext.integrations.transformers import session_states

Packed = rx.PackedSessions | None
STAGES = ("rows", "embeddings", "backbone", "head", "loss")


@dataclass(frozen=True)
class Way:
    """How to compute a step.

    Attributes:
        layout: of the rows.
        logps: log-probs ``[C, L]`` from the model's states and how the rows are packed.
        level: whether they are normalized over the level.
        ours: whether our operators compute it.
        into: whether they add the gradients of head and embeddings to ``weight.grad`` directly.
        onednn: whether the model's layers run by ``use_onednn``.
    """

    layout: str
    logps: Callable[[Steps, Tensor, Packed], Tensor]
    level: bool = False
    ours: bool = False
    into: bool = False
    onednn: bool = False


class Steps(Problem):
    """Whole steps and their stages, by way; the gradients are fresh."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.losses = {
            (level, into): rx.RADDPOLoss(
                normalize="level" if level else "vocab", vocab=self.vocab, accumulate_grad=into
            )
            for level, into in product((False, True), repeat=2)
        }
        batch = SimpleNamespace(sessions=self.sessions, case=SimpleNamespace(levels=LEVELS))
        self.at = Layout(batch)  # type: ignore[arg-type]
        self.weights = torch.ones(self.sessions.num_pairs)

    def clear(self) -> None:
        self.model.zero_grad()

    def loss_of(self, logps: Tensor, way: Way) -> Tensor:
        if way.ours:
            loss: Tensor = self.losses[way.level, way.into].of_logps(logps, self.sessions).loss
            return loss
        tokens = self.sessions.tokens
        return winner_loss(logps, shared_with_winner(tokens, self.at), self.weights, self.at)

    def step(self, way: Way) -> Tensor:
        """The loss, with its gradients in the parameters."""
        if way.onednn:
            return by_onednn(self.model, partial(self.step, replace(way, onednn=False)))()
        if way.ours:  # the loop of the README
            packed = self.pack(way.layout)
            states = session_states(self.model, packed, accumulate_grad=way.into)
            loss = self.losses[way.level, way.into](sessions=packed.sessions, **states._asdict()).loss
        else:
            inputs, rows = self.rows(way.layout)
            loss = self.loss_of(way.logps(self, self.states(inputs), rows), way)
        loss.backward()
        return loss.detach()

    def stages(self, way: Way) -> dict[str, float]:
        """The seconds of each stage, forward and backward, of a step that is cut between them."""
        found, last = dict.fromkeys(STAGES, 0.0), time.process_time()

        def ended(stage: str) -> None:
            nonlocal last
            now = time.process_time()
            found[stage] += now - last
            last = now

        inputs, packed = self.rows(way.layout)
        ended("rows")
        with adding_rows(self.model) if way.into else nullcontext():
            embeddings = self.model.model.embed_tokens(inputs.pop("input_ids"))
        embedded = embeddings.detach().requires_grad_()
        ended("embeddings")
        states = self.states({"inputs_embeds": embedded, **inputs})
        cut = states.detach().requires_grad_()
        ended("backbone")
        logps = way.logps(self, cut, packed)
        leaf = logps.detach().requires_grad_()
        ended("head")
        self.loss_of(leaf, way).backward()
        ended("loss")
        logps.backward(leaf.grad)
        ended("head")
        states.backward(cut.grad)
        ended("backbone")
        embeddings.backward(embedded.grad)
        ended("embeddings")
        return found

    def flop(self, way: Way) -> dict[str, float]:
        """Operations of the products of a packed way, by stage."""
        inputs, packed = self.rows(way.layout)
        assert packed is not None
        logits = CODES * packed.rows.numel() if way.level else self.case.vocab_size * len(packed.distinct)
        return self.operations(inputs["input_ids"].numel(), self.case.sessions, logits)


# Log-probs.


def ours(steps: Steps, states: Tensor, packed: Packed, level: bool = False, into: bool = False) -> Tensor:
    hidden, rows = steps.predictors(states, packed)
    return steps.losses[level, into].logps(hidden, steps.model.lm_head.weight, steps.sessions, rows=rows)


def distinct(steps: Steps, states: Tensor, packed: Packed) -> Tensor:
    """The head on every distinct state."""
    hidden, rows = steps.predictors(states, packed)
    logits = steps.model.lm_head(hidden).float()
    return logits[rows, steps.sessions.tokens] - logits.logsumexp(1)[rows]


def every(steps: Steps, states: Tensor, packed: Packed) -> Tensor:
    """The head on a state per token, in a packed row or not."""
    hidden, rows = steps.predictors(states, packed)
    return _gathered(steps, hidden if rows is None else hidden[rows])


def full(steps: Steps, states: Tensor, packed: Packed) -> Tensor:
    """The head on every position, as a model's ``logits`` are."""
    logits = steps.model.lm_head(states)[:, steps.case.prompt - 1 : -1]
    tokens = steps.sessions.tokens
    return gather_lse_fp32(logits.flatten(0, 1), tokens.flatten()).view_as(tokens)


def _gathered(steps: Steps, hidden: Tensor) -> Tensor:
    tokens = steps.sessions.tokens
    logits = steps.model.lm_head(hidden.flatten(0, 1))
    return gather_lse_fp32(logits, tokens.flatten()).view_as(tokens)


def level_slices(steps: Steps, states: Tensor, packed: Packed) -> Tensor:
    """Each level's rows of the head on the states that predict it."""
    hidden, rows = steps.predictors(states, packed)
    found = []
    for level in range(LEVELS):
        first = FIRST + CODES * level
        logits = hidden[rows[:, level]] @ steps.model.lm_head.weight[first : first + CODES].T
        found.append(gather_lse_fp32(logits, steps.sessions.tokens[:, level] - first))
    return torch.stack(found, 1)


WAYS: dict[str, Way] = {
    "ours": Way("trie", partial(ours, into=True), ours=True, into=True),
    "ours, fresh": Way("trie", ours, ours=True),
    "packed": Way("trie", distinct),
    "packed, a row per token": Way("trie", every),
    f"ours{SUFFIX}": Way("trie", partial(ours, into=True), ours=True, into=True, onednn=True),
    f"packed{SUFFIX}": Way("trie", distinct, onednn=True),
    "ours, level": Way("trie", partial(ours, level=True, into=True), level=True, ours=True, into=True),
    "packed, level": Way("trie", level_slices, level=True),
    "replicated": Way("replicated", every),
    "replicated, all logits": Way("replicated", full),
}
