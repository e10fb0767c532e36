"""What searches take: heads that are trained, strided biases, lists of widths for deeper catalogues."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import raddpo_ext as rx

VOCAB = 24


def hidden_states(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
    return torch.randn(*tokens.shape, 8, generator=torch.Generator().manual_seed(level))


@pytest.mark.parametrize("normalize", ["vocab", "level", "trie"])
def test_a_head_that_is_trained(normalize: str) -> None:
    index = rx.TrieIndex.build(torch.cartesian_prod(*[torch.arange(3)] * 2), vocab=rx.SIDVocab([3, 3], offset=5))
    head = torch.nn.Linear(8, VOCAB)
    options = {"batch_size": 2, "beam_width": 4, "normalize": normalize}
    with torch.no_grad():
        expected = rx.beam_search(hidden_states, index, weight=head.weight, bias=head.bias, **options)
    strided = torch.stack([head.bias, head.bias + 1], 1)[:, 0]
    assert not strided.is_contiguous()
    for bias in (head.bias, strided):
        found = rx.beam_search(hidden_states, index, weight=head.weight, bias=bias, **options)
        assert all(map(torch.equal, found[:3], expected[:3]))
        assert not found.scores.requires_grad


@pytest.mark.parametrize("eos", [None, 20])
def test_as_many_widths_as_the_vocabulary_has_levels(eos: int | None) -> None:
    """Where the catalogue is shallower; with ``eos`` its call counts."""
    vocab = rx.SIDVocab([3, 3, 3], offset=5, eos=eos)
    lengths = None if eos is None else [1, 1]
    index = rx.TrieIndex.build([[0, 1, 2], [1, 2, 0]], lengths=lengths, vocab=vocab)
    calls, most = index.levels, 3 + (eos is not None)
    widths = [4, 3, 2, 5][:most]

    def search(widths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        logits = lambda tokens, parents, level: torch.zeros(*tokens.shape, VOCAB)  # noqa: E731
        return rx.beam_search(logits, index, batch_size=1, beam_width=widths)

    expected = search(widths[:calls])
    for size in range(6):
        given = [*widths, 1, 1][:size]
        if calls <= size <= most:
            assert all(map(torch.equal, search(given)[:3], expected[:3]))
        else:
            with pytest.raises(ValueError, match="beam_width must be an integer or have one entry per level"):
                search(given)


def test_level_weights_of_float64() -> None:
    """As a list and as a tensor, to the bit, and as written."""
    weights = [0.1, 0.2, 0.3]
    sessions = rx.SessionBatch(
        torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.full((2,), 3), torch.tensor([0, 2]), torch.tensor([1])
    )
    logps = -torch.eye(3, dtype=torch.float64)[:2]
    for level in range(3):
        row = logps.clone()
        row[0] = -torch.eye(3, dtype=torch.float64)[level]
        found = rx.rad_dpo_loss(row, sessions, level_weights=weights, reduction="sum").sft
        assert found.item() == weights[level]
        given = torch.tensor(weights, dtype=torch.float64)
        assert rx.rad_dpo_loss(row, sessions, level_weights=given, reduction="sum").sft.item() == weights[level]
