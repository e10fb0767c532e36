"""RADDPOTrainer with PEFT adapters: every type trains or is refused, and the reference is the adapter as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as TYPES
from tiny_models import qwen3, seeded, session_rows, t5
from trainer_runs import run

import raddpo_ext as rx
from raddpo_ext.integrations.adapters import StartValues, verify_gradients
from raddpo_ext.integrations.session_states import accept_sessions

ROWS = session_rows(8, empty=False)
PROMPTS = {"num_virtual_tokens": 2}
# What a type's defaults do not allow on a model of 16 states.
NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "CARTRIDGE": PROMPTS,
    "CPT": {"cpt_token_ids": [1, 2]},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": PROMPTS,
    "OFT": {"r": 0, "oft_block_size": 8},
    "P_TUNING": PROMPTS,
    "PREFIX_TUNING": PROMPTS,
    "PROMPT_TUNING": PROMPTS,
    "ROAD": {"group_size": 8},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 7], "target_modules": None},
    "VBLORA": {"vector_length": 8},
    "WAVEFT": {"n_frequency": 20},
}
# Those that put tokens before the prompt, and those that need more than their layers.
REFUSED = {
    *("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "ADAPTION_PROMPT"),
    *("ADALORA", "POLY", "SHADOW", "XLORA"),
}


def config_of(kind: str, task_type: str | None) -> Any:
    options: dict[str, Any] = {"task_type": task_type, **NEEDS.get(kind, {})}
    fields = TYPES[kind].__dataclass_fields__
    if "target_modules" in fields:
        options.setdefault("target_modules", ["q_proj", "down_proj"])
    if "r" in fields:
        options.setdefault("r", 2)
    try:
        return TYPES[kind](**{name: value for name, value in options.items() if value is not None})
    except ImportError as error:
        pytest.skip(str(error))
    except ValueError as error:
        if "only supports task_type" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("kind", [kind.value for kind in TYPES])
def test_every_type_trains_or_is_refused(kind: str, task_type: str | None) -> None:
    config = config_of(kind, task_type)
    options = {"max_steps": 2, "extra": {"peft_config": config}, "use_reference": True, "learning_rate": 0.1}
    if kind == "LILY":
        pytest.skip("LILY is refused at the start by its gradients on this model; why is not known yet")
    if kind in REFUSED:
        with pytest.raises(ValueError, match=f"peft_config: adapters of type {kind} cannot be trained on packed"):
            run(seeded(qwen3), ROWS, **options)
        return
    try:
        model = peft.get_peft_model(seeded(qwen3), config_of(kind, task_type))
    except ImportError as error:
        pytest.skip(str(error))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = run(model, ROWS, **{**options, "extra": {}})
    assert any(not torch.equal(p, start[name]) for name, p in found.parameters.items())
    assert all(torch.equal(p, start[name]) or name in trainable(found) for name, p in found.parameters.items())
    assert found.history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def trainable(found: Any) -> set[str]:
    return {name for name, parameter in found.trainer.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("task_type", ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"])
def test_other_task_types(task_type: str) -> None:
    """PEFT wraps the model in a class for each, whose forward names arguments of its own."""
    make, modules = (t5, ["q"]) if task_type == "SEQ_2_SEQ_LM" else (qwen3, ["q_proj"])
    losses = []
    for kind in (None, task_type):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=modules, task_type=kind)
        losses.append(run(seeded(make), ROWS, max_steps=2, extra={"peft_config": config}).history[1]["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, True),
        ({"target_modules": ["q_proj", "lm_head"], "use_rslora": True}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 7]}}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    ],
)
def test_an_adapter_on_the_head_or_the_embeddings(options: dict[str, Any], refused: bool) -> None:
    """It is trained, every part of it, or refused at the start."""
    try:
        config = peft.LoraConfig(r=2, **options)
        model = peft.get_peft_model(seeded(qwen3), config)
    except (ValueError, TypeError) as error:
        pytest.skip(f"this PEFT does not do it: {error}")
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if refused:
        with pytest.raises(ValueError, match=r"model has an adapter .* on its head, which the loss would pass over"):
            run(model, ROWS, max_steps=1)
        return
    found = run(model, ROWS, max_steps=2, learning_rate=0.1, use_reference=True)
    still = [name for name, value in start.items() if torch.equal(found.parameters[name], value)]
    assert still == []
    assert found.history[0]["rewards/chosen"] == 0


@pytest.mark.parametrize("kind", ["trained", "pissa", "embeddings", "two"])
def test_the_reference_is_the_model_as_it_was(kind: str) -> None:
    """Rewards are 0 at the first step."""
    modules = ["q_proj", "embed_tokens"] if kind == "embeddings" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights="pissa" if kind == "pissa" else True)
    torch.manual_seed(0)
    model = peft.get_peft_model(seeded(qwen3), config)
    if kind == "two":
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    if kind != "pissa":
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name or "lora_embedding_A" in name:
                    weight.normal_()
    options = {"similarity_weighting": False, "use_reference": True, **rx.PRESETS["dpo"], "learning_rate": 0.1}
    found = run(model, ROWS, max_steps=2, train_sampling_strategy="sequential", **options)
    assert found.history[0]["rewards/chosen"] == 0


def test_start_values_come_and_go() -> None:
    model = torch.nn.Linear(2, 2)
    start = StartValues(model)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    later = model.weight.detach().clone()
    with start(model):
        assert torch.equal(model.weight, first)
    assert torch.equal(model.weight, later)


def test_a_gradient_that_the_packed_pass_lacks_is_named() -> None:
    """Of a fresh adapter, whose output is 0: no log-prob shows it."""
    model = accept_sessions(peft.get_peft_model(seeded(qwen3), peft.LoraConfig(r=2, target_modules=["lm_head"])))
    with pytest.raises(ValueError, match=r"trainable parameter .*lm_head\.lora_B.* gets another gradient"):
        verify_gradients(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter; load them with is_trainable=True"):
        verify_gradients(model)
