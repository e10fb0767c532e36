"""A policy that is a table of logits, over 30 SIDs of one to four codes: every estimator's gradient can be held against
the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import raddpo_ext as rx

NUM_SIDS, LEVELS, CODES = 30, 4, 5
VOCABULARY = 8  # three tokens are in no SID
SEED = 16  # gives SIDs of every length


class Draws(NamedTuple):
    """Groups of ``n`` rows each.

    Attributes:
        items: int64 ``[G, n]`` SID numbers.
        weights: float64 ``[G, n]``: ``(weights * f).sum(1)`` estimates the expectation of ``f``. None for ``1 / n``.
        experts: the first so many rows of each group are experts.
    """

    items: Tensor
    weights: Tensor | None = None
    experts: int = 0


@dataclass(frozen=True)
class Estimator:
    """How a group's rows become a gradient.

    Attributes:
        advantages: arguments of ``group_advantages``; None for the rewards less ``baseline``, without it. The number of
            an item stands for ``targets``, True for ``baseline``.
        loss: arguments of ``policy_loss``. Its terms are added up and divided by the number of rows.
        baseline: the same number for every group.
        normalize: the support of the log-probs.
        use_weights: without them each row counts ``1 / n``.
        self_normalize: divide the weights by their sum.
    """

    advantages: dict[str, Any] | None = None
    loss: dict[str, Any] = field(default_factory=dict)
    baseline: float = 0.0
    normalize: str = "trie"
    use_weights: bool = True
    self_normalize: bool = False


class TablePolicy:
    """Logits of its own for each prefix, and a reward for each SID: most are 0, some are equal, one is negative.

    A gradient is float64 ``[P]``, by the logits of all prefixes over the whole vocabulary.
    """

    def __init__(self, seed: int = SEED) -> None:
        rng = np.random.default_rng(seed)
        self.sids = _prefix_free(rng)
        self.lengths = torch.tensor([len(sid) for sid in self.sids])
        self.tokens = torch.tensor([[*sid, *[0] * (LEVELS - len(sid))] for sid in self.sids])
        self.index = rx.TrieIndex.build(self.tokens, lengths=self.lengths)
        self.nodes = self.index.nodes(self.tokens).masked_fill(~self._mask, 0)
        # A search takes float32 logits: the truth is that of the same numbers.
        logits = rng.normal(size=(self.index.num_nodes, VOCABULARY)).astype(np.float32)
        self.logits = torch.from_numpy(logits).double()
        worth = rng.choice([0.0, 0.2, 0.5, 1.0], NUM_SIDS, p=[0.6, 0.15, 0.15, 0.1])
        worth[0], worth[1] = -0.3, 0.77
        self.rewards = torch.from_numpy(worth)

    @property
    def _mask(self) -> Tensor:
        return torch.arange(LEVELS) < self.lengths[:, None]

    # The truth, in plain torch.

    def token_logps(self, logits: Tensor, normalize: str = "trie") -> Tensor:
        """Of each SID's tokens ``[30, 4]``, 0 beyond its length."""
        support = torch.zeros(self.index.num_nodes, VOCABULARY, dtype=torch.bool)
        support[self.nodes[self._mask], self.tokens[self._mask]] = True
        if normalize == "vocab":
            support = torch.ones_like(support)
        logps = logits.masked_fill(~support, -torch.inf).log_softmax(-1)
        return logps[self.nodes, self.tokens].masked_fill(~self._mask, 0)

    def logps(self, logits: Tensor, normalize: str = "trie") -> Tensor:
        """Of each SID, ``[30]``."""
        return self.token_logps(logits, normalize).sum(1)

    @cached_property
    def probabilities(self) -> Tensor:
        """With which rollouts are drawn: ``[30]``, over the trie."""
        return self.logps(self.logits).exp()

    @cached_property
    def expected_reward(self) -> float:
        return float(self.probabilities @ self.rewards)

    def gradient(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Of a function of the logits."""
        logits = self.logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(logits), logits)
        return gradient.flatten()

    @cached_property
    def truth(self) -> Tensor:
        """The gradient of ``J``, the expected reward of the rollouts' policy."""
        return self.gradient(lambda logits: self.logps(logits).exp() @ self.rewards)

    # Draws and estimates, with the package.

    def draw(self, rollouts: str, groups: int, samples: int, seed: int = 0) -> Draws:
        """``rollouts``: as of ``PolicyConfig``. Beams are one group: they are always the same."""
        nodes = torch.zeros(1, 1, dtype=torch.int64)

        def step_fn(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
            return self.logits.float()[nodes.expand(tokens.shape).clamp(min=0)]

        def on_step(level: int, state: Any) -> None:
            nonlocal nodes
            nodes = state.nodes

        if rollouts == "beams":
            beams = rx.beam_search(
                step_fn, self.index, batch_size=1, beam_width=samples, normalize="trie", on_step=on_step
            )
            return Draws(beams.items)
        drawn = rx.sample_search(
            step_fn,
            self.index,
            batch_size=groups,
            samples=samples,
            seed=seed,
            replacement=rollouts == "independent",
            on_step=on_step,
        )
        if rollouts == "independent":
            return Draws(drawn.items.flatten().repeat_interleave(drawn.counts.flatten()).view(groups, samples))
        rows = min(samples, NUM_SIDS)
        return Draws(drawn.items[:, :rows], drawn.log_weights[:, :rows].double().exp())

    def loss(self, logps: Tensor, draws: Draws, estimator: Estimator, **options: Any) -> Tensor:
        """The estimator's loss over all groups, as a loop of one's own would write it.

        Args:
            logps: ``[G * n, 4]`` of the rows' tokens.
            draws: the groups.
            estimator: what is estimated how.
            options: more arguments of ``policy_loss``.
        """
        count, rows = draws.items.shape
        groups = self._sessions(draws.items, draws.experts)
        rewards, weights = self.rewards[draws.items.flatten()], None
        if draws.weights is not None and estimator.use_weights:
            share = draws.weights / (draws.weights.sum(1, keepdim=True) if estimator.self_normalize else 1)
            weights = (rows * share).flatten()  # 1 on average
        gates = None
        if estimator.advantages is None:
            values = rewards - estimator.baseline
        else:
            chosen = dict(estimator.advantages)
            if chosen.get("baseline") is True:
                chosen["baseline"] = torch.full((count,), estimator.baseline, dtype=torch.float64)
            if "targets" in chosen:
                chosen["targets"] = self._sessions(torch.full((count, 1), chosen["targets"]))
            values, _, gates = rx.group_advantages(rewards, groups, weights=weights, **chosen)
        common = {"objective": "reinforce", "aggregate": "token", "reduction": "sum"}
        return rx.policy_loss(
            logps, groups, values, weights=weights, gates=gates, **common | estimator.loss | options
        ).loss

    def _sessions(self, items: Tensor, experts: int = 0) -> rx.SessionBatch:
        """A group per row of SID numbers ``[G, n]``."""
        count, rows = items.shape
        offsets, positives = torch.arange(count + 1) * rows, torch.full((count,), experts)
        return rx.SessionBatch(self.tokens[items.flatten()], self.lengths[items.flatten()], offsets, positives)

    def estimates(self, draws: Draws, estimator: Estimator) -> Tensor:
        """Each group's estimate ``[G, P]`` of the gradient of the expected reward."""
        shape = (*draws.items.shape, LEVELS)
        logps = self.token_logps(self.logits, estimator.normalize)[draws.items.flatten()].requires_grad_()
        (slopes,) = torch.autograd.grad(self.loss(logps, draws, estimator), logps)
        # A token's log-prob depends on the logits of its prefix only: add up by token, then go on to the logits.
        places = (LEVELS * draws.items[..., None] + torch.arange(LEVELS)).flatten(1)
        tokens = torch.zeros(shape[0], NUM_SIDS * LEVELS, dtype=torch.float64)
        tokens.scatter_add_(1, places, -slopes.view(shape).flatten(1) / shape[1])
        return tokens @ self._slopes[estimator.normalize]

    @cached_property
    def _slopes(self) -> dict[str, Tensor]:
        """Of each token's log-prob by the logits: ``[30 * 4, P]``, by support."""
        found = {}
        for normalize in ("trie", "vocab"):
            rows = self.logits[self.nodes].requires_grad_()
            support = {"index": self.index, "nodes": self.nodes} if normalize == "trie" else {}
            logps = rx.token_logps(rows, self.tokens, normalize=normalize, **support)
            (slopes,) = torch.autograd.grad(logps.masked_fill(~self._mask, 0).sum(), rows)
            places = F.one_hot(self.nodes, self.index.num_nodes).double()
            found[normalize] = torch.einsum("cln,clv->clnv", places, slopes).reshape(NUM_SIDS * LEVELS, -1)
        return found


def _prefix_free(rng: np.random.Generator) -> list[list[int]]:
    """SIDs of which none begins with another."""
    sids: list[list[int]] = []
    while len(sids) < NUM_SIDS:
        length = rng.choice(LEVELS, p=[0.05, 0.2, 0.4, 0.35]) + 1
        new = rng.integers(0, CODES, length).tolist()
        if not any(sid[: len(new)] == new[: len(sid)] for sid in sids):
            sids.append(new)
    return sids
