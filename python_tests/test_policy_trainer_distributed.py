"""PolicyTrainer on two ranks, by DDP and by FSDP2: what one process with the whole batch does."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
from support.distributed import on_ranks
from support.policy_runs import prompt_rows, run_policy
from support.tiny_models import qwen3, seeded
from support.trainer_runs import assert_same, assert_same_history
from test_trainer_distributed import KINDS, join

pytestmark = pytest.mark.slow

STEPS = 4
# Rank 0 has no live group in the first step, and rank 1 alone has a long prompt in the second.
ROWS = [{**row, "items": [] if i < 4 else row["items"]} for i, row in enumerate(prompt_rows(8 * STEPS))]
ROWS[13]["prompt_ids"] = [20 + i % 9 for i in range(70)]


def model() -> Any:
    return seeded(qwen3, max_position_embeddings=200)


def ways() -> dict[str, dict[str, Any]]:
    """Of each run the options on two ranks that one process has otherwise."""
    from peft import LoraConfig

    adapters = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
    return {
        "plain": {"batch": 4},
        "accumulated": {"batch": 2, "accumulate": 2, "preset": "eg_grpo", "scale": "batch"},
        "iterated": {"batch": 4, "num_iterations": 2, "kl_weight": 0.5, "aggregate": "token"},
        "adapters": {"batch": 4, "kl_weight": 0.5, "preset": "grpo_sr", "extra": adapters},
    }


def rank(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, wrapper in KINDS.items():
        options = {"max_steps": STEPS, **join(kind == "FSDP2")}
        for way, more in ways().items():
            made = run_policy(model(), ROWS, **more, **options)
            assert isinstance(made.trainer.model_wrapped, wrapper)
            found[f"{kind}, {way}"] = made.parameters, made.history
        saved = {"output_dir": f"{folder}/{kind}", "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
        options = {**options, "batch": 4, "num_iterations": 2, "optim": "adamw_torch"}
        unbroken = run_policy(model(), ROWS, **{**options, **saved})
        again = run_policy(model(), ROWS, resume=f"{folder}/{kind}/checkpoint-3", **options)
        assert_same(again.parameters, unbroken.parameters, 0)
        assert_same_history(again.history[:-1], unbroken.history[:-1], 0)
    return found


def test_equals_one_process(tmp_path: Any) -> None:
    every = on_ranks(rank, str(tmp_path))
    for way, more in ways().items():
        one = run_policy(model(), ROWS, max_steps=STEPS, **{**more, "batch": 8, "accumulate": 1})
        assert 0 < one.history[0]["active"] <= 0.5
        for found in every:
            for kind in KINDS:
                parameters, history = found[f"{kind}, {way}"]
                assert_same(parameters, one.parameters)
                assert_same_history(history, one.history)
