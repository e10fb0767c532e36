"""Every operator under ``torch.library.opcheck``, with the very arguments that the public functions pass."""

from __future__ import annotations

import pytest
import torch
from support.operator_calls import OPERATORS, Call, Recorder

import raddpo_ext as rx


def search(index: rx.TrieIndex) -> None:
    """The steps of a search, and what is asked of an index."""
    torch.ops.raddpo.trie_check(index.data, 2)
    state = rx.BeamState.start(index, 2)
    rx.beam_step(torch.randn(2, 1, 6), state, index, 3)
    draws = {"batch_size": 2, "samples": 3, "seed": 0}
    rx.sample_search(lambda tokens, *_: torch.randn(*tokens.shape, 6), index, **draws)
    rx.sample_search(lambda tokens, *_: torch.randn(*tokens.shape, 6), index, **draws, replacement=True)
    hidden, weight = torch.randn(2, 1, 4), torch.randn(6, 4)
    for normalize in ("vocab", "level", "trie"):  # at the root, where every column is a child's: all are written
        rx.linear_beam_step(hidden, weight, state, index, 3, normalize=normalize, level=0)
    nodes = index.nodes(torch.tensor([[0, 3], [1, 2]]))
    index.paths(nodes)
    index.child_ranges(nodes)
    index.item_ranges(nodes)
    index.top_items(nodes, 3)
    index.nodes_at(torch.arange(2))
    index.items_at(torch.arange(2))


def losses(index: rx.TrieIndex) -> None:
    """Log-probs and losses, forward and backward, the packing of their sessions, and codes for items."""
    tokens = torch.tensor([[0, 3], [1, 2], [1, 4]])
    sessions = rx.SessionBatch(tokens, torch.full((3,), 2), torch.tensor([0, 3]), torch.tensor([1]))
    rx.pack_sessions([[1, 2]], sessions)
    for where in ({}, {"normalize": "trie", "index": index, "nodes": index.nodes(tokens)}):
        logps = rx.token_logps(torch.randn(3, 2, 6, requires_grad=True), tokens, **where)
        rx.rad_dpo_loss(logps, sessions, ref_logps=torch.randn(3, 2), sft_weight=0.1).loss.backward()
        hidden, weight = torch.randn(3, 2, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
        logps = rx.linear_token_logps(hidden, weight, tokens, **where)
        rx.multilabel_contrastive_loss(logps.sum(1), sessions).backward()
    x, books = torch.randn(4, 2), rx.sids.Codebooks((torch.randn(2, 2), torch.randn(3, 2)))
    rx.sids.assign_balanced(x, books.levels[0], 2)
    rx.sids.resolve_collisions(torch.tensor([[0, 1], [0, 1], [0, 1], [1, 0]]), x, books)
    rx.legal_mass(torch.randn(3, 2, 6, requires_grad=True), index, index.nodes(tokens)).sum().backward()
    for credit in ("sequence", "siblings", "marginal"):
        rx.group_advantages(torch.randn(3), sessions, credit=credit, weights=torch.rand(3))
    for options in ({}, {"ref_logps": torch.randn(3, 2), "kl_weight": 0.1, "nll_weight": 0.1, "reduction": "none"}):
        logps = torch.randn(3, 2, requires_grad=True)
        rx.policy_loss(logps, sessions, torch.randn(3), **options).loss.sum().backward()
        rx.policy_loss(logps.detach(), sessions, torch.randn(3, 2), old_logps=torch.randn(3, 2), **options)


@pytest.fixture(scope="module")
def calls() -> dict[str, list[Call]]:
    index = rx.TrieIndex.build([[0, 1], [1, 0], [1, 2]], vocab=rx.SIDVocab([2, 3]))
    with Recorder() as recorder:
        for one in (index, index.restrict([0, 2])):
            search(one)
        losses(index)
    return recorder.calls


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, calls: dict[str, list[Call]]) -> None:
    assert name in calls, f"no call of {name} is made here: add one"
    for func, arguments in calls[name]:
        torch.library.opcheck(func, arguments)
