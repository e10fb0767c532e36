"""Every operator refuses tensors of several devices before it takes a pointer of any: a host pointer in a CUDA kernel
costs the process its GPU. A tensor on ``meta`` stands for one elsewhere, and the kernels are called past the
dispatcher, which would give such a call to the fake kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.operator_calls import OPERATORS, Call, Recorder
from support.session_cases import build
from torch import Tensor

import raddpo_ext as rx

# These may be elsewhere: the header is read on the CPU whatever the device.
ON_THE_CPU = {"header"}


def tensors_of(call: Call) -> int:
    return sum(isinstance(value, Tensor) for value in call[1])


def calls() -> dict[str, Call]:
    """One call of every operator, with all of its optional tensors if any call has them."""
    vocab = rx.SIDVocab([4, 4], offset=2)
    index = rx.TrieIndex.build([[0, 1], [1, 2], [3, 0]], vocab=vocab).restrict([0, 1])
    tokens = torch.tensor([[2, 7], [3, 8]])
    hidden, weight = torch.randn(2, 2, 5), torch.randn(12, 5)
    case = build([(1, 2), (2, 1)], 2, seed=0)
    with Recorder() as recorder:
        for normalize, options in (
            ("vocab", {}),
            ("trie", {"index": index, "nodes": index.nodes(tokens)}),
        ):
            logits = torch.randn(2, 2, 12, requires_grad=True)
            rx.token_logps(logits, tokens, normalize=normalize, **options).sum().backward()
            logits = torch.randn(2, 2, 12, requires_grad=True) * 1
            rx.token_logps(logits, tokens, normalize=normalize, inplace_backward=True, **options).sum().backward()
        logps, lse = torch.ops.raddpo.token_logps(torch.randn(2, 9), tokens[0], None, None, None, 1.0, 0.0, -100, 0, 9)
        live = torch.tensor([1])
        torch.ops.raddpo.token_logps_backward_(
            logps, torch.randn(2, 9), tokens[0], lse, None, None, None, live, 1.0, 0.0, -100, 0, 9
        )
        state = rx.linear_beam_step(
            hidden[:1, :1], weight, rx.BeamState.start(index, 1), index, 2, bias=torch.zeros(12), normalize="vocab"
        )
        rx.beam_step(torch.randn(1, 2, 12), state, index, 2)
        rx.sample_step(torch.randn(1, 1, 12), rx.SampleState.start(index, 1), index, 2, seed=0)
        index.paths(state.nodes)
        index.item_ranges(state.nodes)
        index.top_items(state.nodes, 2)
        index.items_at(torch.zeros(1, dtype=torch.int64))
        torch.ops.raddpo.trie_check(index.data, 1)
        arguments = {"ref_logps": True, "pair_weights": True, "level_weights": True, "detach": True}
        normalizer = (torch.tensor(2.0), torch.tensor(3.0))
        case.logps.requires_grad_()
        result = rx.rad_dpo_loss(case.logps, case.sessions, normalizer=normalizer, **case.arguments(arguments))
        (result.loss + result.preference + result.sft).backward()
        rx.pack_sessions([[1, 2], [3]], case.sessions)
        torch.ops.raddpo.assign_balanced(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.int32), torch.tensor([0]))
        rx.legal_mass(torch.randn(2, 2, 12, requires_grad=True), index, index.nodes(tokens)).sum().backward()
        groups = case.sessions
        layout = (groups.tokens, groups.lengths, groups.offsets)
        given = (*layout, groups.num_positives, torch.ones(6), torch.ones(2), *layout, torch.ones(2))
        torch.ops.raddpo.group_advantages(torch.ones(6), *given, 1.0, 1e-6, 2, 0, 0, True, True)
        every = {"old_logps": torch.ones(6, 2), "ref_logps": torch.ones(6, 2), "weights": torch.ones(6)}
        every |= {"gates": torch.ones(6, 2), "level_weights": torch.ones(2), "normalizer": normalizer}
        logps = torch.ones(6, 2, requires_grad=True)
        rx.policy_loss(logps, groups, torch.ones(6), **every).loss.backward()
    return {name: max(found, key=tensors_of) for name, found in recorder.calls.items()}


CALLS = calls()


def misplaced() -> Iterator[Any]:
    """Each operator with one of its tensors elsewhere."""
    for name, (func, args) in CALLS.items():
        names = [argument.name for argument in func._schema.arguments]
        first = next(i for i, value in enumerate(args) if isinstance(value, Tensor))
        for i, value in enumerate(args):
            if isinstance(value, Tensor) and i != first and names[i] not in ON_THE_CPU:
                yield pytest.param(func, args, i, id=f"{name.split('::')[1]}-{names[i]}")


def test_no_operator_is_left_out() -> None:
    assert sorted(CALLS) == OPERATORS
    for name, (func, args) in CALLS.items():
        optional = [str(a.type) for a in func._schema.arguments].count("Optional[Tensor]")
        tensors = sum("Tensor" in str(argument.type) for argument in func._schema.arguments)
        given = tensors_of((func, args))
        # The rows' lists and `live` exclude each other.
        assert given >= tensors - (optional if name.endswith("backward_") else 0), name


def kernels() -> list[Any]:
    keys = [torch._C.DispatchKey.CPU]
    if torch._C._dispatch_has_kernel_for_dispatch_key("raddpo::row_lse", "CUDA"):
        keys.append(torch._C.DispatchKey.CUDA)  # built with CUDA: its checks need no GPU
    return keys


@pytest.mark.parametrize("key", kernels(), ids=lambda key: key.name)
@pytest.mark.parametrize(("func", "args", "position"), misplaced())
def test_a_tensor_elsewhere(key: Any, func: Any, args: tuple[Any, ...], position: int) -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key.name):
        pytest.skip("it has no CUDA kernel")
    moved = list(args)
    moved[position] = moved[position].to("meta")
    name = func._schema.arguments[position].name
    messages = (
        rf"{name} must be on the device of \w+, cpu, got device",
        rf"must be on the device of {name}, device type",
    )
    with pytest.raises(RuntimeError, match="|".join(messages)):
        func._op_dk(key, *moved)
