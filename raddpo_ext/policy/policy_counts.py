"""policy_counts: what policy_loss divides by, known before the model runs."""

from __future__ import annotations

import torch
from torch import Tensor

from raddpo_ext import _check
from raddpo_ext.losses import loss_arguments
from raddpo_ext.losses.session import SessionBatch
from raddpo_ext.policy import policy_loss_op as op
from raddpo_ext.policy.group_advantages import EXPERTS


def policy_counts(
    sessions: SessionBatch,
    advantages: Tensor,
    *,
    experts: str = "group",
    aggregate: str = "sequence",
    count: str = "active",
) -> Tensor:
    """Count what :func:`policy_loss` divides by under ``reduction="mean"``.

    Summed over accumulated batches and ranks, with 0 replaced by 1, these are its ``normalizer``: the losses of the
    parts then add up to the loss of one big batch. Log-probs, gates and weights do not change them.

    Args:
        sessions: see :func:`policy_loss`, as all arguments. Groups without an advantage may be left out before.
        advantages: floating-point ``[C]`` or ``[C, L]``.
        experts: ``"group"`` or ``"nll"``.
        aggregate: ``"sequence"``, ``"token"`` or ``"constant"``.
        count: ``"active"`` or ``"all"``.

    Returns:
        float64 ``[2]``: the rows of the policy term, or their tokens under ``aggregate="token"``; and the tokens of the
        experts, of the NLL.

    Raises:
        ValueError, TypeError: naming the argument and the value.

    Example:
        >>> tokens = torch.tensor([[1, 2], [1, 3], [4, 2], [4, 5], [4, 6]])
        >>> groups = rx.SessionBatch(tokens, torch.full((5,), 2), torch.tensor([0, 3, 5]), torch.tensor([1, 1]))
        >>> advantages = torch.tensor([1.0, -0.5, -0.5, 0.0, 0.0])
        >>> counts = rx.policy_counts(groups, advantages)  # three rows, one of them an expert
        >>> counts  # torch.distributed.all_reduce(counts) on several ranks
        tensor([3., 2.], dtype=torch.float64)
        >>> normalizer = counts.clamp(min=1)
    """
    _check.instance(sessions, "sessions", SessionBatch)
    dtype = torch.promote_types(_check.float_tensor(advantages, "advantages").dtype, torch.float32)
    logps = torch.zeros(sessions.tokens.shape, dtype=dtype, device=sessions.device)
    groups = sessions.layout()
    return op.policy_loss(
        op.Arguments(
            logps,
            groups["tokens"],
            groups["lengths"],
            groups["offsets"],
            groups["num_positives"],
            loss_arguments.floats(advantages, "advantages", logps, logps.shape[: 1 + (advantages.dim() == 2)]),
            aggregate=_check.choice(aggregate, "aggregate", op.AGGREGATE),
            use_experts=_check.choice(experts, "experts", EXPERTS) == EXPERTS.index("group"),
            count_all=_check.choice(count, "count", op.COUNT) == op.COUNT.index("all"),
        )
    ).counts
