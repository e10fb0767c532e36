"""One step of the constrained search, by each method that is compared.

Each method here is called once with a search and one of its levels, prepares what it may prepare (not timed), and
returns the step to be timed: a call without arguments that starts from the logits and returns the best scores
``[B, <= W]`` with what the next step needs (tokens, parents, next states).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from raddpo_ext.bench.compare import Run, require
from raddpo_ext.bench.searches import Level, Search
from raddpo_ext.decoding.beam_step import beam_step
from raddpo_ext.decoding.row_lse import row_lse


def ours(search: Search, level: Level) -> Run:
    return lambda: beam_step(level.logits, level.state, search.index, search.beam_width).scores


def bare_lse(search: Search, level: Level) -> Run:
    """The floor of any step that normalises over the vocabulary: the rows' log-sum-exp and nothing else."""
    return lambda: row_lse(level.rows)


def gather_lse(search: Search, level: Level) -> Run:
    """Gather - logsumexp over a table of the beams' children. Looking the children up is not timed."""
    logits, scores = level.logits, level.state.scores
    tokens, nodes = search.children(level)
    padding, columns = nodes < 0, tokens.clamp(min=0)

    def step() -> tuple[Tensor, ...]:
        logps = logits.gather(2, columns) - torch.logsumexp(logits, 2, keepdim=True)
        totals = (scores[:, :, None] + logps).masked_fill_(padding, -math.inf).flatten(1)
        best, at = totals.topk(min(search.beam_width, totals.shape[1]))
        return best, at // tokens.shape[2], tokens.flatten(1).gather(1, at), nodes.flatten(1).gather(1, at)

    return lambda: step()[0]


Node = dict[int, "Node"]


def dict_tries(search: Search, level: Level) -> tuple[Node, list[Node]]:
    """The trie down to the beams' children as nested dicts, and each beam's node in it.

    The rest of the catalogue is left out, because a step never visits it.
    """
    tokens, _ = search.children(level)
    paths = search.tokens(level.state.nodes).flatten(0, 1).tolist()
    root: Node = {}
    nodes: list[Node] = []
    for path, children in zip(paths, tokens.flatten(0, 1).tolist(), strict=True):
        node = root
        for token in path[: level.depth]:
            node = node.setdefault(token, {})
        for token in children:
            if token >= 0:
                node.setdefault(token, {})
        nodes.append(node)
    return root, nodes


def dict_trie(search: Search, level: Level) -> Run:
    """Nested dicts that map a token to the child's dict; each beam carries its node and gathers its children."""
    _, nodes = dict_tries(search, level)
    rows, scores = level.rows, level.state.scores
    batch, width = scores.shape

    def step() -> tuple[list[Tensor], list[list[Node]]]:
        logps = torch.log_softmax(rows, -1)
        best, next_nodes = [], []
        for query in range(batch):
            child_logps, tokens, parents, counts = [], [], [], []
            for row in range(query * width, (query + 1) * width):
                # Gather the children's log-probs beam by beam.
                children = list(nodes[row])
                child_logps.append(logps[row, children])
                tokens += children
                parents += [row] * len(children)
                counts.append(len(children))
            # Add the parents' scores, and keep the best of the query.
            repeats = torch.tensor(counts, device=scores.device)
            totals = torch.cat(child_logps).add_(scores[query].repeat_interleave(repeats))
            values, at = totals.topk(min(search.beam_width, len(tokens)))
            best.append(values)
            next_nodes.append([nodes[parents[i]][tokens[i]] for i in at.tolist()])
        return best, next_nodes

    return lambda: step()[0]


def hf_style(search: Search, level: Level) -> Run:
    """A step of HF ``generate`` with ``num_beams`` and ``prefix_allowed_tokens_fn``.

    It fills a mask over the whole vocabulary by one Python callback per beam, here a walk down a dict trie, and takes
    2 W candidates out of W V.
    """
    root, _ = dict_tries(search, level)
    rows, scores = level.rows, level.state.scores
    batch, width = scores.shape
    live = (level.state.nodes >= 0).flatten().tolist()
    prefixes = search.tokens(level.state.nodes).flatten(0, 1)[:, : level.depth].contiguous()

    def allowed_tokens(batch_id: int, prefix: Tensor) -> list[int]:
        node = root
        for token in prefix.tolist():
            node = node[token]
        return list(node)

    def step() -> tuple[Tensor, ...]:
        logps = torch.log_softmax(rows, -1)
        # The mask, row by row, and then the candidates of all beams of a query.
        mask = torch.full_like(logps, -math.inf)
        for row in range(batch * width):
            if live[row]:
                mask[row, allowed_tokens(row // width, prefixes[row])] = 0
        totals = (logps + mask).view(batch, width, -1) + scores[:, :, None]
        best, at = totals.flatten(1).topk(2 * search.beam_width)
        return best, at // rows.shape[1], at % rows.shape[1]

    return lambda: step()[0][:, : search.beam_width]


def agree(scores: Any, expected: Tensor) -> None:
    """Raise AssertionError unless every query's scores, best first, are ``expected [B, W]``, -inf in empty slots."""
    got = torch.full_like(expected, -math.inf)
    for query in range(len(expected)):
        got[query, : len(scores[query])] = scores[query]
    most = float((got - expected).abs().nan_to_num(0).max())  # inf where only one has the slot
    require(torch.allclose(got, expected, rtol=1e-5, atol=1e-4), f"its scores are off by up to {most:.2g}")
