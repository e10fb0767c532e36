"""States of sampling for the tests of its kernels, and what it means for a step to be right."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference
from raddpo_ext.decoding.sample_step import Noise, logits_sample_step

from .agreement import assert_values_close
from .beam_cases import random_state


def sample_state(scores: Tensor, nodes: Tensor, perturbed: Tensor) -> rx.SampleState:
    """Beams at these nodes; a step reads neither tokens, parents nor log-probs."""
    return rx.SampleState(
        scores, torch.full_like(nodes, -1), torch.zeros_like(nodes), nodes, perturbed, torch.zeros_like(scores)
    )


def random_sample_state(
    index: rx.TrieIndex, batch: int, width: int, generator: torch.Generator, draws: int | None = None
) -> rx.SampleState:
    """Beams of every kind; their perturbed scores are near their scores. ``draws``: at most so many per beam."""
    state = random_state(index, batch, width, generator)
    noise = torch.rand(batch, width, generator=generator)
    perturbed = state.scores + 4 * noise - 1 if draws is None else 1 + (noise * draws).floor()
    return sample_state(state.scores, state.nodes, perturbed)


def step(
    logits: Tensor, state: rx.SampleState, index: rx.TrieIndex, width: int, replacement: bool, **options: Any
) -> rx.SampleState:
    """A step with or without replacement. ``options``: seed, keys, temperature."""
    noise = Noise(options["keys"], torch.tensor(options["seed"]))
    return logits_sample_step(
        logits, state, index, width, noise, temperature=options["temperature"], replacement=replacement
    )


def assert_sample_states_equal(got: rx.SampleState, expected: rx.SampleState) -> None:
    """To the bit, empty slots included."""
    for name, part in vars(got).items():
        assert part.tolist() == vars(expected)[name].tolist(), name


def assert_sample_step_agrees(
    got: rx.SampleState, logits: Tensor, state: rx.SampleState, index: reference.TrieIndex, **options: Any
) -> None:
    """``got`` holds the first of all candidates, where a near tie in float64 may fall either way."""
    batch, width = got.scores.shape
    children = max(map(len, index.child_nodes))
    every = reference.sample_step(logits.double(), state, index, max(width, state.nodes.shape[1] * children), **options)
    for query in range(batch):
        rows, expected = _rows(got, query), _rows(every, query)
        values = {row[3:]: row[:3] for row in expected}
        assert len(rows) == min(width, len(expected))
        assert len({row[3:] for row in rows}) == len(rows)
        assert rows == sorted(rows, key=lambda row: (-row[0], row[3], row[4]))
        for column in range(3):  # perturbed score, score, log-prob
            found = [row[column] for row in rows]
            assert_values_close(found, [values[row[3:]][column] for row in rows], "sample_step")
        assert_values_close([row[0] for row in rows], [row[0] for row in expected[: len(rows)]], "sample_step")
        empty = width - len(rows)
        for part, value in zip(vars(got).values(), (-math.inf, -1, 0, -1, -math.inf, 0), strict=True):
            assert part[query, len(rows) :].tolist() == [value] * empty


def _rows(state: rx.SampleState, query: int) -> list[tuple[float, float, float, int, int, int]]:
    """(perturbed, score, logp, parent, token, node) of each slot that is not empty."""
    columns = (state.perturbed, state.scores, state.logps, state.parents, state.tokens, state.nodes)
    rows = zip(*(column[query].tolist() for column in columns), strict=True)
    return [row for row in rows if row[1] > -math.inf]
