"""RADDPOConfig: the arguments of RADDPOTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raddpo_ext.integrations.session_config import SessionConfig

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
#: Fields that are options of :class:`SessionCollator` of the same name.
PAGE_OPTIONS = ("page", "separator", "supervise_separator", "max_items")


@dataclass
class RADDPOConfig(SessionConfig):
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

    # Pair weights and the reference.
    similarity_weighting: bool = field(default=True, metadata={"help": "Weight pairs by their similarity (RDRW)."})
    similarity_window: int = field(
        default=4096, metadata={"help": "Number of similarities that RDRW takes its quantiles from."}
    )
    use_reference: bool = field(
        default=False, metadata={"help": "Subtract a reference model's log-probs, as DPO does."}
    )
    layout: str = field(
        default="candidates", metadata={"help": "Packing: 'candidates', or 'trie' to compute a shared prefix once."}
    )

    # Next-token prediction of the positives, in place of the preference.
    page: str | None = field(
        default=None, metadata={"help": "Learn the positives: 'set', each after the prompt, or 'sequence', one page."}
    )
    separator: int | None = field(default=None, metadata={"help": "Token id between two items of a page."})
    supervise_separator: bool = field(default=True, metadata={"help": "Also predict the separators."})
    max_items: int | None = field(default=None, metadata={"help": "Maximum items of a page, the first ones."})

    @property
    def loss_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in LOSS_OPTIONS}
