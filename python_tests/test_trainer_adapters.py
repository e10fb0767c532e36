"""RADDPOTrainer with PEFT adapters: every type trains or is refused, and the reference is the adapter as it was."""

from __future__ import annotations

import copy
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as TYPES
from support.tiny_models import qwen3, seeded, session_rows, t5
from support.trainer_runs import assert_same, assert_same_history, run

import raddpo_ext as rx
from raddpo_ext.integrations.adapters import StartValues, verify_adapters, verify_gradients
from raddpo_ext.integrations.session_states import accept_sessions, verify_packing

pytestmark = pytest.mark.slow

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
    *("ADALORA", "LILY", "POLY", "SHADOW", "XLORA"),
}


def small(**options: Any) -> Any:
    return seeded(qwen3, num_hidden_layers=1, **options)


@pytest.fixture(autouse=True)
def clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdaMSS asks scikit-learn for clusters of a weight's rows and for nothing else; any will do here."""

    class KMeans:
        def __init__(self, n_clusters: int, **_: Any) -> None:
            self.clusters = n_clusters

        def fit_predict(self, rows: Any) -> Any:
            return torch.arange(len(rows)).numpy() % self.clusters

    cluster = SimpleNamespace(KMeans=KMeans)
    monkeypatch.setitem(sys.modules, "sklearn", SimpleNamespace(cluster=cluster))
    monkeypatch.setitem(sys.modules, "sklearn.cluster", cluster)


def config_of(kind: str, task_type: str | None) -> Any:
    options: dict[str, Any] = {"task_type": task_type, **NEEDS.get(kind, {})}
    fields = TYPES[kind].__dataclass_fields__
    if "target_modules" in fields:
        options.setdefault("target_modules", ["q_proj", "down_proj"])
    if "r" in fields:
        options.setdefault("r", 2)
    if kind == "CPT":
        options["task_type"] = "CAUSAL_LM"  # it takes no other
    return TYPES[kind](**{name: value for name, value in options.items() if value is not None})


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("kind", [kind.value for kind in TYPES])
def test_every_type_trains_or_is_refused(kind: str, task_type: str | None) -> None:
    config = config_of(kind, task_type)
    options = {"max_steps": 2, "use_reference": True, "learning_rate": 0.1}
    if kind in REFUSED:
        with pytest.raises(ValueError, match=f"peft_config: adapters of type {kind} cannot be trained on packed"):
            run(small(), ROWS, **options, extra={"peft_config": config})
        return
    model = peft.get_peft_model(small(), config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = run(model, ROWS, **options)
    assert any(not torch.equal(p, start[name]) for name, p in found.parameters.items())
    assert all(torch.equal(p, start[name]) or name in trainable(found) for name, p in found.parameters.items())
    assert found.history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert found.history[1]["rewards/chosen"] != found.history[0]["rewards/chosen"]


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
        with pytest.raises(ValueError, match=r"model has an adapter .* on its head, which the loss would ignore"):
            run(model, ROWS, max_steps=1)
        return
    found = run(model, ROWS, max_steps=2, learning_rate=0.1, use_reference=True)
    still = [name for name, value in start.items() if torch.equal(found.parameters[name], value)]
    assert still == []
    assert found.history[0]["rewards/chosen"] == 0


@pytest.mark.parametrize("kind", ["fresh", "trained", "pissa", "embeddings", "two"])
def test_the_reference_is_the_model_as_it_was(kind: str) -> None:
    """An adapter that was trained before included: rewards are 0 before the first step, and after it those of a run
    whose reference is a copy that was made beforehand."""
    modules = ["q_proj", "embed_tokens"] if kind == "embeddings" else ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights="pissa" if kind == "pissa" else True)
    torch.manual_seed(0)
    model = peft.get_peft_model(seeded(qwen3), config)
    if kind == "two":
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    if kind not in ("fresh", "pissa"):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name or "lora_embedding_A" in name:
                    weight.normal_()
    options = {"max_steps": 4, **rx.PRESETS["dpo"], "learning_rate": 0.1}
    ours, its_copy = copy.deepcopy(model), copy.deepcopy(model)
    found = run(ours, ROWS, use_reference=True, **options)
    right = run(model, ROWS, extra={"ref_model": its_copy}, **options)
    assert found.trainer.ref_model is None
    assert found.history[0]["rewards/chosen"] == found.history[0]["rewards/rejected"] == 0
    assert all(abs(logs["rewards/chosen"]) > 1e-3 for logs in found.history[2:4])
    assert_same_history(found.history, right.history)
    assert_same(found.parameters, right.parameters)


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
    with pytest.raises(ValueError, match=r"trainable parameter .*lm_head\.lora_B.* gets a different gradient"):
        verify_gradients(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter; load them with is_trainable=True"):
        verify_gradients(model)


def averaging(model: Any) -> Any:
    """A layer beside the adapters' that adds, times a trainable factor of 0, what all tokens of the batch have."""

    class Mean(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer, self.factor = layer, torch.nn.Parameter(torch.zeros(()))

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return self.layer(states) + self.factor * states.mean((0, 1)).square().mean()

    mlp = model.base_model.model.model.layers[0].mlp
    mlp.gate_proj = Mean(mlp.gate_proj)
    return model


def test_an_adapter_that_leaks_is_found_though_it_adds_nothing_yet() -> None:
    """Between candidates, which a fresh adapter's output of 0 does not show; the model is left as it was."""
    model = accept_sessions(averaging(peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules=["q_proj"]))))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    verify_packing(model)
    with pytest.raises(ValueError, match="model gives different log-probs for packed sessions"):
        verify_adapters(model)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("way", ["add_adapter", "inject", "mixed"])
def test_adapters_that_are_put_in_otherwise(way: str) -> None:
    """By transformers, by PEFT's function for any module, and by its class for several types."""

    def model(*modules: str) -> Any:
        config = peft.LoraConfig(r=2, target_modules=list(modules))
        found = small()
        if way == "mixed":
            return peft.get_peft_model(found, config, mixed=True)
        if way == "inject":
            return peft.inject_adapter_in_model(config, found)
        found.add_adapter(config)
        return found

    with pytest.raises(ValueError, match=r"model has an adapter .* on its head, which the loss would ignore"):
        run(model("q_proj", "lm_head"), ROWS, max_steps=1)
    made = model("q_proj")
    start = {name: p.detach().clone() for name, p in made.named_parameters()}
    found = run(made, ROWS, max_steps=2, learning_rate=0.1, use_reference=True)
    moved = {name for name, p in found.parameters.items() if not torch.equal(p, start[name])}
    assert moved == trainable(found) == {name for name in start if "lora_" in name}
    assert found.trainer.ref_model is None
    assert found.history[0]["rewards/chosen"] == 0


def test_what_is_no_config_and_adapters_on_adapters() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    for wrong in (config.to_dict(), "lora"):
        with pytest.raises(TypeError, match=re.escape(f"peft_config must be a PeftConfig, got {type(wrong).__name__}")):
            run(small(), ROWS, extra={"peft_config": wrong})
    with pytest.raises(ValueError, match="peft_config must be None for a model that has adapters"):
        run(peft.get_peft_model(small(), config), ROWS, extra={"peft_config": config})
