"""pack_sessions against a row built candidate by candidate, and its masks, truncation and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import raddpo_ext as rx

PAD = 7


def make_sessions(
    plan: list[list[list[int]]], num_positives: list[int] | None = None, levels: int = 4
) -> rx.SessionBatch:
    """Of each session the token lists of its candidates."""
    rows = [candidate for session in plan for candidate in session]
    tokens = torch.full((len(rows), levels), -1)
    for row, candidate in enumerate(rows):
        tokens[row, : len(candidate)] = torch.tensor(candidate, dtype=torch.int64)
    sizes = torch.tensor([0, *map(len, plan)])
    return rx.SessionBatch(
        tokens,
        torch.tensor([len(row) for row in rows], dtype=torch.int64),
        sizes.cumsum(0),
        torch.tensor([min(1, len(session)) for session in plan], dtype=torch.int64),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[int]], rx.SessionBatch]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, levels = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    codes = draw(st.sampled_from([2, 3, 50]))
    prompts = [rng.integers(0, 90, rng.integers(1, 7)).tolist() for _ in range(count)]
    plan = [
        [rng.integers(0, codes, rng.integers(0, levels + 1)).tolist() for _ in range(rng.integers(0, 7))]
        for _ in range(count)
    ]
    return prompts, make_sessions(plan, levels=levels)


def candidates_of(sessions: rx.SessionBatch, session: int) -> list[tuple[int, list[int]]]:
    rows = range(int(sessions.offsets[session]), int(sessions.offsets[session + 1]))
    return [(row, sessions.tokens[row, : int(sessions.lengths[row])].tolist()) for row in rows]


def chain(packed: rx.PackedSessions, session: int, column: int) -> list[tuple[int, int]]:
    """(position, token) of everything that the column sees, in order."""
    seen = packed.mask()[session, 0, column].nonzero()[:, 0]
    return list(zip(packed.position_ids[session, seen].tolist(), packed.input_ids[session, seen].tolist(), strict=True))


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layout", ["candidates", "trie"])
@given(batch=batches())
@settings(max_examples=40, deadline=None)
def test_every_token_sees_its_own_sequence_and_nothing_else(layout, side, embeddings, batch):
    prompts, sessions = batch
    packed = rx.pack_sessions(
        prompts, sessions, layout=layout, padding_side=side, pad_token_id=PAD, embeddings=embeddings
    )
    width = packed.input_ids.shape[1]
    used = 0
    for session, prompt in enumerate(prompts):
        first = int(packed.prompt_starts[session])
        assert packed.input_ids[session, first : first + len(prompt)].tolist() == prompt
        prefixes, tokens = set(), 0
        for row, sid in candidates_of(sessions, session):
            sequence = list(enumerate(prompt + sid))
            for level in range(sessions.tokens.shape[1]):
                place, column = divmod(int(packed.predictors[row, level]), width)
                assert place == session
                expected = len(prompt) + (level if level < len(sid) else 0)
                assert chain(packed, session, column) == sequence[:expected]
            if embeddings:
                place, column = divmod(int(packed.last_tokens[row]), width)
                assert (place, chain(packed, session, column)) == (session, sequence)
            kept = len(sid) if embeddings else max(len(sid) - 1, 0)
            prefixes |= {tuple(sid[:end]) for end in range(1, kept + 1)}
            tokens += kept
        length = len(prompt) + (len(prefixes) if layout == "trie" else tokens)
        used = max(used, length)
        padding = slice(length, None) if side == "right" else slice(0, width - length)
        assert (packed.input_ids[session, padding] == PAD).all()
        mask = packed.mask()[session, 0]
        assert mask[padding].sum(1).eq(1).all()  # itself
        assert mask.diagonal().all()
        assert first == (0 if side == "right" else width - length)
        assert int(packed.prompt_lengths[session]) == len(prompt)
    assert width == max(used, 1)
    assert torch.equal(packed.distinct[packed.rows], packed.predictors)
    assert len(packed.distinct) == len(set(packed.predictors.flatten().tolist()))
    assert packed.num_truncated == 0
    assert (packed.last_tokens is None) == (not embeddings)


def test_a_trie_holds_each_distinct_prefix_once():
    sessions = make_sessions([[[1, 2, 3], [1, 2, 4], [1, 2, 3], [5], [1]]])
    packed = rx.pack_sessions([[9, 8]], sessions, layout="trie")
    assert packed.input_ids.tolist() == [[9, 8, 1, 2, 3, 4, 5]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 2]]
    assert packed.ends.tolist() == [[7, 7, 6, 6, 5, 6, 7]]
    assert packed.predictors[:, :3].tolist() == [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 1, 1], [1, 1, 1]]
    assert packed.last_tokens.tolist() == [4, 5, 4, 6, 2]


@pytest.mark.parametrize("layout", ["candidates", "trie"])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_what_only_predicts_forced_tokens_is_left_out(layout, seed):
    """A token with siblings is predicted after its whole prefix; nothing is read beyond a candidate's last such one."""
    rng = np.random.default_rng(seed)
    catalogue = rng.integers(0, 3, (rng.integers(1, 12), 4)).tolist()
    prompts = [[9, 8], [7], [9, 8, 7]]
    plan = [[*rng.permutation(catalogue)[:4].tolist(), rng.integers(0, 3, 4).tolist(), []] for _ in prompts]
    sessions = make_sessions(plan)
    index = rx.TrieIndex.build(catalogue)
    packed = rx.pack_sessions(prompts, sessions, layout=layout, embeddings=False, skip_forced=index)
    assert packed.sessions is sessions
    used = 0
    for session, prompt in enumerate(prompts):
        prefixes, tokens = set(), 0
        for row, sid in candidates_of(sessions, session):
            following = [{other[level] for other in catalogue if other[:level] == sid[:level]} for level in range(4)]
            free = [level for level, token in enumerate(sid) if following[level] != {token}]
            kept = max(free, default=0)
            for level in range(4):
                place, column = divmod(int(packed.predictors[row, level]), packed.input_ids.shape[1])
                before = sid[:level] if level <= kept else []
                assert (place, chain(packed, session, column)) == (session, list(enumerate(prompt + before)))
            prefixes |= {tuple(sid[:end]) for end in range(1, kept + 1)}
            tokens += kept
        used = max(used, len(prompt) + (len(prefixes) if layout == "trie" else tokens))
    assert packed.input_ids.shape[1] == used


@given(batch=batches(), layout=st.sampled_from(["candidates", "trie"]))
@settings(max_examples=30, deadline=None)
def test_masks_agree(batch, layout):
    packed = rx.pack_sessions(*batch, layout=layout)
    seen = packed.mask()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        added = packed.mask(dtype)
        assert added.dtype == dtype
        assert torch.equal(added == 0, seen)
        assert (added[~seen] == torch.finfo(dtype).min).all()


def test_the_block_mask_is_the_mask():
    """Its function at every place, and through FlexAttention's own forward."""
    sessions = make_sessions([[[1, 2], [1, 3]], [[4]]])
    packed = rx.pack_sessions([[5, 6, 7], [8]], sessions, layout="trie")
    rows, width = packed.input_ids.shape
    block = packed.block_mask()
    at = [torch.arange(size) for size in (rows, width, width)]
    row, query, key = torch.meshgrid(*at, indexing="ij")
    assert torch.equal(block.mask_mod(row, torch.zeros_like(row), query, key), packed.mask()[:, 0])
    assert block.shape == (rows, 1, width, width)
    query, key, value = torch.randn(3, rows, 2, width, 16).unbind()
    expected = scaled_dot_product_attention(query, key, value, attn_mask=packed.mask())
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=block), expected)


@pytest.mark.parametrize("as_type", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_prompts_of_any_integer_sequence(as_type):
    sessions = make_sessions([[[1]], [[2]]])
    packed = rx.pack_sessions([as_type([3, 4]), as_type([5])], sessions)
    assert packed.input_ids.tolist() == [[3, 4, 1], [5, 2, 0]]


def test_prompts_come_back():
    sessions = make_sessions([[[1, 2]], [[2]], []])
    for side in ("left", "right"):
        packed = rx.pack_sessions([[3, 4], [5], [6, 7, 8]], sessions, padding_side=side)
        ids, mask = packed.prompts()
        assert ids.tolist() == [[3, 4, 0], [5, 0, 0], [6, 7, 8]]
        assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_width_is_a_multiple():
    sessions = make_sessions([[[1, 2]]])
    packed = rx.pack_sessions([[3]], sessions, pad_to_multiple_of=8, padding_side="left")
    assert packed.input_ids.tolist() == [[0, 0, 0, 0, 0, 3, 1, 2]]


def test_long_prompts_lose_their_first_tokens_and_are_counted():
    sessions = make_sessions([[[1, 2], [3]], [[4]], []])
    packed = rx.pack_sessions([[10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33, 34]], sessions, max_length=4)
    assert packed.prompts()[0].tolist() == [[12, 13, 0, 0], [20, 21, 22, 0], [31, 32, 33, 34]]
    assert packed.num_truncated == 2
    assert packed.position_ids.max() == 3
    assert packed.input_ids[0].tolist() == [12, 13, 1, 2, 3]


def test_truncation_keeps_the_history_s_sids_whole():
    vocab = rx.SIDVocab([4, 4], offset=10)  # level 0: tokens 10 to 13
    sessions = make_sessions([[[10, 14]], [[10, 14]], [[10, 14]]], levels=2)
    prompts = [[1, 10, 14, 11, 15, 12, 16], [10, 14], [1, 14, 14, 14, 14, 14]]
    packed = rx.pack_sessions(prompts, sessions, max_length=5, vocab=vocab)
    ids, mask = packed.prompts()
    assert ids.tolist() == [[12, 16, 0], [10, 14, 0], [14, 14, 14]]
    assert mask.sum(1).tolist() == [2, 2, 3]
    assert packed.num_truncated == 2
    whole = rx.pack_sessions(prompts[:1], make_sessions([[[10, 14]]], levels=2), max_length=6, vocab=vocab)
    assert whole.prompts()[0].tolist() == [[11, 15, 12, 16]]


def test_states_are_read_from_their_places():
    sessions = make_sessions([[[1, 2], [3]], [[4]]], levels=2)
    packed = rx.pack_sessions([[5, 6], [7]], sessions)
    states = torch.arange(2 * packed.input_ids.shape[1], dtype=torch.float32).view(2, -1, 1)
    assert packed.hidden(states)[..., 0].tolist() == [[1, 2], [1, 1], [5, 5]]
    assert packed.distinct_hidden(states)[:, 0].tolist() == [1, 2, 5]
    assert torch.equal(packed.distinct_hidden(states)[packed.rows], packed.hidden(states))
    assert packed.embeddings(states)[:, 0].tolist() == [3, 4, 6]
    with pytest.raises(ValueError, match=r"states must have shape \[S, T, H\] with \[S, T\] = \(2, 5\)"):
        packed.hidden(states[:1])
    with pytest.raises(ValueError, match="embeddings=True"):
        rx.pack_sessions([[5, 6], [7]], sessions, embeddings=False).embeddings(states)


def test_to_moves_every_tensor():
    packed = rx.pack_sessions([[5]], make_sessions([[[1]]]), max_length=4)
    moved = packed.to("meta")
    assert all(value.device.type == "meta" for value in vars(moved).values() if isinstance(value, Tensor))
    assert moved.sessions.device.type == "meta"
    assert moved.num_truncated == packed.num_truncated


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": [[1]]}, ValueError, r"prompts must have one entry per session \(2\), got 1"),
        ({"prompts": [[1], []]}, ValueError, r"prompts\[1\] must have at least one token"),
        ({"prompts": [[1], [2, -3]]}, ValueError, r"prompts\[1\]\[1\] must be at least 0, got -3"),
        ({"prompts": [[1], [2.5]]}, TypeError, r"prompts\[1\] must hold integers"),
        ({"prompts": [[1], ["a"]]}, TypeError, r"prompts\[1\]"),
        ({"prompts": [[1], 5]}, TypeError, r"prompts\[1\]"),
        ({"prompts": [[1], [[2]]]}, TypeError, r"prompts\[1\]"),
        ({"prompts": "ab"}, TypeError, "prompts must be a sequence of sequences"),
        ({"prompts": torch.ones(2, 2)}, TypeError, "prompts must be a sequence of sequences"),
        ({"sessions": None}, TypeError, "sessions must be a SessionBatch"),
        ({"layout": "replicated"}, ValueError, "layout must be one of 'candidates', 'trie', got 'replicated'"),
        ({"padding_side": "up"}, ValueError, "padding_side must be one of 'right', 'left', got 'up'"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id must be at least 0, got -1"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be at least 1, got 0"),
        ({"max_length": 2}, ValueError, r"max_length = 2 leaves prompts\[0\] no token beside a candidate of 2 tokens"),
        ({"max_length": 4.0}, TypeError, "max_length must be an integer"),
        ({"vocab": 3}, TypeError, "vocab must be a SIDVocab"),
        ({"skip_forced": 3}, TypeError, "skip_forced must be a TrieIndex"),
        ({"skip_forced": rx.TrieIndex.build([[1, 2]])}, ValueError, "skip_forced needs embeddings=False"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"prompts": [[1, 2], [3]], "sessions": make_sessions([[[1, 2]], [[3]]])} | change
    with pytest.raises(error, match=message):
        rx.pack_sessions(**arguments)


def test_only_on_the_cpu():
    with pytest.raises(ValueError, match="sessions must be on the CPU"):
        rx.pack_sessions([[1]], make_sessions([[[1]]]).to("meta"))


def test_the_op_refuses_a_prompt_outside_of_prompts():
    sessions = make_sessions([[[1, 2]], [[3]]])
    lengths = torch.tensor([2, 1])
    tensors = (torch.tensor([5, 6, 7]), torch.tensor([0, 2]), lengths, sessions.tokens, sessions.lengths)
    with pytest.raises(RuntimeError, match="prompt 1 is empty or outside of prompts"):
        torch.ops.raddpo.pack_sessions(
            tensors[0], tensors[1], lengths + 1, *tensors[3:], sessions.offsets, True, True, False, 0, 1
        )
