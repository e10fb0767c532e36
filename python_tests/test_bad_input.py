"""What each public function refuses, and that the message names the argument and the value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import raddpo_ext as rx
from raddpo_ext import _C

Case = tuple[str, Callable[[], object], type[Exception], str]

CODES = [[0, 1], [1, 0], [2, 2]]
VOCAB = rx.SIDVocab([3, 3], eos=6)
INDEX = rx.TrieIndex.build(CODES)
WIDER = rx.TrieIndex.build([[0, 99], [3, 50]])  # three columns do for level 0 only
STATE = rx.BeamState.start(INDEX, 1)
LOGITS = torch.zeros(1, 1, 3)


def build(sids: object = CODES, **arguments: object) -> Callable[[], object]:
    return lambda: rx.TrieIndex.build(sids, **arguments)


def vocab(*positional: object, **arguments: object) -> Callable[[], object]:
    return lambda: rx.SIDVocab(*positional, **arguments)


def step(
    logits: object = LOGITS, state: object = STATE, index: object = INDEX, beam_width: object = 2, **arguments: object
) -> Callable[[], object]:
    return lambda: rx.beam_step(logits, state, index, beam_width, **arguments)


def search(step_fn: object = None, index: rx.TrieIndex = INDEX, **arguments: object) -> Callable[[], object]:
    def zeros(tokens: Tensor, parents: Tensor, level: int) -> Tensor:
        return torch.zeros(*tokens.shape, 3)

    return lambda: rx.beam_search(step_fn or zeros, index, **({"batch_size": 1, "beam_width": 2} | arguments))


def state(**parts: Tensor) -> rx.BeamState:
    return rx.BeamState(**(vars(STATE) | parts))


BUILD: list[Case] = [
    ("no rows", build(np.zeros((0, 3), np.int64)), ValueError, "sids must hold at least one SID of one code, got"),
    ("no columns", build(np.zeros((3, 0), np.int64)), ValueError, "sids must hold at least one SID of one code, got"),
    ("negative code", build([[0, 1], [2, -7]]), ValueError, "sids[1, 1] = -7 is outside [0, "),
    ("negative int8", build(np.array([[0], [-1]], np.int8)), ValueError, "sids[1, 0] = -1 is outside [0, "),
    ("code of 2^31 - 1", build([[2**31 - 1]]), ValueError, "sids[0, 0] = 2147483647 is outside [0, 2147483647)"),
    ("huge uint64", build(np.array([[2**63]], np.uint64)), ValueError, "sids[0, 0] = 9223372036854775808 is outside"),
    ("code K", build([[0, 3]], vocab=VOCAB), ValueError, "sids[0, 1] = 3 is outside [0, 3)"),
    (
        "code without token",
        build([[0], [1]], vocab=rx.SIDVocab([2], token_ids=[[4, -1]])),
        ValueError,
        "sids[1, 0] = 1 has no token in vocab.token_ids[0]",
    ),
    ("float", build([[0.0, 1.0]]), TypeError, "sids must hold integers, got float64"),
    ("bool", build(torch.ones(2, 2, dtype=torch.bool)), TypeError, "sids must hold integers, got"),
    ("bfloat16", build(torch.ones(2, 2, dtype=torch.bfloat16)), TypeError, "sids must hold integers, got"),
    ("text", build([["a", "b"]]), TypeError, "sids must hold integers, got"),
    ("ragged", build([[0, 1], [2]]), ValueError, "sids"),
    ("one dimension", build([0, 1]), ValueError, "sids must have 2 dimensions, got shape (2,)"),
    (
        "33 levels",
        build(np.zeros((2, 33), np.int64)),
        ValueError,
        "sids must have at most 32 levels, got shape (2, 33)",
    ),
    (
        "32 levels and eos",
        build(np.zeros((2, 32), np.int64), vocab=rx.SIDVocab([1] * 32, eos=99)),
        ValueError,
        "sids must have at most 31 levels",
    ),
    (
        "columns",
        build([[0]], vocab=VOCAB),
        ValueError,
        "sids must have one column per level of vocab (2), got shape (1, 1)",
    ),
    ("no vocab", build(vocab=[3, 3]), TypeError, "vocab must be a SIDVocab, got list"),
    ("length 0", build(lengths=[1, 0, 2]), ValueError, "lengths[1] = 0 is outside [1, 2]"),
    ("length L + 1", build(lengths=[1, 3, 2]), ValueError, "lengths[1] = 3 is outside [1, 2]"),
    ("lengths' number", build(lengths=[2, 2]), ValueError, "lengths must have one entry per row of sids (3), got 2"),
    ("float lengths", build(lengths=[2.0, 2.0, 2.0]), TypeError, "lengths must hold integers, got"),
    ("item -1", build(item_ids=[4, -1, 5]), ValueError, "item_ids[1] = -1 is negative"),
    ("item 2^63", build(item_ids=np.array([0, 2**63, 1], np.uint64)), ValueError, "item_ids[1] = 9223372036854775808"),
    ("items' number", build(item_ids=[4]), ValueError, "item_ids must have one entry per row of sids (3), got 1"),
    ("item twice", build(item_ids=[4, 9, 4]), ValueError, "item_ids[0] and item_ids[2] are both 4"),
    ("float items", build(item_ids=[4.0, 9.0, 5.0]), TypeError, "item_ids must hold integers, got float64"),
    (
        "prefix",
        build([[3, 1, 4], [2, 0, 0], [3, 1, 9]], lengths=[3, 1, 2]),
        ValueError,
        "sids[2] = (3, 1) is a proper prefix of sids[0] = (3, 1, 4); a vocab with eos tells them apart",
    ),
]

VOCABULARY: list[Case] = [
    ("no levels", vocab([]), ValueError, "sizes must name at least one level"),
    ("size 0", vocab([3, 0]), ValueError, "sizes[1] must be at least 1, got 0"),
    ("float size", vocab([3.0]), TypeError, "sizes[0] must be an integer, got 3.0"),
    ("one size", vocab(3), TypeError, "sizes"),
    ("negative offset", vocab([3], offset=-1), ValueError, "offset must be at least 0, got -1"),
    ("offsets' number", vocab([3, 3], offsets=[1]), ValueError, "offsets must have one entry per level (2), got 1"),
    ("negative offsets", vocab([3, 3], offsets=[1, -2]), ValueError, "offsets[1] must be at least 0, got -2"),
    (
        "both",
        vocab([3], offsets=[1], token_ids=[[1, 2, 3]]),
        ValueError,
        "give only one of offsets, offset and token_ids",
    ),
    ("eos is a code", vocab([3], eos=2), ValueError, "eos = 2 is also the token of a code of level 0"),
    ("eos -1", vocab([3], eos=-1), ValueError, "eos must be at least 0, got -1"),
    ("tables", vocab([3, 3], token_ids=[[0, 1, 2]]), ValueError, "token_ids must have one entry per level (2), got 1"),
    ("table's size", vocab([3], token_ids=[[0, 1]]), ValueError, "token_ids[0] must have shape (3,), got (2,)"),
    ("token -2", vocab([2], token_ids=[[0, -2]]), ValueError, "token_ids[0] must be >= 0, or -1 for no token, got -2"),
    (
        "token twice",
        vocab([3], token_ids=[[7, 1, 7]]),
        ValueError,
        "token_ids[0] must hold distinct token ids, got 7 twice",
    ),
    (
        "no token",
        vocab([2], token_ids=[[-1, -1]]),
        ValueError,
        "token_ids[0] must hold at least one token id, got only -1",
    ),
    ("float tokens", vocab([2], token_ids=[[0.5, 1.5]]), TypeError, "token_ids[0] must hold integers"),
    ("token 2^31 - 1", vocab([1], offset=2**31 - 1), ValueError, "token ids must be below 2**31 - 1, got 2147483647"),
    ("encode K", lambda: VOCAB.encode([[0, 3]]), ValueError, "sids[0, 1] = 3 is outside [0, 3)"),
    ("encode -1", lambda: VOCAB.encode([[-1, 0]]), ValueError, "sids[0, 0] = -1 is outside [0, 3)"),
    ("encode wide", lambda: VOCAB.encode([[0, 0, 0]]), ValueError, "sids must have at most 2 levels, got shape (1, 3)"),
    (
        "encode gap",
        lambda: rx.SIDVocab([2], token_ids=[[5, -1]]).encode([[1]]),
        ValueError,
        "sids[0, 0] = 1 has no token in vocab.token_ids[0]",
    ),
    ("encode lengths", lambda: VOCAB.encode(CODES, [0, 3, 1]), ValueError, "lengths[1] = 3 is outside [0, 2]"),
]

LOOKUPS: list[Case] = [
    ("lookup float", lambda: INDEX.lookup([[0.5, 1]]), TypeError, "sids must hold integers, got float64"),
    ("lookup dim", lambda: INDEX.lookup([0, 1]), ValueError, "sids must have 2 dimensions, got shape (2,)"),
    ("contains lengths", lambda: INDEX.contains(CODES, [1, 2]), ValueError, "lengths must have one entry per row"),
    ("contains length", lambda: INDEX.contains(CODES, [1, 2, 3]), ValueError, "lengths[2] = 3 is outside [0, 2]"),
    ("nodes float", lambda: INDEX.nodes(torch.zeros(1, 2)), TypeError, "tokens must hold integers, got torch.float32"),
    ("nodes dim", lambda: INDEX.nodes(torch.arange(2)), ValueError, "tokens must have 2 dimensions, got shape (2,)"),
    (
        "paths int32",
        lambda: INDEX.paths(torch.zeros(2).int()),
        TypeError,
        "nodes must be an int64 tensor, got torch.int32",
    ),
    ("items int32", lambda: INDEX.item_ranges(torch.zeros(2).int()), TypeError, "nodes must be an int64 tensor"),
]

STEP: list[Case] = [
    ("float64", step(LOGITS.double()), TypeError, "logits must be a float32, bfloat16 or float16 tensor, got torch.f"),
    (
        "integers",
        step(LOGITS.int()),
        TypeError,
        "logits must be a float32, bfloat16 or float16 tensor, got torch.int32",
    ),
    ("array", step(LOGITS.numpy()), TypeError, "logits must be a float32, bfloat16 or float16 tensor, got ndarray"),
    (
        "two dimensions",
        step(LOGITS[0]),
        ValueError,
        "logits must have shape [B, W, V] with [B, W] = (1, 1), the state's",
    ),
    ("other beams", step(torch.zeros(1, 2, 3)), ValueError, "the state's, got (1, 2, 3)"),
    ("other batch", step(torch.zeros(2, 1, 3)), ValueError, "the state's, got (2, 1, 3)"),
    ("small V", step(torch.zeros(1, 1, 2)), ValueError, "logits of level 0 must have more than 2 columns"),
    (
        "small V later",
        lambda: rx.beam_step(
            torch.zeros(1, 2, 3), state(nodes=torch.tensor([[1, 2]]), scores=torch.zeros(1, 2)), WIDER, 2
        ),
        ValueError,
        "logits of level 1 must have more than 99 columns, the level's largest token id, got shape (1, 2, 3)",
    ),
    ("width 0", step(beam_width=0), ValueError, "beam_width must be at least 1, got 0"),
    ("width 1.5", step(beam_width=1.5), TypeError, "beam_width must be an integer, got 1.5"),
    ("normalize", step(normalize="row"), ValueError, "normalize must be one of 'vocab', 'level', 'trie', got 'row'"),
    (
        "level without vocab",
        step(normalize="level"),
        ValueError,
        "normalize = 'level' needs an index built with a vocab",
    ),
    ("penalty nan", step(length_penalty=math.nan), ValueError, "length_penalty must be finite, got nan"),
    ("penalty inf", step(length_penalty=-math.inf), ValueError, "length_penalty must be finite, got -inf"),
    ("penalty text", step(length_penalty="1"), TypeError, "length_penalty must be a number, got '1'"),
    ("no state", step(state=None), TypeError, "state must be a BeamState, got NoneType"),
    ("no index", step(index=CODES), TypeError, "index must be a TrieIndex, got list"),
    (
        "float64 scores",
        step(state=state(scores=STATE.scores.double())),
        TypeError,
        "state must hold float32 scores and",
    ),
    (
        "int32 nodes",
        step(state=state(nodes=STATE.nodes.int())),
        TypeError,
        "state must hold float32 scores and int64 nodes",
    ),
    (
        "scores' shape",
        step(state=state(scores=torch.zeros(1, 2))),
        ValueError,
        "state.scores must have shape (1, 1), got (1, 2)",
    ),
    (
        "meta logits",
        step(LOGITS.to("meta")),
        ValueError,
        "logits, state and index must be on one device, got meta, cpu",
    ),
    ("meta nodes", step(state=state(nodes=STATE.nodes.to("meta"))), ValueError, "must be on one device, got cpu, meta"),
    ("meta scores", step(state=state(scores=STATE.scores.to("meta"))), ValueError, "must be on one device, got"),
    ("NaN, checked", step(LOGITS + math.nan, check=True), ValueError, "logits[0, 0] holds NaN"),
    (
        "node, checked",
        step(state=state(nodes=STATE.nodes + 99), check=True),
        ValueError,
        "state.nodes[0, 0] must be in [-1, 7), the nodes of the index, got 99",
    ),
    ("batch -1", lambda: rx.BeamState.start(INDEX, -1), ValueError, "batch_size must be at least 0, got -1"),
]

SEARCH: list[Case] = [
    (
        "widths' number",
        search(beam_width=[2]),
        ValueError,
        "beam_width must be an integer or have one entry per level (2), got [2]",
    ),
    ("width 0", search(beam_width=[2, 0]), ValueError, "beam_width[1] must be at least 1, got 0"),
    ("float width", search(beam_width=2.0), TypeError, "beam_width must be an integer, got 2.0"),
    ("batch", search(batch_size=-2), ValueError, "batch_size must be at least 0, got -2"),
    ("top_k", search(top_k=0), ValueError, "top_k must be at least 1, got 0"),
    ("float top_k", search(top_k=1.0), TypeError, "top_k must be an integer, got 1.0"),
    (
        "nothing",
        search(lambda tokens, parents, level: None),
        TypeError,
        "logits must be a float32, bfloat16 or float16",
    ),
    ("small V", search(index=WIDER), ValueError, "logits of level 0 must have more than 3 columns"),
    ("penalty", search(length_penalty=math.nan), ValueError, "length_penalty must be finite, got nan"),
    (
        "last step",
        search(lambda t, p, level: torch.zeros(1, 1, 3)),
        ValueError,
        "[B, W] = (1, 2), the state's, got (1, 1",
    ),
]

ISA: list[Case] = [
    ("isa", lambda: _C.set_isa("sse9"), ValueError, "isa must be an instruction set this CPU has"),
]

GROUPS = {"build": BUILD, "vocab": VOCABULARY, "lookups": LOOKUPS, "step": STEP, "search": SEARCH, "isa": ISA}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [pytest.param(*case[1:], id=f"{group}: {case[0]}") for group, cases in GROUPS.items() for case in cases],
)
def test_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_check_does_not_read_what_is_ignored() -> None:
    """The logits of finished and empty slots may hold anything, also under ``check``."""
    index = rx.TrieIndex.build([[0, 0], [1, 0]], lengths=[1, 2])
    scores, nodes = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[1, 2, -1]])
    logits = torch.tensor([[[math.nan] * 2, [0.0, 0.0], [math.nan] * 2]])
    got = rx.beam_step(logits, rx.BeamState(scores, nodes, nodes, nodes), index, 2, check=True)
    assert got.nodes.tolist() == [[1, 3]]


def test_empty_results_are_documented_results() -> None:
    """Nothing to find is no error: SIDs and prefixes that do not exist, a batch of none."""
    assert INDEX.contains([[5, 5], [-1, 0], [2**40, 0]]).tolist() == [False] * 3
    assert INDEX.contains(np.array([[2**64 - 1, 0]], np.uint64)).tolist() == [False]
    assert INDEX.children([7]).tolist() == []
    assert INDEX.nodes(torch.tensor([[-1, 0], [2**40, -(2**40)]])).tolist() == [[0, -1], [0, -1]]
    assert rx.BeamState.start(INDEX, 0).nodes.shape == (0, 1)
