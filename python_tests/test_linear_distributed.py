"""linear_token_logps on two ranks: FSDP2 and DDP, whose gradients are those of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import raddpo_ext as rx

pytestmark = pytest.mark.slow

TOKENS = torch.randint(0, 31, (8, 3), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(0, 31, (8, 3), generator=torch.Generator().manual_seed(2))
STEPS = 2
WAYS = [
    "DDP",
    "DDP, accumulate_grad",
    "FSDP2",
    "FSDP2, resharded",
    "FSDP2, tied",
    "FSDP2, gathered",
    "FSDP2, gathered bias",
]


class Model(nn.Module):
    """A body and a head whose weight only the op reads."""

    def __init__(self, bias: bool = False, tied: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.head = nn.Embedding(31, 6), nn.Linear(6, 6), nn.Linear(6, 31, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        self.options = options

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(tokens)))
        logps = rx.linear_token_logps(hidden, self.head.weight, targets, bias=self.head.bias, **self.options)
        return -logps.mean()


def model_for(way: str) -> Model:
    return Model("bias" in way, "tied" in way, accumulate_grad="accumulate" in way)


def prepared(way: str) -> nn.Module:
    model = model_for(way)
    if "DDP" in way:
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    if "gathered" in way:
        fully_shard(model.head, mesh=mesh)  # whose forward is never called: its weight stays a DTensor
    fully_shard(model, mesh=mesh, reshard_after_forward="resharded" in way)
    return model


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def train(model: nn.Module, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Parameters after two steps, and the last gradients."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(tokens, targets).backward()
        optimizer.step()
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        assert parameter.grad is not None, name
        found[name], found[f"{name}.grad"] = whole(parameter.detach()), whole(parameter.grad)
    return found


def rank(ways: list[str]) -> dict[str, dict[str, Tensor]]:
    share = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    head = fully_shard(nn.Linear(6, 31), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="accumulate_grad must be False for a sharded weight"):
        rx.linear_token_logps(torch.randn(3, 6), head.weight, TARGETS[0], accumulate_grad=True)
    return {way: train(prepared(way), TOKENS[share], TARGETS[share]) for way in ways}


def test_equals_one_process() -> None:
    every = on_ranks(rank, WAYS)
    for way in WAYS:
        expected = train(model_for(way), TOKENS, TARGETS)
        for found in every:
            assert found[way].keys() == expected.keys()
            for name, right in expected.items():
                scale = float(right.abs().max())
                torch.testing.assert_close(found[way][name], right, rtol=1e-6, atol=1e-6 * scale, msg=f"{way}: {name}")
