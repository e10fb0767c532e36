"""Packed sessions on a CUDA device: masks, shared states, and stock models through SDPA and FlexAttention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.on_gpu import NEEDS_GPU, no_synchronisation
from torch import Tensor

import raddpo_ext as rx

pytestmark = NEEDS_GPU
COLUMNS = 97


def batch(layout: str, side: str = "right") -> rx.PackedSessions:
    """Three sessions of different prompts and sizes, SIDs of two and three tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, (9, 3), generator=generator) + torch.tensor([10, 20, 30])
    sessions = rx.SessionBatch(
        tokens, torch.tensor([3, 3, 2, 3, 3, 3, 2, 3, 3]), torch.tensor([0, 4, 5, 9]), torch.tensor([1, 1, 2])
    )
    return rx.pack_sessions([[1, 2, 3, 4], [5], [6, 7]], sessions, layout=layout, padding_side=side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", ["candidates", "trie"])
def test_masks_equal_the_cpu(layout: str, side: str) -> None:
    packed = batch(layout, side)
    on_gpu = packed.pin_memory().to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(on_gpu.mask().cpu(), packed.mask())
    assert torch.equal(on_gpu.mask(torch.bfloat16).cpu(), packed.mask(torch.bfloat16))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(on_gpu.prompts(), packed.prompts(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 2**30])
def test_shared_states_equal_the_cpu(dtype: torch.dtype, budget: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 64, generator=generator).to(dtype)
    weight = (torch.randn(5000, 64, generator=generator) / 8).to(dtype)
    targets, rows = (torch.randint(size, (40, 3), generator=generator) for size in (5000, 6))
    upstream = torch.randn(40, 3, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in (hidden, weight)]
        logps = rx.linear_token_logps(*leaves, targets.to(device), rows=rows.to(device), logits_budget=budget)
        results.append([logps, *torch.autograd.grad(logps, leaves, upstream.to(device))])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got.detach().cpu(), expected.detach(), rtol=tolerance, atol=tolerance)


def test_shared_states_never_synchronise() -> None:
    hidden = torch.randn(6, 64, device="cuda", requires_grad=True)
    weight = torch.randn(500, 64, device="cuda", requires_grad=True)
    targets, rows = (torch.randint(size, (40, 3), device="cuda") for size in (500, 6))
    for _ in range(2):  # the first time allocates
        with no_synchronisation():
            rx.linear_token_logps(hidden, weight, targets, rows=rows).sum().backward()


@pytest.mark.parametrize("layout", ["candidates", "trie"])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_models_give_the_log_probs_of_a_row_a_candidate(attention: str, layout: str) -> None:
    transformers = pytest.importorskip("transformers")
    from raddpo_ext.integrations.transformers import session_states

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=COLUMNS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = transformers.Qwen3ForCausalLM(config).cuda()
    packed = batch(layout).to("cuda")

    def gradients(logps: Tensor) -> list[Tensor]:
        model.zero_grad()
        logps.sin().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = torch.zeros(packed.sessions.tokens.shape, device="cuda")
    prompts, mask = packed.prompts()
    rows: list[Any] = []
    for session in range(packed.sessions.num_sessions):
        prompt = prompts[session, mask[session].bool()]
        for row in range(int(packed.sessions.offsets[session]), int(packed.sessions.offsets[session + 1])):
            length = int(packed.sessions.lengths[row])
            ids = torch.cat([prompt, packed.sessions.tokens[row, :length]])
            logps = model(ids[None]).logits[0].log_softmax(-1)
            places = torch.arange(len(prompt) - 1, len(ids) - 1, device="cuda")
            rows.append(logps[places, ids[places + 1]])
    expected = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    expected_gradients = gradients(expected)

    model.set_attn_implementation(attention)
    states = session_states(model, packed)
    targets = packed.sessions.tokens.masked_fill(~packed.sessions.mask(), -100)
    got = rx.linear_token_logps(states.hidden, states.weight, targets, rows=states.rows)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    for mine, other in zip(gradients(got), expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)
