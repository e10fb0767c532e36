"""RADDPOTrainer in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import gpt2, llama, qwen3, seeded, session_rows, t5
from trainer_runs import assert_same, assert_same_history, run

import raddpo_ext as rx
from raddpo_ext.integrations.transformers import SessionCollator, session_states

ROWS = session_rows(22)
WHOLE = {"batch": 22, "train_sampling_strategy": "sequential"}  # all rows at every step, in their order


def by_hand(model: Any, rows: list[dict[str, Any]], steps: int, rate: float = 0.01, **options: Any) -> list[dict]:
    """What the trainer does with one batch of all rows a step, in plain torch."""
    reference = options.pop("reference", None)
    weighting = rx.SimilarityWeighting(12)
    loss = rx.RADDPOLoss(weighting, **options)
    packed = SessionCollator()(rows)["packed"]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    history = []
    for step in range(steps):
        states = session_states(model, packed)
        ref_logps = None if reference is None else reference(packed)
        output = loss(sessions=packed.sessions, ref_logps=ref_logps, **states._asdict())
        gradients = torch.autograd.grad(output.loss, parameters)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * (1 - step / steps) * gradient * min(1.0, 1.0 / (float(norm) + 1e-6))
        history.append({name: float(value) for name, value in output.metrics.items()})
    return history


def test_equals_a_loop_by_hand() -> None:
    model = seeded(qwen3).train()
    found = run(seeded(qwen3), ROWS, **WHOLE, max_steps=4, protect="positives", beta=1.5, sft_weight=0.5)
    history = by_hand(model, ROWS, 4, protect="positives", beta=1.5, sft_weight=0.5)
    assert_same(found.parameters, dict(model.named_parameters()))
    for logs, right in zip(found.history, history, strict=False):
        for name, value in right.items():
            assert logs[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert 0 < found.history[-2]["pair_weights"] < 1
    assert 0 < found.history[0]["detached"] < 1


@pytest.mark.parametrize("positives", ["winner", "pooled"])
def test_accumulation_equals_one_big_batch(positives: str) -> None:
    """Also in an epoch's last step, which has fewer rows."""
    one = run(seeded(qwen3), ROWS, positives=positives)
    for batch, accumulate in ((4, 2), (1, 8)):
        found = run(seeded(qwen3), ROWS, batch=batch, accumulate=accumulate, positives=positives)
        assert_same(found.parameters, one.parameters)
        assert_same_history(found.history, one.history)


def test_logs_are_means_over_steps() -> None:
    each = run(seeded(qwen3), ROWS, batch=4, accumulate=2, max_steps=4)
    two = run(seeded(qwen3), ROWS, batch=4, accumulate=2, max_steps=4, logging_steps=2)
    assert_same(two.parameters, each.parameters, 0)
    for name in ("loss", "preference", "sft"):
        pairs = [sum(logs[name] for logs in each.history[i : i + 2]) / 2 for i in (0, 2)]
        assert [logs[name] for logs in two.history[:2]] == pytest.approx(pairs)
    assert two.history[0]["loss"] == pytest.approx(two.history[0]["preference"] + two.history[0]["sft"])


@pytest.mark.parametrize(("dropout", "stop"), [(0.0, 4), (0.3, 2), (0.3, 3)])
def test_a_resumed_run_is_an_unbroken_one(dropout: float, stop: int, tmp_path: Any) -> None:
    options = {"batch": 4, "accumulate": 2, "disable_dropout": False, "max_steps": 7, "use_reference": True}
    make = {"resid_pdrop": dropout, "attn_pdrop": dropout}
    folder = str(tmp_path)
    saving = {"save_strategy": "steps", "save_steps": stop}
    unbroken = run(seeded(gpt2, **make), ROWS, output_dir=folder, **saving, **options)
    again = run(seeded(gpt2, **make), ROWS, resume=f"{folder}/checkpoint-{stop}", **options)
    assert_same(again.parameters, unbroken.parameters, 0)
    assert_same_history(again.history[:-1], unbroken.history[:-1], 0)
    assert len(again.history) == 8
    weights = [logs["pair_weights"] for logs in unbroken.history[:-1]]
    assert min(weights[stop:]) < 1
    if dropout:
        plain = run(seeded(gpt2), ROWS, **options)
        assert plain.history[0]["loss"] != unbroken.history[0]["loss"]
    mine, right = (r.trainer.objective.similarity_weighting.state_dict() for r in (again, unbroken))
    torch.testing.assert_close(mine, right, rtol=0, atol=0, equal_nan=True)


def test_disable_dropout() -> None:
    make = {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}
    assert_same(run(seeded(gpt2, **make), ROWS).parameters, run(seeded(gpt2), ROWS).parameters, 0)
    assert_same(
        run(seeded(llama, attention_dropout=0.5), ROWS, max_steps=1).parameters,
        run(seeded(llama), ROWS, max_steps=1).parameters,
        0,
    )
    assert_same(
        run(seeded(t5, dropout_rate=0.5), ROWS, max_steps=1).parameters,
        run(seeded(t5), ROWS, max_steps=1).parameters,
        0,
    )


def test_reference() -> None:
    """A frozen copy, and a model that is given."""
    options = {**WHOLE, "max_steps": 3, "beta": 0.5, "length_normalized": False}

    def logps_of(model: Any) -> Any:
        plain = rx.RADDPOLoss()

        def reference(packed: Any) -> torch.Tensor:
            with torch.no_grad():
                states = session_states(model, packed)
                return plain(states.hidden, states.weight, packed.sessions, rows=states.rows).logps

        return reference

    for other in (None, seeded(llama)):
        reference = seeded(qwen3) if other is None else other
        model = seeded(qwen3).train()
        history = by_hand(model, ROWS, 3, reference=logps_of(reference), beta=0.5, length_normalized=False)
        extra = {} if other is None else {"ref_model": other}
        found = run(seeded(qwen3), ROWS, use_reference=other is None, extra=extra, **options)
        assert_same(found.parameters, dict(model.named_parameters()))
        assert (found.history[0]["rewards/chosen"] == 0) == (other is None)
        assert found.history[2]["rewards/margins"] == pytest.approx(history[2]["rewards/margins"], rel=1e-5)
        assert not any(parameter.requires_grad for parameter in found.trainer.ref_model.parameters())


def test_adapters_alone_are_trained() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    torch.manual_seed(3)
    model = get_peft_model(seeded(qwen3), config).train()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def reference(packed: Any) -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter():
            states = session_states(model, packed)
            return rx.RADDPOLoss()(states.hidden, states.weight, packed.sessions, rows=states.rows).logps

    by_hand(model, ROWS, 4, reference=reference)
    for checkpointing in (False, True):
        torch.manual_seed(3)
        found = run(
            seeded(qwen3),
            ROWS,
            **WHOLE,
            max_steps=4,
            use_reference=True,
            gradient_checkpointing=checkpointing,
            extra={"peft_config": config},
        )
        assert_same(found.parameters, dict(model.named_parameters()))
        assert found.trainer.ref_model is None
        for name, parameter in found.parameters.items():
            assert torch.equal(parameter, start[name]) != ("lora_" in name), name


@pytest.mark.parametrize("make", [qwen3, t5])
def test_gradient_checkpointing_changes_nothing(make: Any) -> None:
    plain = run(seeded(make), ROWS, max_steps=3)
    for reentrant in (False, True):
        kwargs = {"use_reentrant": reentrant}
        found = run(seeded(make), ROWS, max_steps=3, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
        assert_same(found.parameters, plain.parameters)
