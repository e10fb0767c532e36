"""SessionConfig: the arguments that the trainers over sessions share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

#: Options of TrainingArguments without effect here, with the only value allowed and the reason.
_UNUSED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the preference has its own, label_smoothing"),
    "batch_eval_metrics": (False, "an evaluation's metrics are sums over its rows already"),
    "eval_do_concat_batches": (True, "the metrics are sums over all batches' rows"),
    "include_for_metrics": ([], "the metrics are the trainer's own"),
}


@dataclass
class SessionConfig(TrainingArguments):
    """``transformers.TrainingArguments`` for training over sessions: what RADDPOConfig and PolicyConfig share."""

    # Options of TrainingArguments with other defaults.
    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be off: the model's forward does not name the rows' columns."}
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036  HfArgumentParser reads str off the second place
        default="none", metadata={"help": "Where to report to."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Number of optimizer steps between logs."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Needed only if some trainable parameters are not used for text."}
    )

    # Dropout and packing.
    disable_dropout: bool = field(
        default=True, metadata={"help": "Disable the model's dropout, which is noise in a loss that compares."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Maximum tokens of prompt plus candidate; default: the model's window."}
    )
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Pad packed rows to a multiple of this."})

    # Evaluation.
    eval_beam_width: int = field(
        default=50, metadata={"help": "Beam width of the constrained retrieval in an evaluation."}
    )
    eval_ks: list[int] = field(
        default_factory=lambda: [5, 10, 50], metadata={"help": "Cut-offs of recall and NDCG, at most eval_beam_width."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: it would remove the rows' candidates")
        if not self.eval_ks or max(self.eval_ks) > self.eval_beam_width:
            raise ValueError(
                f"eval_ks must name cut-offs up to eval_beam_width = {self.eval_beam_width}, got {self.eval_ks}"
            )
        for name, (neutral, why) in _UNUSED.items():
            if getattr(self, name) != neutral:
                raise ValueError(f"{name} must be {neutral}, got {getattr(self, name)}: {why}")
        loading: Any = self.accelerator_config
        if loading.dispatch_batches:
            raise ValueError("accelerator_config.dispatch_batches must be False: packed batches cannot be split")
        loading.dispatch_batches = False  # each rank reads its share of a stream
