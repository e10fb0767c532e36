"""PolicyConfig: the arguments of PolicyTrainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raddpo_ext import _check
from raddpo_ext.integrations.session_config import SessionConfig
from raddpo_ext.policy.policy_loss import POLICY_PRESETS

#: Fields that are options of :func:`raddpo_ext.policy_loss` of the same name; None: the preset's, or the function's.
LOSS_OPTIONS = (
    "objective",
    "ratio",
    "clip",
    "dual_clip",
    "delta",
    "kl",
    "kl_weight",
    "nll_weight",
    "protect",
    "aggregate",
    "count",
    "level_weights",
)
ROLLOUTS = ("sample", "independent", "beams")
_SUPPORTS = ("trie", "vocab")
_EXPERTS = ("none", "group", "nll")


@dataclass
class PolicyConfig(SessionConfig):
    """``transformers.TrainingArguments`` with the options of policy training over SIDs.

    ``preset`` names one of :data:`raddpo_ext.POLICY_PRESETS`; other options of :func:`raddpo_ext.policy_loss` are added
    to it, or replace its own. A batch is one of prompts: a step draws
    ``per_device_train_batch_size * num_generations`` rollouts per process and accumulated batch.

    Raises:
        ValueError: naming the option and the value. The trainer checks the loss's options.

    Example:
        >>> from raddpo_ext.integrations.transformers import PolicyConfig
        >>> args = PolicyConfig(output_dir="run", use_cpu=True, preset="dr_grpo", clip=[0.1, 0.3])
        >>> args.loss_options
        {'clip': [0.1, 0.3], 'aggregate': 'constant', 'kl_weight': 0.0, 'experts': 'group'}
        >>> args.advantage_options["scale"]
        'none'
    """

    # Rollouts.
    rollouts: str = field(
        default="sample",
        metadata={
            "help": "How rollouts are drawn: 'sample' (distinct SIDs, weighted), 'independent' (with replacement) or "
            "'beams' (the best SIDs of a beam search, which are no sample)."
        },
    )
    num_generations: int = field(default=8, metadata={"help": "Number of rollouts per prompt."})
    num_iterations: int = field(default=1, metadata={"help": "Number of optimizer steps per batch of rollouts."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the rollouts and of the log-probs."})
    normalize: str = field(
        default="trie", metadata={"help": "Support of a token's softmax: 'trie', as the rollouts', or 'vocab'."}
    )
    experts: str | None = field(
        default=None,
        metadata={
            "help": "The rows' positives: 'none' (only reward_fn and the evaluation see them), 'group' (they join the "
            "rollouts) or 'nll' (only their likelihood is trained). Default: the preset's, else 'none'."
        },
    )

    # Advantages, see group_advantages.
    scale: str | None = field(
        default=None,
        metadata={
            "help": "'group', 'batch' (of all processes) or 'none'. Default: 'none' for 'dr_grpo', else 'group'."
        },
    )
    baseline: str = field(default="mean", metadata={"help": "'mean' of the group, or 'loo': the mean of the others."})
    credit: str = field(default="sequence", metadata={"help": "'sequence', 'siblings' or 'marginal'."})
    blend: float = field(default=1.0, metadata={"help": "Share of the siblings' advantage with credit='siblings'."})

    # The loss, see LOSS_OPTIONS.
    preset: str = field(default="grpo", metadata={"help": "Published objective, a key of POLICY_PRESETS."})
    objective: str | None = field(default=None, metadata={"help": "Term of a token."})
    ratio: str | None = field(default=None, metadata={"help": "What the ratio compares: 'token', 'sequence', 'item'."})
    clip: list[float] | None = field(default=None, metadata={"help": "How far the ratio may fall and rise."})
    dual_clip: float | None = field(default=None, metadata={"help": "Bound of the ratio for negative advantages."})
    delta: float | None = field(default=None, metadata={"help": "Slack of objective='ecpo'."})
    kl: str | None = field(default=None, metadata={"help": "Estimator of the KL: 'k1', 'k2' or 'k3'."})
    kl_weight: float = field(
        default=0.0, metadata={"help": "Weight of the KL to a reference model; 0 needs no reference."}
    )
    nll_weight: float | None = field(default=None, metadata={"help": "Weight of the experts' likelihood."})
    protect: str | None = field(default=None, metadata={"help": "'positives' spares prefixes of better rows."})
    aggregate: str | None = field(default=None, metadata={"help": "'sequence', 'token' or 'constant'."})
    count: str | None = field(default=None, metadata={"help": "Groups in the divisors: 'active' or 'all'."})
    level_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each level's token in the experts' likelihood."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in POLICY_PRESETS:
            raise ValueError(f"preset must be one of {sorted(POLICY_PRESETS)}, got {self.preset!r}")
        _check.choice(self.rollouts, "rollouts", ROLLOUTS)
        _check.choice(self.normalize, "normalize", _SUPPORTS)
        _check.integer(self.num_generations, "num_generations", 2)
        _check.integer(self.num_iterations, "num_iterations", 1)
        _check.not_negative(self.kl_weight, "kl_weight")
        if _check.positive(self.temperature, "temperature") != 1 and self.rollouts == "beams":
            raise ValueError(f"temperature must be 1 with rollouts = 'beams', got {self.temperature}")
        if self.experts is None:
            self.experts = POLICY_PRESETS[self.preset].get("experts", "none")
        _check.choice(self.experts, "experts", _EXPERTS)
        if self.experts == "none" and (self.nll_weight or self.level_weights):
            name = "nll_weight" if self.nll_weight else "level_weights"
            raise ValueError(f"{name} needs experts = 'group' or 'nll', got 'none'")
        if self.scale is None:
            self.scale = "none" if self.preset == "dr_grpo" else "group"

    @property
    def loss_options(self) -> dict[str, Any]:
        """The arguments of :func:`raddpo_ext.policy_loss`: the preset, with the fields that are given."""
        given = {name: getattr(self, name) for name in LOSS_OPTIONS if getattr(self, name) is not None}
        options = {**POLICY_PRESETS[self.preset], **given, "experts": self._counted_experts}
        if self.experts == "none":
            options.pop("nll_weight", None)
        return options

    @property
    def advantage_options(self) -> dict[str, Any]:
        """The arguments of :func:`raddpo_ext.group_advantages`."""
        names = ("scale", "baseline", "credit", "blend")
        return {**{name: getattr(self, name) for name in names}, "experts": self._counted_experts}

    @property
    def _counted_experts(self) -> str:
        """``experts`` as the two functions take it. Without experts nothing depends on it."""
        return "nll" if self.experts == "nll" else "group"
