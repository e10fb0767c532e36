"""Group advantages, ours and the same in plain torch and Python.

- ``vectorised`` reshapes to ``[groups, size]``: groups of one size, as trainers of language models have them.
- ``loop`` goes from group to group, with a dict of what is compared; this is how most trainers are written.

None of these minds lengths, rows that do not count or groups whose rewards are equal. ``vectorised`` has no siblings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from raddpo_ext.bench.compare import Missing
from raddpo_ext.bench.group_advantages_cases import EPS, SIZE, Batch, Step
from raddpo_ext.policy.group_advantages import group_advantages


def ours(batch: Batch) -> Step:
    return lambda: group_advantages(batch.rewards, batch.sessions, credit=batch.case.credit).values


def _standardised(table: Tensor) -> Tensor:
    """Over the second dimension, ``[groups, size, ...]``."""
    return (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + EPS)


def vectorised(batch: Batch) -> Step:
    tokens = batch.sessions.tokens.view(-1, SIZE, batch.sessions.tokens.shape[1])
    if batch.case.credit == "sequence":
        return lambda: _standardised(batch.rewards.view(-1, SIZE)).flatten()
    if batch.case.credit == "marginal":

        def run() -> Tensor:
            """A common prefix earns 1 a token, whatever the weights before."""
            added = (tokens == tokens[:, :1]).cumprod(2).float()
            return _standardised(added).flatten(0, 1)

        return run
    raise Missing("siblings are not vectorised in plain torch")


def loop(batch: Batch) -> Step:
    sessions, levels = batch.sessions, batch.sessions.tokens.shape[1]

    def sequence() -> Tensor:
        values = torch.empty_like(batch.rewards)
        for first in range(0, len(values), SIZE):
            group = batch.rewards[first : first + SIZE]
            values[first : first + SIZE] = (group - group.mean()) / (group.std() + EPS)
        return values

    def siblings() -> Tensor:
        values = torch.zeros(sessions.tokens.shape)
        rewards, tokens = batch.rewards.tolist(), [tuple(row) for row in sessions.tokens.tolist()]
        for first in range(0, len(values), SIZE):
            for level in range(levels):
                families: dict[tuple[int, ...], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
                for row in range(first, first + SIZE):
                    families[tokens[row][:level]][tokens[row][level]].append(row)
                for children in families.values():
                    scores = torch.tensor([sum(rewards[row] for row in rows) / len(rows) for rows in children.values()])
                    for rows, value in zip(
                        children.values(), (scores - scores.mean()) / (scores.std(correction=0) + EPS), strict=True
                    ):
                        values[rows, level] = value
        return values

    def marginal() -> Tensor:
        values = torch.empty(sessions.tokens.shape)
        for first in range(0, len(values), SIZE):
            group = sessions.tokens[first : first + SIZE]
            added = (group == group[0]).cumprod(1).float()
            values[first : first + SIZE] = (added - added.mean(0)) / (added.std(0) + EPS)
        return values

    return {"sequence": sequence, "siblings": siblings, "marginal": marginal}[batch.case.credit]


def bare_bytes(batch: Batch) -> Step:
    """Copy as many bytes as must move: rewards, lengths and, per token, tokens are read, advantages written."""
    sessions, by_token = batch.sessions, batch.case.credit != "sequence"
    read = batch.rewards.nbytes + sessions.lengths.nbytes + by_token * sessions.tokens.nbytes
    written = batch.rewards.nbytes * (sessions.tokens.shape[1] if by_token else 1)
    there, here = torch.zeros(2, (read + written) // 2, dtype=torch.uint8, device=batch.rewards.device)
    return lambda: here.copy_(there)


METHODS: dict[str, Callable[[Batch], Step]] = {"ours": ours, "vectorised": vectorised, "loop": loop}
