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

#: Options of TrainingArguments without effect here, with the only value allowed and the reason.
_UNUSED: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "the preference's own is label_smoothing"),
    "batch_eval_metrics": (False, "an evaluation's metrics are sums over its rows already"),
    "eval_do_concat_batches": (True, "the metrics are sums over all batches' rows"),
    "include_for_metrics": ([], "the metrics are the trainer's own"),
}


@dataclass
class RADDPOConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with the options of a preference run over sessions.

    The loss's options are those of :func:`raddpo_ext.rad_dpo_loss`; ``RADDPOConfig(**rx.PRESETS["s_dpo"])`` selects an
    objective by its name. An epoch's last optimizer step may have fewer batches and has the weight of any other.

    Raises:
        ValueError: naming the option and the value. The trainer checks the loss's options.

    Example:
        >>> from raddpo_ext.integrations.transformers import RADDPOConfig
        >>> args = RADDPOConfig(output_dir="run", use_cpu=True, **rx.PRESETS["s_dpo"])
        >>> args.beta == rx.PRESETS["s_dpo"]["beta"]
        True
    """

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

    # The loss, see LOSS_OPTIONS; and over which tokens a softmax runs.
    beta: float = field(default=2.0, metadata={"help": "Scale of the rewards."})
    gamma: float = field(default=0.0, metadata={"help": "Target margin of the winner's reward, not scaled by beta."})
    length_normalized: bool = field(default=True, metadata={"help": "Divide a candidate's reward by its length."})
    protect: str = field(
        default="winner", metadata={"help": "Which common prefixes are detached: 'winner', 'positives' or 'none'."}
    )
    aggregation: str = field(
        default="negatives", metadata={"help": "How negatives are combined: 'negatives' or 'margins'."}
    )
    weighting: str = field(default="loss", metadata={"help": "Where pair weights enter: 'loss' or 'reward'."})
    positives: str = field(
        default="winner", metadata={"help": "Which positives act as the winner: 'winner', 'each' or 'pooled'."}
    )
    sft_weight: float = field(default=1.0, metadata={"help": "Weight of the supervised loss."})
    level_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each level's token in the supervised loss."}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Label smoothing of the preference."})
    normalize: str = field(
        default="vocab", metadata={"help": "Support of a token's softmax: 'vocab', 'level' or 'trie'."}
    )

    # Pair weights, the reference and dropout.
    similarity_weighting: bool = field(default=True, metadata={"help": "Weight pairs by their similarity (RDRW)."})
    similarity_window: int = field(
        default=4096, metadata={"help": "Number of similarities that RDRW takes its quantiles from."}
    )
    use_reference: bool = field(
        default=False, metadata={"help": "Subtract a reference model's log-probs, as DPO does."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Disable the model's dropout, which is noise in a margin."}
    )

    # Packing.
    layout: str = field(
        default="candidates", metadata={"help": "Packing: 'candidates', or 'trie' to compute a shared prefix once."}
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

    @property
    def loss_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LOSS_OPTIONS}
