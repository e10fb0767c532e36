"""What token_logps and linear_token_logps refuse: each argument and its value named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import raddpo_ext as rx

VOCAB = rx.SIDVocab([3, 2])
INDEX = rx.TrieIndex.build([[0, 1], [2, 0]], vocab=VOCAB)
SIDS = torch.tensor([[0, 4], [2, 3]])
NODES = INDEX.nodes(SIDS)
META = torch.device("meta")
LEVEL: dict[str, Any] = {"normalize": "level", "vocab": VOCAB}
TRIE: dict[str, Any] = {"normalize": "trie", "index": INDEX, "nodes": NODES}

# Of both functions: what is changed, and what the error says.
SHARED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"targets": SIDS.int()}, TypeError, "targets must be an int64 tensor, got torch.int32"),
    ({"targets": [[0, 4], [2, 3]]}, TypeError, "targets must be an int64 tensor, got list"),
    ({"targets": SIDS[0]}, ValueError, r"targets must have the shape .* \(2, 2\), got \(2,\)"),
    ({"targets": SIDS.to(META)}, ValueError, "targets must be on the device of .*, cpu, got meta"),
    ({"targets": torch.tensor([[0, 1], [2, 7]])}, ValueError, r"targets\[1, 1\] = 7 is outside \[0, 7\)"),
    ({"targets": torch.tensor([[-1, 1], [2, 7]])}, ValueError, r"targets\[0, 0\] = -1 is outside \[0, 7\)"),
    ({"targets": torch.tensor([[1, 2**40], [2, 7]])}, ValueError, r"targets\[0, 1\] = 1099511627776 is outside"),
    ({"targets": SIDS - 100, "check": True}, ValueError, r"targets\[0, 1\] = -96 is outside"),
    ({"targets": SIDS + 3, **LEVEL}, ValueError, r"targets\[0, 1\] = 7 is outside \[0, 7\)"),
    ({"targets": SIDS + 3, **TRIE}, ValueError, r"targets\[0, 1\] = 7 is outside \[0, 7\)"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be positive, got -1"),
    ({"temperature": math.nan}, ValueError, "temperature must be finite, got nan"),
    ({"temperature": math.inf}, ValueError, "temperature must be finite, got inf"),
    ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be positive, got 0.0"),
    ({"logit_softcap": -math.inf}, ValueError, "logit_softcap must be finite, got -inf"),
    ({"logit_softcap": torch.ones(2)}, TypeError, "logit_softcap must be a number, got tensor"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
    ({"normalize": "levels"}, ValueError, "normalize must be one of 'vocab', 'level', 'trie', got 'levels'"),
    ({"normalize": "level"}, ValueError, "normalize = 'level' needs vocab"),
    ({**LEVEL, "vocab": [3, 2]}, TypeError, "vocab must be a SIDVocab, got list"),
    ({**LEVEL, "vocab": rx.SIDVocab([3, 2], offset=3)}, ValueError, "vocab has token 7, beyond the 7 columns"),
    ({**LEVEL, "vocab": rx.SIDVocab([3, 2], eos=9)}, ValueError, "vocab has token 9, beyond the 7 columns"),
    ({**LEVEL, "levels": torch.tensor([0.0, 1.0])}, TypeError, "levels must be an int64 tensor, got torch.float32"),
    ({**LEVEL, "levels": [0, 1]}, TypeError, r"levels must be an int64 tensor, got list"),
    ({**LEVEL, "levels": torch.tensor([0, 1], device=META)}, ValueError, "levels must be on the device of targets"),
    ({**LEVEL, "levels": torch.tensor([0, 1, 1])}, ValueError, r"levels must broadcast .* \(2, 2\), got \(3,\)"),
    ({**LEVEL, "levels": torch.zeros(3, 2, 2).long()}, ValueError, r"levels must broadcast .*, got \(3, 2, 2\)"),
    ({**LEVEL, "levels": torch.tensor([0, 2])}, ValueError, r"levels hold 2, outside \[0, 2\), the levels of vocab"),
    ({**LEVEL, "levels": torch.tensor([-1, 1])}, ValueError, r"levels hold -1, outside \[0, 2\)"),
    ({**LEVEL, "vocab": rx.SIDVocab([3])}, ValueError, r"levels hold 1, outside \[0, 1\)"),
    ({"normalize": "trie", "nodes": NODES}, ValueError, "normalize = 'trie' needs index"),
    ({"normalize": "trie", "index": INDEX}, ValueError, "normalize = 'trie' needs nodes"),
    ({**TRIE, "index": VOCAB}, TypeError, "index must be a TrieIndex, got SIDVocab"),
    ({**TRIE, "index": rx.TrieIndex.build([[7, 0]])}, ValueError, "index has token 7, beyond the 7 columns"),
    ({**TRIE, "nodes": NODES.int()}, TypeError, "nodes must be an int64 tensor, got torch.int32"),
    ({**TRIE, "nodes": None}, ValueError, "normalize = 'trie' needs nodes"),
    ({**TRIE, "nodes": NODES[0]}, ValueError, r"nodes must have the shape of targets, \(2, 2\), got \(2,\)"),
    ({**TRIE, "nodes": NODES.to(META)}, ValueError, "targets, nodes and index must be on one device, got cpu, meta"),
    ({**TRIE, "nodes": NODES - 2}, ValueError, r"nodes must be in \[-1, 5\), got -2"),
    ({**TRIE, "nodes": NODES + 4}, ValueError, r"nodes must be in \[-1, 5\), got 5"),
]
LOGITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": [[0.0]]}, TypeError, "logits must be a float32, .* tensor, got list"),
    ({"logits": torch.zeros(2, 2, 7).int()}, TypeError, "logits must be .*, got torch.int32"),
    ({"logits": torch.zeros(2, 2, 7, dtype=torch.complex64)}, TypeError, "logits must be .*, got torch.complex64"),
    ({"logits": torch.tensor(1.0)}, ValueError, r"logits must have shape \[..., V\] with V >= 1, got \(\)"),
    ({"logits": torch.zeros(2, 2, 0)}, ValueError, r"logits must have shape .*, got \(2, 2, 0\)"),
    ({"logits": torch.full((2, 2, 7), math.nan), "check": True}, ValueError, r"logits hold NaN, first at \[0, 0, 0\]"),
]
NAN = torch.tensor([0.0, math.nan])
SHARD = torch.zeros(0)
SHARD.ds_id = 3  # as DeepSpeed marks it
LINEAR: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": torch.zeros(2, 2, 2).int()}, TypeError, "hidden must be a float32, .*, got torch.int32"),
    ({"hidden": None}, TypeError, "hidden must be .*, got NoneType"),
    ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden must have at least one dimension, got shape \(\)"),
    ({"weight": None}, TypeError, "weight must be .*, got NoneType"),
    ({"weight": torch.zeros(7, 2).long()}, TypeError, "weight must be .*, got torch.int64"),
    ({"weight": torch.zeros(7)}, ValueError, r"weight must have 2 dimensions, got shape \(7,\)"),
    ({"weight": torch.zeros(7, 3)}, ValueError, r"weight must have one column .* \(2\), got shape \(7, 3\)"),
    ({"weight": torch.zeros(0, 2)}, ValueError, r"weight must have shape \[V, H\] with V, H >= 1, got \(0, 2\)"),
    ({"weight": torch.zeros(7, 0), "hidden": torch.zeros(2, 2, 0)}, ValueError, r"V, H >= 1, got \(7, 0\)"),
    ({"weight": torch.zeros(7, 2, device=META)}, ValueError, "weight must be on the device of hidden, cpu, got meta"),
    ({"weight": torch.zeros(7, 2).bfloat16()}, TypeError, "weight must have the dtype of hidden, torch.float32, got t"),
    ({"weight": SHARD}, ValueError, "weight is a DeepSpeed ZeRO-3 shard; gather it"),
    ({"bias": SHARD}, ValueError, "bias is a DeepSpeed ZeRO-3 shard; gather it"),
    ({"bias": [0.0] * 7}, TypeError, "bias must be .*, got list"),
    ({"bias": torch.zeros(7, 1)}, ValueError, r"bias must have 1 dimensions, got shape \(7, 1\)"),
    ({"bias": torch.zeros(6)}, ValueError, r"bias must have one entry per row of weight \(7\), got shape \(6,\)"),
    ({"bias": torch.zeros(7).double()}, TypeError, "bias must have the dtype of hidden, torch.float32, got torch.f"),
    ({"bias": torch.zeros(7, device=META)}, ValueError, "bias must be on the device of hidden, cpu, got meta"),
    ({"logits_budget": -1}, ValueError, "logits_budget must be at least 0, got -1"),
    ({"logits_budget": 1e9}, TypeError, "logits_budget must be an integer, got 1000000000.0"),
    ({"hidden": NAN.expand(2, 2, 2), "check": True}, ValueError, r"hidden holds NaN, first at \[0, 0, 1\]"),
    ({"weight": NAN.expand(7, 2), "check": True}, ValueError, r"weight holds NaN, first at \[0, 1\]"),
    ({"bias": torch.full((7,), math.nan), "check": True}, ValueError, r"bias holds NaN, first at \[0\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), SHARED + LOGITS)
def test_token_logps_names_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.zeros(2, 2, 7), "targets": SIDS} | change
    with pytest.raises(error, match=message):
        rx.token_logps(**arguments)


@pytest.mark.parametrize(("change", "error", "message"), SHARED + LINEAR)
def test_linear_token_logps_names_what_is_wrong(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"hidden": torch.zeros(2, 2, 2), "weight": torch.zeros(7, 2), "targets": SIDS} | change
    with pytest.raises(error, match=message):
        rx.linear_token_logps(**arguments)


def test_a_target_without_dimensions_needs_levels() -> None:
    target = torch.tensor(1)
    with pytest.raises(ValueError, match="levels must be given for a target without dimensions"):
        rx.token_logps(torch.zeros(7), target, **LEVEL)
    with pytest.raises(ValueError, match="levels must be given for a target without dimensions"):
        rx.linear_token_logps(torch.zeros(2), torch.zeros(7, 2), target, **LEVEL)


def test_what_is_ignored_may_be_wrong() -> None:
    """An ignored target is not looked up: its level need not exist, and its place in the row not either."""
    targets = torch.tensor([[0, 4, -100, -100], [2, -100, -100, -100]])
    logits, nodes = torch.randn(2, 4, 7), torch.full((2, 4), -1)
    head = torch.randn(2, 4, 3), torch.randn(7, 3)
    for options in (LEVEL, {**LEVEL, "levels": torch.tensor([0, 1, 7, -9])}, {**TRIE, "nodes": nodes}):
        for logps in (rx.token_logps(logits, targets, **options), rx.linear_token_logps(*head, targets, **options)):
            assert (logps[targets == -100] == 0).all()
            assert (logps[:, :2][targets[:, :2] != -100] < 0).all()


@pytest.mark.parametrize("options", [{}, LEVEL, TRIE], ids=["vocab", "level", "trie"])
def test_check_changes_nothing(options: dict[str, Any]) -> None:
    hidden, weight, bias = torch.randn(2, 2, 3), torch.randn(7, 3), torch.randn(7)
    for op, inputs in ((rx.token_logps, (hidden @ weight.T,)), (rx.linear_token_logps, (hidden, weight))):
        assert torch.equal(op(*inputs, SIDS, check=True, **options), op(*inputs, SIDS, **options))
    checked = rx.linear_token_logps(hidden, weight, SIDS, bias=bias, check=True, **options)
    assert torch.equal(checked, rx.linear_token_logps(hidden, weight, SIDS, bias=bias, **options))


def test_numbers_of_other_kinds() -> None:
    """Integers and numpy's numbers are numbers too; a gathered ZeRO-3 weight is a weight."""
    expected = rx.token_logps(torch.arange(7.0), torch.tensor(3), temperature=2.0, logit_softcap=3.0)
    for two, three in ((2, 3), (torch.tensor([2.0]).numpy()[0], torch.tensor([3.0]).double().numpy()[0])):
        assert rx.token_logps(torch.arange(7.0), torch.tensor(3), temperature=two, logit_softcap=three) == expected
    weight = nn.Parameter(torch.randn(7, 2))
    weight.ds_id = 5
    assert rx.linear_token_logps(torch.randn(3, 2), weight, torch.tensor([1, 2, 3])).shape == (3,)
