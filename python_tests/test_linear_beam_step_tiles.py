"""The vocabulary's log-sum-exp of hidden states, which linear_beam_step computes tile by tile, against float64."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.beam_cases import DTYPES, generator_of

from raddpo_ext.logps.head import Head

module = sys.modules["raddpo_ext.decoding.linear_beam_step"]


def assert_lse_equals_float64(device: str, dtype: torch.dtype, data: st.DataObject) -> None:
    """The vocabulary's log-sum-exp of random states, whose products are exact in every type."""
    generator = generator_of(data.draw(st.integers(0, 2**32)))
    rows, size = data.draw(st.sampled_from([(1, 1), (3, 33), (70, 8)]))
    vocab = data.draw(st.sampled_from([1, 1000, 1024, 1025, 2048, 2999, 5000]))
    hidden = torch.randint(-1, 2, (rows, size), generator=generator).to(dtype)
    weight = torch.randint(-1, 2, (vocab, size + 1), generator=generator).to(dtype)[:, 1:]
    bias = data.draw(st.sampled_from([None, torch.randint(-2, 3, (vocab,), generator=generator).to(dtype)]))
    temperature, softcap = data.draw(st.sampled_from([(1.0, None), (0.5, None), (1.0, 3.0), (2.5, 1.5)]))
    wide = Head(weight.double(), None if bias is None else bias.double(), temperature, softcap)
    expected = wide.transform_(wide.product(hidden.double())).logsumexp(1)
    head = Head(weight.to(device), None if bias is None else bias.to(device), temperature, softcap)
    got = module._vocab_lse(hidden.to(device), head).cpu()
    assert got.dtype == torch.float32
    atol = 1e-5 if dtype == torch.float32 or softcap is None else 0.02  # the transform rounds to the product's type
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("columns", [1, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_lse_in_tiles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, columns: int, data: st.DataObject) -> None:
    """One tile and several, the last of which is narrower."""
    monkeypatch.setattr(module, "_tile_columns", lambda *_: columns)
    assert_lse_equals_float64("cpu", dtype, data)


@pytest.mark.parametrize("rows", [1, 50, 128, 512, 3500, 4096, 20_000])
def test_tiles_of_whole_waves(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a tile fits its bytes, is hardly smaller, and nearly fills its last wave of blocks."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    columns = module._tile_columns(torch.empty(rows, 8, device="meta", dtype=torch.bfloat16))
    most = 2**28 // (2 * rows)
    assert 0.9 * most <= columns <= most
    blocks = columns / 256 * math.ceil(rows / 128)
    assert blocks / 132 > 0.97 * math.ceil(blocks / 132)
