"""merge_beams: parts of a catalogue searched by themselves, against one search over all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import raddpo_ext as rx

QUERIES, ITEMS = 3, 60
VOCAB = rx.SIDVocab([5, 4, 6], offset=2, eos=1)


def search(rows: Tensor, seed: int, **options: Any) -> rx.BeamResult:
    """Of some items of a random catalogue, whose SIDs have 1 to 3 codes and are sometimes shared; none is dropped."""
    generator = torch.Generator().manual_seed(seed)
    sids = torch.stack([torch.randint(size, (ITEMS,), generator=generator) for size in VOCAB.sizes], 1)
    lengths = torch.randint(1, 4, (ITEMS,), generator=generator)
    table = torch.randn(QUERIES, 17, VOCAB.levels + 1, 17, generator=generator)
    rows = torch.arange(ITEMS)[torch.isin(sids[:, 0], rows)]
    index = rx.TrieIndex.build(sids[rows], lengths=lengths[rows], vocab=VOCAB, item_ids=rows + 100)

    def step_fn(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        return table[torch.arange(QUERIES)[:, None], tokens.clamp(min=0), level]

    return rx.beam_search(step_fn, index, batch_size=QUERIES, beam_width=ITEMS, **options)


@pytest.mark.parametrize("normalize", ["vocab", "level"])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_equals_one_search(seed: int, parts: int, normalize: str) -> None:
    options: dict[str, Any] = {"normalize": normalize, "length_penalty": 0.5 * seed, "return_token_logps": seed != 1}
    found = [search(codes, seed, top_k=ITEMS, **options) for codes in torch.arange(5).chunk(parts)]
    for top_k in (7, ITEMS):
        merged, expected = rx.merge_beams(found, top_k), search(torch.arange(5), seed, top_k=top_k, **options)
        assert torch.equal(merged.scores, expected.scores)
        assert torch.equal(merged.items, expected.items)
        assert torch.equal(merged.sids, expected.sids)
        assert (merged.token_logps is None) == (seed == 1)
        if merged.token_logps is not None:
            assert torch.equal(merged.token_logps, expected.token_logps)
    assert torch.equal(rx.merge_beams(found).items, rx.merge_beams(found, ITEMS).items)


def result(items: list[list[int]], scores: list[list[float]], levels: int = 1, logps: bool = False) -> rx.BeamResult:
    sids = torch.tensor(items)[..., None].expand(-1, -1, levels).contiguous()
    return rx.BeamResult(torch.tensor(items), torch.tensor(scores), sids, sids.float() if logps else None)


def test_parts_of_other_sizes() -> None:
    """Fewer levels are padded, empty rows come last, equal scores keep the order of the parts."""
    one, other = result([[1, 2, -1]], [[-1.0, -3.0, -torch.inf]], 2, True), result([[3]], [[-1.0]], 3, True)
    merged = rx.merge_beams([one, other], 6)
    assert merged.items.tolist() == [[1, 3, 2, -1, -1, -1]]
    assert merged.scores.tolist() == [[-1.0, -1.0, -3.0, *[-torch.inf] * 3]]
    assert merged.sids.tolist() == [[[1, 1, -1], [3, 3, 3], [2, 2, -1], *[[-1, -1, -1]] * 3]]
    assert merged.token_logps is not None
    assert merged.token_logps[0, :3].tolist() == [[1, 1, 0], [3, 3, 3], [2, 2, 0]]
    assert rx.merge_beams([other, one]).items.tolist() == [[3, 1, 2]]


BAD: list[tuple[Any, Any, type[Exception], str]] = [
    ([], None, ValueError, "parts must hold at least one result, got none"),
    ([1], None, TypeError, r"parts\[0\] must be a BeamResult"),
    (
        [result([[1]], [[0.0]]), result([[1], [2]], [[0.0], [0.0]])],
        None,
        ValueError,
        r"parts\[1\] .* 1 queries .* got 2",
    ),
    ([result([[1]], [[0.0]], logps=True), result([[1]], [[0.0]])], None, ValueError, r"parts\[1\].token_logps must be"),
    ([result([[1, 2]], [[0.0]])], None, ValueError, r"parts\[0\].scores must have the \(1, 2\) queries and rows"),
    ([result([[1]], [[0.0]])._replace(sids=torch.zeros(1, 1))], None, ValueError, r"parts\[0\].sids must have"),
    ([result([[1]], [[torch.nan]])], None, ValueError, r"parts\[0\].scores must not hold NaN"),
    ([result([[1]], [[0.0]])], 0, ValueError, "top_k must be"),
    ([result([[1]], [[0.0]])], 1.5, TypeError, "top_k must be"),
]


@pytest.mark.parametrize(("parts", "top_k", "error", "message"), BAD)
def test_bad_input(parts: Any, top_k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rx.merge_beams(parts, top_k)
