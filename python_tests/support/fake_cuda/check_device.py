"""What the fake device refuses, and what it lets pass; run by test_fake_cuda.py."""

from __future__ import annotations

import pytest
import torch
from support.fake_cuda.tensor import FakeTensor, State
from support.on_gpu import no_synchronisation

import raddpo_ext as rx
from raddpo_ext.decoding.row_lse import row_lse


def test_says_cuda_and_computes() -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3).requires_grad_()
    assert isinstance(x, FakeTensor)
    assert x.device == torch.device("cuda", 0)
    (x * torch.tensor(2.0)).sum().backward()  # a number on the host may be a factor
    assert x.grad is not None
    assert x.grad.device.type == "cuda"
    assert x.grad.tolist() == [[2.0] * 3] * 2
    assert torch.nn.Linear(3, 2).cuda()(x).device.type == "cuda"
    assert row_lse(x.detach()).device.type == "cuda"


def test_refuses_two_devices() -> None:
    x = torch.ones(3, device="cuda")
    for call in (lambda: x + torch.ones(3), lambda: torch.ones(2, 3) @ x, lambda: torch.cat([x, torch.ones(1)])):
        with pytest.raises(RuntimeError, match="same device"):
            call()
    index = rx.TrieIndex.build(torch.arange(4)[:, None])
    nodes = torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match=r"same device.*argument trie of raddpo.trie_children"):
        torch.ops.raddpo.trie_children(nodes, *index.block)


WAITS = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "mask_written": lambda x: x.index_put_((x > 0,), x.clone()),
    "isin": lambda x: torch.isin(x, x),
    "unique": lambda x: x.unique(),
    "repeat": lambda x: torch.repeat_interleave(x, torch.ones_like(x).long()),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "to_device": lambda x: torch.ones(3).to(x.device),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "pageable_index": lambda x: x[torch.tensor([0, 1])],
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_refuses_to_wait_while_a_graph_is_captured(name: str) -> None:
    x = torch.ones(3, device="cuda")
    WAITS[name](x)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="not permitted when stream"):
        WAITS[name](x)
    assert State.capture is None


@pytest.mark.parametrize("name", [name for name in WAITS if name != "synchronize"])
def test_refuses_to_wait_where_that_is_forbidden(name: str) -> None:
    x = torch.ones(3, device="cuda")
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        WAITS[name](x)
    WAITS[name](x)


def test_lets_pass_what_does_not_wait() -> None:
    x, pinned = torch.ones(3, device="cuda"), torch.ones(3).pin_memory()
    with no_synchronisation():
        x[x > 0] = 2.0  # a masked_fill
        x[:2] += 1
        x.copy_(pinned, non_blocking=True)
        x.sort()
        torch.repeat_interleave(x, torch.ones(3, device="cuda").long(), output_size=3)


def test_pins_only_what_lies_on_the_host() -> None:
    assert torch.ones(2).pin_memory().is_pinned()
    with pytest.raises(RuntimeError, match="cannot pin"):
        torch.ones(2, device="cuda").pin_memory()
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.ones(3).expand(2, 3).pin_memory()


def test_a_graph_replays_what_was_captured() -> None:
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 2 * x
    x.fill_(5)
    graph.replay()
    assert y.tolist() == [10.0] * 3
