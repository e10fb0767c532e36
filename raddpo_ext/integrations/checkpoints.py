"""Resuming from complete checkpoints only: a run may be killed while it writes one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length
from transformers.utils import logging

_logger = logging.get_logger(__name__)


class CheckpointedTrainer(Trainer):
    """``transformers.Trainer`` that resumes only from complete checkpoints.

    ``Trainer`` writes a checkpoint's ``trainer_state.json`` last, so a readable one marks a complete checkpoint.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``, but ``resume_from_checkpoint=True`` takes the last complete checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint = True, but {self.args.output_dir} holds no complete checkpoint"
                )
        if resume_from_checkpoint:
            self._check_stream(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_stream(self, checkpoint: Path) -> None:
        """Raise ValueError for a stream whose order ``Trainer`` would lose: it takes all steps for ones of the first
        pass."""
        if self.args.ignore_data_skip or has_length(self.train_dataset) or _unreadable(checkpoint) is not None:
            return
        epoch = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["epoch"]
        if epoch >= 1:
            raise ValueError(
                f"resume_from_checkpoint = {str(checkpoint)!r} was saved in pass {int(epoch) + 1} over a stream, whose "
                "order is resumed in its first pass only: make one long pass (dataset.repeat(n) of datasets), or begin "
                "a pass anew with args.ignore_data_skip = True"
            )

    def _save_rng_state(self, output_dir: str) -> None:
        """Overridden so that every rank's file exists before rank 0 writes ``trainer_state.json``."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Overridden to mark an overwritten checkpoint as incomplete, and to name the folder if a write fails."""
        checkpoint = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:  # an older checkpoint of this step is incomplete while it is overwritten
            (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # torch's and safetensors' errors do not name the folder, and often no cause
            if _unreadable(checkpoint) is None:
                raise  # the checkpoint is complete: a later action failed, such as the upload to the hub
            raise RuntimeError(f"{checkpoint} could not be written: {error}; is the disk full?") from error


def last_whole_checkpoint(folder: str) -> str | None:
    """The last complete ``checkpoint-<step>`` in a run's folder, or None; warns of later ones that are incomplete."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("checkpoint-*"))
    for _, path in sorted(((int(match[1]), path) for match, path in found if match), reverse=True):
        error = _unreadable(path)
        if error is None:
            return str(path)
        _logger.warning("%s is incomplete and is skipped: %s", path, error)
    return None


def _unreadable(checkpoint: Path) -> Exception | None:
    """Why the file that is written last cannot be read, or None for a complete checkpoint."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError) as error:
        return error
    return None
