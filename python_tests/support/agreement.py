"""What it means to be right: a step against its reference, a search against brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import reference

from .beam_cases import NORMALIZE, generator_of, random_state, without_dead_slots
from .strategies import Catalogue
from .tolerances import close


def assert_scores_close(got: Tensor, expected: Tensor, op: str) -> None:
    torch.testing.assert_close(got.double(), expected.double(), **close(op), equal_nan=True)


def assert_values_close(got: list[float], expected: list[float], op: str) -> None:
    assert_scores_close(torch.tensor(got, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), op)


def assert_states_equal(got: rx.BeamState, expected: rx.BeamState) -> None:
    """To the bit, empty slots included."""
    assert got.scores.tolist() == expected.scores.tolist()
    assert got.tokens.tolist() == expected.tokens.tolist()
    assert got.parents.tolist() == expected.parents.tolist()
    assert got.nodes.tolist() == expected.nodes.tolist()


def assert_step_agrees(
    got: rx.BeamState,
    logits: Tensor,
    state: rx.BeamState,
    index: reference.TrieIndex,
    normalize: str,
    length_penalty: float,
) -> None:
    """``got`` holds the best of all candidates, where a near tie in float64 may fall either way."""
    batch, width = got.scores.shape
    candidates = sum(max(1, len(index.child_nodes[node])) for node in set(state.nodes.flatten().tolist()) if node >= 0)
    every = reference.beam_step(
        logits.double(),
        state,
        index,
        max(width, candidates * state.nodes.shape[1]),
        normalize=normalize,
        length_penalty=length_penalty,
    )
    for query in range(batch):
        expected = _rows(every, query, index, length_penalty)
        rows = _rows(got, query, index, length_penalty)
        score_of = {row[2:]: row[1] for row in expected}
        assert len(rows) == min(width, len(expected))
        assert len({row[2:] for row in rows}) == len(rows)
        assert rows == sorted(rows, key=lambda row: (-row[0], row[2], row[3]))
        assert_values_close([row[1] for row in rows], [score_of[row[2:]] for row in rows], "beam_step")
        assert_values_close([row[0] for row in rows], [row[0] for row in expected[: len(rows)]], "beam_step")
        empty = width - len(rows)
        assert got.scores[query, len(rows) :].tolist() == [-math.inf] * empty
        assert got.parents[query, len(rows) :].tolist() == [0] * empty
        assert got.tokens[query, len(rows) :].tolist() == got.nodes[query, len(rows) :].tolist() == [-1] * empty


def assert_equals_reference(
    beam_step: Callable[..., rx.BeamState], catalogue: Catalogue, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """One step by the kernels from a random state, against the float64 reference."""
    index = rx.TrieIndex.build(**catalogue.arguments())
    plain = reference.TrieIndex.build(**catalogue.arguments())
    batch, width = data.draw(st.sampled_from([(1, 1), (1, 7), (3, 4)]))
    state = random_state(index, batch, width, generator_of(seed))
    logits = (3 * torch.randn(batch, width, catalogue.columns, generator=generator_of(seed))).to(dtype)
    hidden = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    logits[torch.rand(logits.shape, generator=generator_of(seed)) < hidden] = -math.inf
    normalize = data.draw(st.sampled_from([name for name in NORMALIZE if catalogue.vocab or name != "level"]))
    beam_width = data.draw(st.sampled_from([1, 2, 10, 1000]))
    penalty = data.draw(st.sampled_from([0.0, 1.0, -0.7]))
    got = beam_step(logits, state, index, beam_width, normalize=normalize, length_penalty=penalty)
    assert_step_agrees(got, logits, without_dead_slots(state, index), plain, normalize, penalty)


def _rows(
    state: rx.BeamState, query: int, index: reference.TrieIndex, length_penalty: float
) -> list[tuple[float, float, int, int, int]]:
    """(key, score, parent, token, node) of each slot that is not empty; the key in the scores' own precision."""
    nodes = state.nodes[query]
    lengths = torch.tensor([max(1, len(index.prefixes[node])) for node in nodes.tolist()], dtype=torch.float64)
    keys = state.scores[query] / lengths.pow(length_penalty).to(state.scores.dtype)
    columns = (keys, state.scores[query], state.parents[query], state.tokens[query], nodes)
    return [row for row in zip(*(column.tolist() for column in columns), strict=True) if row[1] > -math.inf]


@dataclass
class ToyModel:
    """A model whose state is one small number a beam, carried from call to call by ``parents`` as a KV cache is."""

    tables: Tensor  # [levels, B, states, V] logits
    history: Tensor | None = None  # [B, W] states of the last call

    @classmethod
    def random(cls, levels: int, batch: int, columns: int, dtype: torch.dtype, seed: int) -> ToyModel:
        generator = torch.Generator().manual_seed(seed)
        return cls((3 * torch.randn(levels, batch, 17, columns, generator=generator)).to(dtype))

    @classmethod
    def tied(cls, levels: int, batch: int, columns: int, dtype: torch.dtype, seed: int) -> ToyModel:
        """Seven values and two rows a level, so that scores tie often and exactly."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(-3, 4, (levels, batch, 2, columns), generator=generator) / 2
        return cls(rows.to(dtype)[:, :, torch.arange(17) % 2])

    @staticmethod
    def advance(history: Tensor, tokens: Tensor) -> Tensor:
        return (history * 5 + tokens + 1) % 17

    def __call__(self, tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        if level == 0:
            self.history = torch.zeros_like(tokens)
        else:
            assert self.history is not None
            self.history = self.advance(self.history.gather(1, parents), tokens)
        batch = torch.arange(len(tokens))[:, None]
        return self.tables[level][batch, self.history]

    def brute_force(
        self, catalogue: Catalogue, normalize: str, length_penalty: float
    ) -> list[dict[tuple[int, ...], float]]:
        """The float64 score of every SID for each query, ``{codes: score}``, without a trie."""
        return [
            {sid: sum(logps) / len(logps) ** length_penalty for sid, logps in query.items()}
            for query in self.token_log_probs(catalogue, normalize)
        ]

    def token_log_probs(self, catalogue: Catalogue, normalize: str) -> list[dict[tuple[int, ...], list[float]]]:
        """The float64 log-prob of every token of every SID for each query, ``{codes: log-probs}``, without a trie."""
        tokens = catalogue.tokens()
        followers: dict[tuple[int, ...], set[int]] = {}
        for path in tokens:
            for level, token in enumerate(path):
                followers.setdefault(path[:level], set()).add(token)
        found: list[dict[tuple[int, ...], list[float]]] = []
        for query in range(self.tables.shape[1]):
            found.append({})
            for sid, path in zip(catalogue.codes(), tokens, strict=True):
                history, logps = torch.tensor(0), []
                for level, token in enumerate(path):
                    row = self.tables[level, query, history].double()
                    support = _support(catalogue, normalize, level, followers[path[:level]], len(row))
                    logps.append(float(row[token] - row[support].logsumexp(0)))
                    history = self.advance(history, torch.tensor(token))
                found[-1][sid] = logps
        return found


def _support(catalogue: Catalogue, normalize: str, level: int, followers: set[int], columns: int) -> list[int]:
    if normalize == "vocab":
        return list(range(columns))
    if normalize == "trie":
        return sorted(followers)
    vocab = catalogue.vocab
    assert vocab is not None
    codes = {token for ids in vocab.token_ids[level : level + 1] for token in ids.tolist() if token >= 0}
    return sorted(codes | ({vocab.eos} if vocab.eos is not None and level > 0 else set()))


def assert_search_agrees(
    got: rx.BeamResult, catalogue: Catalogue, scores: list[dict[tuple[int, ...], float]], top_k: int | None
) -> None:
    """``got``, of an exhaustive search, lists the whole catalogue best first (or its ``top_k`` items)."""
    items_of: dict[tuple[int, ...], list[int]] = {}
    for sid, item in zip(catalogue.codes(), catalogue.items(), strict=True):
        items_of.setdefault(sid, []).append(item)
    for query, score_of in enumerate(scores):
        rows = [
            (score, tuple(code for code in sid if code >= 0), item)
            for item, score, sid in zip(*(column[query].tolist() for column in got[:3]), strict=True)
            if item >= 0
        ]
        offered = [item for items in items_of.values() for item in items] if top_k else list(items_of)
        assert len(rows) == min(got.items.shape[1], len(offered))
        assert_values_close([row[0] for row in rows], [score_of[row[1]] for row in rows], "beam_search")
        ranked = sorted((score_of[sid] for sid in items_of for _ in (items_of[sid] if top_k else [0])), reverse=True)
        assert_values_close([row[0] for row in rows], ranked[: len(rows)], "beam_search")
        taken: dict[tuple[int, ...], list[int]] = {}
        for _, sid, item in rows:
            taken.setdefault(sid, []).append(item)
        for sid, items in taken.items():  # first items first
            assert items == items_of[sid][: len(items)]
            assert top_k or len(items) == 1
        assert got.scores[query, len(rows) :].tolist() == [-math.inf] * (got.items.shape[1] - len(rows))
        assert (got.sids[query, len(rows) :] == -1).all()
