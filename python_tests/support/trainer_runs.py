"""Short runs of RADDPOTrainer, of one process or of several, that tests compare."""

from __future__ import annotations

import tempfile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raddpo_ext.integrations.transformers import RADDPOConfig, RADDPOTrainer

OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "optim": "sgd",  # Adam divides by tiny gradients and blows rounding up
    "learning_rate": 0.01,
    "lr_scheduler_type": "linear",
    "max_steps": 5,
    "logging_steps": 1,
    "save_strategy": "no",
    "similarity_window": 12,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "eval_beam_width": 20,
    "eval_ks": [1, 5],
}
# Timings, and the share of an epoch, which counts batches.
_OTHER = ("runtime", "per_second", "flos", "epoch")


class Run(NamedTuple):
    parameters: dict[str, Tensor]
    history: list[dict[str, float]]
    trainer: Any


def trainer_for(
    model: Any, rows: Any, *, output_dir: str, batch: int = 8, accumulate: int = 1, extra: Any = None, **options: Any
) -> RADDPOTrainer:
    config = RADDPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=accumulate,
        **{**OPTIONS, **options},
    )
    return RADDPOTrainer(model, config, train_dataset=rows, **(extra or {}))


def run(model: Any, rows: Any, *, output_dir: str | None = None, resume: Any = None, **options: Any) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(model, rows, output_dir=output_dir or folder, **options)
        trainer.train(resume_from_checkpoint=resume)
    return Run(parameters_of(trainer.model), without_timings(trainer.state.log_history), trainer)


def without_timings(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in logs.items() if not name.endswith(_OTHER)} for logs in history]


def parameters_of(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Each parameter to ``tolerance`` of its largest entry."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        right = right.detach()
        scale = float(right.abs().max())
        torch.testing.assert_close(
            found[name], right, rtol=tolerance, atol=tolerance * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_same_history(found: list[dict], expected: list[dict], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for logs, right in zip(found, expected, strict=True):
        assert logs.keys() == right.keys()
        for name, value in right.items():
            assert abs(logs[name] - value) <= tolerance * max(abs(value), 1), (name, logs[name], value)
