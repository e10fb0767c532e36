"""A step of policy training, rollouts and update, against transformers and plain torch, on one CPU thread::

    python -m benchmarks.peers.compare_policy_steps
    python -m benchmarks.peers.compare_policy_steps --quick --cases live

The model is a stock Qwen3 of transformers with random weights (hidden size 512, 4 layers, 8 heads of 64, as many for
keys and values, intermediate size 1536, V = 152k, float32), the catalogue the real ``instruments`` one, with prompts of
random tokens and 16 rollouts each. A step draws rollouts, rewards them, and runs the forward and the backward pass
of GRPO's loss; the optimizer is left out, and gradients stay allocated between steps. Half of a prompt's rollouts,
chosen by their codes, are rewarded.

``peer`` is the step as public trainers have it: ``generate`` with 16 beams and the constraint in Python
(``prefix_allowed_tokens_fn`` over a dictionary of prefixes), a row of the batch for every rollout with its own copy of
the prompt, and the loss over log-probs of the vocabulary by elementwise torch. ``beams`` is ours over the same
rollouts and support, checked to give the same loss and gradients. ``sample`` is ours as ``PolicyTrainer`` has it by
default: draws without replacement, log-probs over the trie (another loss than the peer's), and tokens that no choice
is left for neither decoded nor packed. Both also run after ``rx.use_onednn(model)``. The floor of each is the
operations of its matrix products, as torch counts them, at the rate of the fastest bare product.

``dead`` cases time the update alone, of the same rollouts, with 85 % of the groups rewarded alike: with ``select``
before the model, and without. The floor is the update of the live groups alone, as if there were no others.

Cases run in fresh processes, methods take turns in them. Times are medians over the rounds of all processes, ratios
those of each round.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import raddpo_ext as rx
from benchmarks.harness import cases as harness
from benchmarks.harness import catalogues, report
from benchmarks.harness.timing import best_rate, methods_costs
from benchmarks.peers.onednn import SUFFIX, by_onednn
from raddpo_ext.bench.retriever import children_of, generate, random_model
from raddpo_ext.integrations.transformers import session_states

MODULE = "benchmarks.peers.compare_policy_steps"
VOCAB, HIDDEN, LAYERS = 151_936, 512, 4
CODES, FIRST = 256, 150_000  # of a level; token id of the first code
ROLLOUTS = 16
TOLERANCE = 1e-4  # of the loss, and of all gradients together, in the Euclidean norm


@dataclass(frozen=True)
class Case:
    """``prompts`` groups behind prompts of ``tokens`` tokens; ``live`` of them have different rewards."""

    prompts: int
    live: int
    tokens: int

    @property
    def name(self) -> str:
        kind = "live" if self.live == self.prompts else "dead"
        return f"{kind} {self.live} of {self.prompts} prompt={self.tokens}"


CASES = [Case(2, 2, 40), Case(2, 2, 128), Case(1, 1, 512), Case(20, 3, 128)]


class Rollouts(NamedTuple):
    """Token ids ``[B * R, L]``, group by group, and what a mean over the policy gives each."""

    tokens: Tensor
    weights: Tensor | None = None


class Problem:
    """The model, the catalogue, prompts of one length, and the parts of a step."""

    def __init__(self, case: Case) -> None:
        sids = catalogues.real("instruments")
        self.case, self.model = case, random_model(VOCAB, HIDDEN, LAYERS)
        self.vocab = rx.SIDVocab([CODES] * sids.shape[1], offset=FIRST)
        self.index = rx.TrieIndex.build(sids, vocab=self.vocab)
        self.children = children_of(self.vocab.encode(sids).tolist())
        self.prompts = torch.randint(FIRST, (case.prompts, case.tokens), generator=torch.Generator().manual_seed(1))
        self.retriever = {
            support: rx.SIDRetriever(self.model, self.index, beam_width=ROLLOUTS, normalize=support)
            for support in ("vocab", "trie")
        }

    # Rollouts.

    @torch.no_grad()
    def generated(self) -> Rollouts:
        found = generate(
            self.model,
            self.prompts,
            width=ROLLOUTS,
            levels=self.index.levels,
            prefix_allowed_tokens_fn=lambda _, row: self.children[tuple(row[self.case.tokens :].tolist())],
        )
        return Rollouts(found[:, self.case.tokens :])

    def beams(self) -> Rollouts:
        found = self.retriever["vocab"].retrieve(self.prompts)
        return Rollouts(self.vocab.encode(found.sids.flatten(0, 1)))

    def sampled(self, seed: int = 0) -> Rollouts:
        drawn = self.retriever["trie"].sample(self.prompts, None, ROLLOUTS, seed, skip_forced=True)
        return Rollouts(self.vocab.encode(drawn.sids.flatten(0, 1)), ROLLOUTS * drawn.log_weights.flatten().exp())

    def rewards(self, rollouts: Rollouts) -> Tensor:
        """Half of a live group's rows have one."""
        rows = torch.arange(len(rollouts.tokens))
        ranks = rollouts.tokens.sum(1).view(-1, ROLLOUTS).argsort(1).argsort(1).flatten()
        return ((ranks < ROLLOUTS // 2) & (rows < self.case.live * ROLLOUTS)).float()

    # Updates; each returns the loss, with its gradients in the parameters.

    def ours(self, rollouts: Rollouts, normalize: str, select: bool = True, prompts: int | None = None) -> Tensor:
        """``prompts``: of the first ones alone."""
        count = self.case.prompts if prompts is None else prompts
        rows = count * ROLLOUTS
        tokens, weights = rollouts.tokens[:rows], None if rollouts.weights is None else rollouts.weights[:rows]
        groups = rx.SessionBatch(
            tokens,
            torch.full((rows,), tokens.shape[1]),
            torch.arange(0, rows + 1, ROLLOUTS),
            torch.zeros(count, dtype=torch.int64),
        )
        advantages = rx.group_advantages(self.rewards(rollouts)[:rows], groups, weights=weights)
        kept, places, active = groups, torch.arange(rows), torch.ones(count, dtype=torch.bool)
        if select:
            active = advantages.active
            kept, places = groups.select(active)
        packed = rx.pack_sessions(
            list(self.prompts[:count][active]),
            kept,
            layout="trie",
            embeddings=False,
            skip_forced=self.index if normalize == "trie" else None,
        )
        states = session_states(self.model, packed, accumulate_grad=True)  # as PolicyTrainer does in one process
        support = {"index": self.index, "nodes": self.index.nodes(kept.tokens)} if normalize == "trie" else {}
        logps = rx.linear_token_logps(
            states.hidden,
            states.weight,
            kept.tokens,
            rows=states.rows,
            normalize=normalize,
            accumulate_grad=True,
            **support,
        )
        output = rx.policy_loss(
            logps,
            kept,
            advantages.values[places],
            weights=None if weights is None else weights[places],
            **rx.POLICY_PRESETS["grpo"],
        )
        output.loss.backward()
        return output.loss.detach()

    def peer(self, rollouts: Rollouts) -> Tensor:
        ids = torch.cat([self.prompts.repeat_interleave(ROLLOUTS, 0), rollouts.tokens], 1)
        length = rollouts.tokens.shape[1]
        logits = self.model(ids, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(2, rollouts.tokens[..., None])[..., 0]
        rewards = self.rewards(rollouts).view(-1, ROLLOUTS)
        centred = rewards - rewards.mean(1, keepdim=True)
        advantages = (centred / (rewards.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        ratio = (logps - logps.detach()).exp()
        terms = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        loss = terms.mean(1).mean()
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=False)

    def gradient(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def work(case: Case, rounds: int) -> dict[str, Any]:
    """One process's measurements: seconds by method, one per round."""
    problem = Problem(case)
    methods: dict[str, Callable[[], Any]]
    if case.live == case.prompts:
        _check(problem)
        methods = {
            "peer": lambda: problem.peer(problem.generated()),
            "beams": lambda: problem.ours(problem.beams(), "vocab"),
            "sample": lambda: problem.ours(problem.sampled(), "trie"),
            "peer, rollouts": problem.generated,
            "beams, rollouts": problem.beams,
            "sample, rollouts": problem.sampled,
        }
        methods |= {f"{way}{SUFFIX}": by_onednn(problem.model, methods[way]) for way in ("peer", "sample")}
    else:
        rollouts = problem.sampled()
        update = partial(problem.ours, rollouts, "trie")
        methods = {
            "select": update,
            "all groups": partial(update, select=False),
            "floor": partial(update, prompts=case.live),
        }
    problem.clear()
    costs = methods_costs(methods, rounds, problem.clear)
    if case.live == case.prompts:
        costs["gflop"] = {name: operations(methods[name]) / 1e9 for name in WAYS}
        prompts = case.prompts * case.tokens
        # Products of a layer, for the prompts once and for a prompt per rollout.
        costs["gflop_per_s"] = best_rate(*((rows, 3 * HIDDEN, HIDDEN) for rows in (prompts, prompts * ROLLOUTS))) / 1e9
    return costs


def operations(call: Callable[[], Any]) -> int:
    """Of a call's matrix products; an attention's are those of every query with every key."""
    aten = torch.ops.aten
    others = {  # that torch does not count by itself
        torch.ops.mkldnn._linear_pointwise: lambda left, right, *_, **__: 2 * math.prod(left) * right[0],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=others) as counter:
        call()
    return counter.get_total_flops()


def _check(problem: Problem) -> None:
    """Ours and the peer's find the same rollouts, and give the same loss and gradients for them."""
    found, theirs = problem.beams(), problem.generated()
    same = [set(map(tuple, rollouts.tokens.tolist())) for rollouts in (found, theirs)]
    assert len(same[0] & same[1]) >= 0.9 * len(same[0]), "the beams differ by more than near ties"
    expected = problem.peer(found)
    gradient = problem.gradient()
    problem.clear()
    loss = problem.ours(found, "vocab")
    error = max(float((loss - expected).abs()), float((problem.gradient() - gradient).norm() / gradient.norm()))
    assert error < TOLERANCE, f"the update differs by {error:.2g}"


WAYS = ("peer", "beams", "sample")
RATIOS = {
    "live": (
        ("peer", "beams"),
        ("peer", "sample"),
        ("peer", f"sample{SUFFIX}"),
        (f"peer{SUFFIX}", f"sample{SUFFIX}"),
        ("peer, rollouts", "sample, rollouts"),
    ),
    "dead": (("select", "all groups"), ("select", "floor")),
}


def summary(case: Case, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of all processes, ratios within each round first."""
    seconds = {name: [x for run in runs for x in run["seconds"][name]] for name in runs[0]["seconds"]}
    found: dict[str, Any] = {"case": case.name, "costs": {}, "ratios": {}}
    for name, times in seconds.items():
        found["costs"][name] = {
            "ms": 1e3 * median(times),
            "cpu_ms": 1e3 * median(run["cpu_seconds"][name] for run in runs),
            "peak_bytes": median(run["peak_bytes"][name] for run in runs),
        }
    for over, under in RATIOS[case.name.split()[0]]:
        ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        found["ratios"][f"{over} / {under}"] = {"median": median(ratios), "least": min(ratios), "most": max(ratios)}
    if "gflop" in runs[0]:
        found |= {"gflop": runs[0]["gflop"], "gflop_per_s": max(run["gflop_per_s"] for run in runs)}
    return found


def has_floor(cell: dict[str, Any]) -> bool:
    return "gflop" in cell


def floor_ms(cell: dict[str, Any], way: str) -> float:
    """The way's matrix products at the best rate."""
    return 1e3 * float(cell["gflop"][way.removesuffix(SUFFIX)]) / float(cell["gflop_per_s"])


def times_floor(cell: dict[str, Any], way: str) -> str:
    """A way's time over its floor; empty where it was not measured."""
    cost = cell["costs"].get(way)
    return "" if cost is None else f"{cost['ms'] / floor_ms(cell, way):.2f}"


def markdown(cells: list[dict[str, Any]]) -> str:
    rows = [
        [cell["case"], name, f"{r['median']:.2f}", f"{r['least']:.2f}-{r['most']:.2f}"]
        for cell in cells
        for name, r in cell["ratios"].items()
    ]
    tables = [report.markdown(["case", "ratio of times", "median", "spread"], rows)]
    rows = [
        [
            cell["case"],
            way,
            f"{cell['gflop'][way]:.3g}",
            f"{floor_ms(cell, way):.3g}",
            *(times_floor(cell, way + suffix) for suffix in ("", SUFFIX)),
            f"{cell['gflop']['peer'] / cell['gflop'][way]:.1f}",
            f"{cell['costs']['peer']['ms'] / floor_ms(cell, way):.1f}",
        ]
        for cell in filter(has_floor, cells)
        for way in WAYS
    ]
    if rows:
        head = ["case", "", "GFLOP of products", "floor ms", "ms / floor", "with `use_onednn`", "peer's GFLOP / these"]
        head += ["peer's ms / floor"]
        tables.append(report.markdown(head, rows))
    return "\n\n".join([*tables, report.costs_markdown(cells)])


if __name__ == "__main__":
    harness.run(MODULE, __doc__, CASES, work=work, summary=summary, tables=markdown, processes=2)
