"""Checkpoints of a run that are whole or passed over: one may be being written when its process is killed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

_logger = logging.get_logger(__name__)


class CheckpointedTrainer(Trainer):
    """``transformers.Trainer``, which resumes from checkpoints only that were written to their end.

    It writes a checkpoint's ``trainer_state.json`` after everything else, so that this file tells.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """``resume_from_checkpoint=True`` takes the last checkpoint that is whole. Else as ``Trainer.train``."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint = True, but {self.args.output_dir} holds no complete checkpoint"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Every rank's is there before rank 0 goes on to ``trainer_state.json``."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:  # an older one of this step, which is overwritten, is not whole meanwhile
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # torch's and safetensors' own say neither where nor, often, why
            if _unreadable(checkpoint) is None:
                raise  # it is whole: what failed came after it, such as the hub
            raise RuntimeError(f"{checkpoint} could not be written: {error}; is the disk full?") from error


def last_whole_checkpoint(folder: str) -> str | None:
    """The ``checkpoint-<step>`` in a run's folder of the latest step that is whole, or None; warns of later ones."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("checkpoint-*"))
    for _, path in sorted(((int(match[1]), path) for match, path in found if match), reverse=True):
        error = _unreadable(path)
        if error is None:
            return str(path)
        _logger.warning("%s is incomplete and is skipped: %s", path, error)
    return None


def _unreadable(checkpoint: Path) -> Exception | None:
    """Why the file that is written last cannot be read, or None where the checkpoint is whole."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError) as error:
        return error
    return None
