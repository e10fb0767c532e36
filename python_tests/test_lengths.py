"""Windows of every unit, named or not: scores are those of plain forwards below them and beyond."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")
import transformers
from support.graph_tape import play_graphs
from test_leaks import TEXT
from test_retriever import VOCAB, brute_force, make_index

import raddpo_ext as rx
from raddpo_ext.integrations.base_model import expert_capacities, slot_windows
from raddpo_ext.integrations.lengths import ProvenLengths
from raddpo_ext.integrations.session_states import session_states, verify_packing

pytestmark = pytest.mark.slow

BEAMS = 14  # with an index of 12: 28 slots beside the prompt


def gpt_neo(window: int, scale: float = 0.15, positions: int = 256) -> Any:
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_heads=4, num_layers=2, intermediate_size=48, window_size=window,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=positions, initializer_range=scale,
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config).eval()


def phi3(original: int) -> Any:
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = transformers.Phi3Config(
        **{k: v for k, v in TEXT.items() if k != "head_dim"}, initializer_range=0.15, rope_parameters=rope,
        original_max_position_embeddings=original,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).eval()


def batch(*lengths: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids * mask, mask


def assert_plain(model: Any, prompts: tuple[Tensor, Tensor], **options: Any) -> rx.SIDRetriever:
    index = make_index(12)
    retriever = rx.SIDRetriever(model, index, beam_width=BEAMS, **options)
    found = retriever.retrieve(*prompts)
    for row, expected in enumerate(brute_force(model, index, *prompts)):
        kept = found.items[row] >= 0
        assert found.scores[row][kept].tolist() == pytest.approx(sorted(expected.values())[::-1], abs=1e-5)
    return retriever


def shares(retriever: rx.SIDRetriever, prompts: tuple[Tensor, Tensor]) -> bool:
    return retriever._find_ways(prompts[1], retriever.index, retriever._widths(retriever.index)).shared


@pytest.mark.parametrize(
    ("window", "longest", "shared"), [(8, 6, False), (64, 36, True), (64, 37, False), (64, 90, False)]
)
def test_gpt_neo(window: int, longest: int, shared: bool) -> None:
    """Its ``window_size`` counts slots: 28 of the beams come on top of the prompt."""
    model, prompts = gpt_neo(window), batch(longest, 5)
    retriever = assert_plain(model, prompts)
    assert shares(retriever, prompts) == shared
    assert_plain(model, prompts, shared_prefix=False)


def plant_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention then sees the last 96 columns alone, and no setting says so."""
    attend = F.scaled_dot_product_attention

    def windowed(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        keys, queries = key.shape[2], query.shape[2]
        places = torch.arange(keys - queries, keys)[:, None]
        seen = (torch.arange(keys) > places - 96) & (torch.arange(keys) <= places)
        seen = seen if attn_mask is None else seen & attn_mask
        return attend(query, key, value, attn_mask=seen, **{**options, "is_causal": False})

    monkeypatch.setattr(F, "scaled_dot_product_attention", windowed)


def qwen3(scale: float, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**{**TEXT, "max_position_embeddings": 512}, initializer_range=scale)
    return transformers.Qwen3ForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.02, 0.15])
@pytest.mark.parametrize(("longest", "shared"), [(30, True), (90, False)])
def test_a_window_of_no_name(
    longest: int, shared: bool, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts slots, as GPT-Neo's; nothing in the config says so."""
    plant_window(monkeypatch)
    model, prompts = qwen3(scale, dtype), batch(longest, 4)
    retriever = rx.SIDRetriever(model, make_index(12), beam_width=BEAMS)
    if dtype == torch.float32:
        assert_plain(model, prompts)
    assert shares(retriever, prompts) == shared


@pytest.mark.parametrize(("lengths", "shared"), [((12, 5), True), ((20, 17), False), ((20, 5), False)])
def test_a_rope_that_changes(lengths: tuple[int, ...], shared: bool) -> None:
    model, prompts = phi3(16), batch(*lengths)
    assert shares(assert_plain(model, prompts), prompts) == shared


@pytest.mark.parametrize("shared", [None, False])
def test_a_rope_that_would_change_within_a_sid(shared: bool | None) -> None:
    with pytest.raises(ValueError, match=r"input_ids\[1\] has 15 tokens, so that its SID would cross position 16"):
        rx.SIDRetriever(phi3(16), make_index(12), beam_width=4, shared_prefix=shared).retrieve(*batch(20, 15, 14))


def test_slot_windows_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's prompts are padded to 64 columns, which count as well."""
    play_graphs(monkeypatch)
    prompts = batch(9, 5)
    assert_plain(gpt_neo(92), prompts, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph = True, but GPTNeoForCausalLM cannot share a prompt of 9 tokens"):
        assert_plain(gpt_neo(91), prompts, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph = True, but GPTNeoForCausalLM cannot share a prompt of 65 tokens"):
        assert_plain(gpt_neo(128), batch(65, 5), cuda_graph=True)


def test_gpt_neo_is_packed_within_its_window() -> None:
    """``verify_packing`` does not know how long rows will be; ``session_states`` does."""
    model = gpt_neo(16)
    with pytest.raises(ValueError, match="GPTNeoForCausalLM cannot be packed: window_size = 16 counts a row's columns"):
        verify_packing(model)
    verify_packing(gpt_neo(256))
    tokens = torch.tensor([[5, 6], [7, 8], [9, 10], [11, 12]])
    sessions = rx.SessionBatch(tokens, torch.full((4,), 2), torch.tensor([0, 2, 4]), torch.tensor([1, 1]))
    states = session_states(model, rx.pack_sessions([[3, 4], list(range(20, 32))], sessions, embeddings=False))
    plain = model.transformer(torch.tensor([[*range(20, 32), 11]])).last_hidden_state[0, -2:]
    torch.testing.assert_close(states.hidden[states.rows][3], plain, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"rows of 17 tokens \(row 1 is the longest\), more than window_size = 16"):
        session_states(model, rx.pack_sessions([[3, 4], list(range(20, 33))], sessions))


def packed_rows(prompt: int, candidates: int) -> rx.PackedSessions:
    """A prompt with candidates of two tokens, and a short one."""
    sizes = [candidates, 2]
    ids = torch.randint(3, 50, (prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    tokens = torch.arange(2 * sum(sizes)).view(-1, 2) % 40 + 5
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    sessions = rx.SessionBatch(tokens, torch.full_like(tokens[:, 0], 2), offsets, torch.tensor([1, 1]))
    return rx.pack_sessions([ids, ids[:4]], sessions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.02, 0.15])
@pytest.mark.parametrize(("prompt", "candidates"), [(92, 2), (4, 46)])
def test_a_window_of_no_name_in_a_packed_row(
    prompt: int, candidates: int, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = qwen3(scale, dtype).train()
    session_states(model, packed_rows(prompt + 40, candidates + 40))
    plant_window(monkeypatch)
    model = qwen3(scale, dtype).train()
    verify_packing(model)
    session_states(model, packed_rows(prompt, candidates))
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM cannot be packed in rows of 104 tokens"):
        session_states(model, packed_rows(prompt, candidates + 4))


def test_a_window_of_no_name_in_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from support.trainer_runs import trainer_for

    plant_window(monkeypatch)
    rows = [{"prompt_ids": [5, 6, 7] * n, "positives": [[8, 9]], "negatives": [[10, 11]]} for n in (2, 40)]
    options = {"use_reference": False, "similarity_weighting": False, "max_steps": 1, "output_dir": str(tmp_path)}
    trainer_for(qwen3(0.15), rows[:1], **options).train()
    with pytest.raises(
        ValueError, match=r"train_dataset\[1\]: Qwen3ForCausalLM cannot be packed in rows of 122 tokens"
    ):
        trainer_for(qwen3(0.15), rows, **options)
    trainer = trainer_for(qwen3(0.15), rows[:1], **options)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM cannot be packed in rows of 122 tokens"):
        trainer._prepare_inputs(trainer.data_collator(rows))


@pytest.mark.parametrize("wrapper", ["zero3", "fsdp1"])
def test_rows_of_a_model_in_shards_are_not_tried(wrapper: str) -> None:
    """A pass would wait for the other ranks: a warning instead."""
    model = qwen3(0.02)
    if wrapper == "zero3":
        next(model.parameters()).ds_id = 0
    else:
        model.model.layers[0].add_module("_fsdp_wrapped_module", torch.nn.Identity())
    with pytest.warns(UserWarning, match="more than 0 tokens are not checked, because the weights of .* are sharded"):
        session_states(model, packed_rows(10, 2))


def test_prompts_near_a_context_that_is_no_power_of_two() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=100, pad_token_id=0,
        decoder_start_token_id=2,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    assert_plain(model, batch(70, 5))
    session_states(model, packed_rows(98, 2))


def test_settings_that_are_no_window() -> None:
    t = transformers
    assert slot_windows(t.Gemma3ForCausalLM(t.Gemma3TextConfig(**TEXT))) == {}


def switch() -> Any:
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=2, expert_capacity=8,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0, pad_token_id=0,
        initializer_factor=1.0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def nllb(part: float) -> Any:
    torch.manual_seed(0)
    config = transformers.NllbMoeConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=96, num_experts=2,
        encoder_sparse_step=1, decoder_sparse_step=1, expert_capacity=8, moe_eval_capacity_token_fraction=part,
        pad_token_id=0, decoder_start_token_id=2, init_std=0.3,
    )  # fmt: skip
    return transformers.NllbMoeForConditionalGeneration(config).eval()


def over_the_batch(route: Callable[[Tensor], tuple[Tensor, ...]], states: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.view(*states.shape[:2], -1) for part in route(states.view(1, -1, states.shape[-1])))


def test_experts_whose_capacity_is_a_row_s() -> None:
    model = switch()
    assert expert_capacities(model) == {"expert_capacity": 8}
    assert_plain(model, batch(20, 5))
    assert_plain(nllb(1.0), batch(20, 5))


@pytest.mark.parametrize("name", ["switch", "nllb"])
def test_experts_whose_capacity_rows_compete_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "switch":  # as in earlier releases of transformers, the whole batch for one row
        model = switch()
        for module in model.modules():
            if type(module).__name__ == "SwitchTransformersTop1Router":
                monkeypatch.setattr(module, "forward", partial(over_the_batch, module.forward))
    else:
        model = nllb(0.5)
    with pytest.raises(TypeError, match=r"each row of a batch independently.*capacity"):
        rx.SIDRetriever(model, make_index(12), beam_width=4).retrieve(*batch(5, 5))
    with pytest.raises(ValueError, match=r"cannot be packed.*capacity"):
        verify_packing(model)


def test_few_lengths_are_tried() -> None:
    lengths, tried = ProvenLengths(), []

    def right(length: int) -> bool:
        tried.append(length)
        return length <= 300

    answers = [lengths.cover("way", n, 10**6, right) for n in (5, 60, 65, 120, 200, 290, 280, 301, 310, 400, 100)]
    assert answers == [True] * 7 + [False] * 3 + [True]
    assert tried == [64, 128, 256, 512, 290, 301]
    assert lengths.cover("way", 70, 80, right)
    tried.clear()
    assert lengths.cover("another", 70, 80, right)
    assert tried == [80]
