"""RADDPOConfig: the arguments of RADDPOTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

#: Fields that are options of :func:`raddpo_ext.rad_dpo_loss` of the same name.
LOSS_OPTIONS = (
    "beta",
    "gamma",
    "length_normalized",
    "protect",
    "aggregation",
    "weighting",
    "positives",
    "sft_weight",
    "level_weights",
    "label_smoothing",
)


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class RADDPOConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with what a preference run over sessions needs.

    The loss's options are those of :func:`raddpo_ext.rad_dpo_loss`; ``RADDPOConfig(**rx.PRESETS["s_dpo"])`` takes an
    objective by its name. An epoch's last optimizer step may have fewer batches: it is weighed like any other.

    Raises:
        ValueError: naming the option and the value. The trainer checks the loss's options.
    """

    learning_rate: float = _option(1e-6, "Initial learning rate of AdamW.")
    remove_unused_columns: bool = _option(False, "Must be off: the model's forward does not name the rows' columns.")
    report_to: None | str | list[str] = _option("none", "Where to report to.")
    logging_steps: float = _option(10, "Log every so many optimizer steps.")

    beta: float = _option(2.0, "Scale of the rewards.")
    gamma: float = _option(0.0, "Margin that the winner's reward is to keep, outside beta.")
    length_normalized: bool = _option(True, "Divide a candidate's reward by its length.")
    protect: str = _option("winner", "Common prefixes that are detached: 'winner', 'positives' or 'none'.")
    aggregation: str = _option("negatives", "How negatives meet: 'negatives' or 'margins'.")
    weighting: str = _option("loss", "Where pair weights enter: 'loss' or 'reward'.")
    positives: str = _option("winner", "Which positives act as the winner: 'winner', 'each' or 'pooled'.")
    sft_weight: float = _option(1.0, "Weight of the supervised loss.")
    level_weights: list[float] | None = _option(None, "Weight of each level's token in the supervised loss.")
    label_smoothing: float = _option(0.0, "Label smoothing of the preference.")
    normalize: str = _option("vocab", "Support of a token's softmax: 'vocab', 'level' or 'trie'.")

    similarity_weighting: bool = _option(True, "Weigh pairs by their similarity (RDRW).")
    similarity_window: int = _option(4096, "Similarities that RDRW takes its quantiles of.")
    use_reference: bool = _option(False, "Subtract a reference model's log-probs, as DPO does.")
    disable_dropout: bool = _option(True, "Switch the model's dropout off, as it is noise in a margin.")

    layout: str = _option("candidates", "Packing: 'candidates', or 'trie' to compute a shared prefix once.")
    max_length: int | None = _option(None, "Most tokens of prompt and candidate; default: the model's window.")
    pad_to_multiple_of: int | None = _option(None, "Make the packed rows' length a multiple of it.")

    eval_beam_width: int = _option(50, "Beams of the constrained retrieval in an evaluation.")
    eval_ks: list[int] = _option([5, 10, 50], "Cut-offs of recall and NDCG, at most eval_beam_width.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: it would remove the rows' candidates")
        if not self.eval_ks or max(self.eval_ks) > self.eval_beam_width:
            raise ValueError(
                f"eval_ks must name cut-offs up to eval_beam_width = {self.eval_beam_width}, got {self.eval_ks}"
            )
        if self.accelerator_config.dispatch_batches is None:
            # Packed batches cannot be cut up between ranks: each rank reads its own share of a stream.
            self.accelerator_config.dispatch_batches = False

    @property
    def loss_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LOSS_OPTIONS}
