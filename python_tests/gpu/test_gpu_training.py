"""RADDPOTrainer on a CUDA device: its steps and metrics against the CPU's. Skipped without a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.on_gpu import NEEDS_GPU, no_synchronisation

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from support.tiny_models import qwen3, seeded, session_rows
from support.trainer_runs import Run, assert_same, run, trainer_for
from test_trainer import catalogue, catalogue_rows

pytestmark = NEEDS_GPU
ROWS = session_rows(12)
#: As TrainingArguments has them: batches are pinned.
DEFAULTS: dict[str, Any] = {"use_cpu": False, "dataloader_pin_memory": True}


def trained(folder: Path, rows: Any = ROWS, **options: Any) -> Run:
    return run(seeded(qwen3), rows, output_dir=str(folder), max_steps=2, **options)


@pytest.mark.parametrize("weighting", [True, False])
def test_trains_as_on_the_cpu(tmp_path: Path, weighting: bool) -> None:
    options = {"similarity_weighting": weighting, "sft_weight": 0.5}
    expected, got = trained(tmp_path, **options), trained(tmp_path, **options, **DEFAULTS)
    assert {value.device.type for value in got.parameters.values()} == {"cuda"}
    assert_same({name: value.cpu() for name, value in got.parameters.items()}, expected.parameters, 1e-3)
    for logs, right in zip(got.history, expected.history, strict=True):
        assert logs == pytest.approx(right, rel=1e-3, abs=1e-4)


def test_evaluates_as_on_the_cpu(tmp_path: Path) -> None:
    index, _ = catalogue()
    rows = catalogue_rows(7)
    found = []
    for options in ({}, DEFAULTS):
        extra = {"index": index, "eval_dataset": rows}
        found.append(trainer_for(seeded(qwen3), ROWS, output_dir=str(tmp_path), extra=extra, **options).evaluate())
    timings = {name for name in found[0] if name.endswith(("runtime", "per_second", "time"))}
    expected, got = ({name: value for name, value in one.items() if name not in timings} for one in found)
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_loss_never_synchronises(tmp_path: Path) -> None:
    """From a pinned batch to the gradients."""
    trainer = trainer_for(seeded(qwen3), ROWS, output_dir=str(tmp_path), **DEFAULTS)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["packed"].sessions.device.type == "cuda"
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)
    with no_synchronisation():
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).backward()
