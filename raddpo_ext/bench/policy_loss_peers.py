"""The policy loss with its gradient, ours and the same in plain torch.

- ``vectorised`` is elementwise over ``[rows, tokens]`` with a mask, as trainers of language models write it. It has the
  rows of active groups prepared.
- ``with_metrics`` adds what ours returns beside the loss: the rows' ratios, the clipped shares and the estimated KL.

None of these minds experts, duplicates or protected prefixes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raddpo_ext.bench.policy_loss_cases import KL_WEIGHT, Batch, Step
from raddpo_ext.policy.policy_loss import POLICY_PRESETS, policy_loss


def ours(batch: Batch) -> Step:
    options = POLICY_PRESETS[batch.case.preset] | {
        "old_logps": batch.old_logps,
        "ref_logps": batch.ref_logps,
        "kl_weight": KL_WEIGHT if batch.case.ref else 0.0,
        "experts": "nll",
    }
    return batch.differentiate(lambda logps: policy_loss(logps, batch.sessions, batch.advantages, **options).loss)


def _in_loss(batch: Batch) -> Tensor:
    """The rollouts' tokens in groups with an advantage."""
    owners, rollout = batch.sessions.owners(), ~batch.sessions.is_positive()
    live = (batch.advantages != 0) & rollout
    active = torch.zeros(batch.sessions.num_sessions, dtype=torch.bool, device=owners.device)
    active[owners[live]] = True
    return batch.sessions.mask() & (active[owners] & rollout)[:, None]


def _terms(batch: Batch, mask: Tensor, logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minus the terms of the tokens, their log-ratios and the bounds of the ratio."""
    options = POLICY_PRESETS[batch.case.preset]
    low, high = (bound(value) for bound, value in zip((lambda x: 1 - x, lambda x: 1 + x), options["clip"], strict=True))
    gap = logps - batch.old_logps
    if options.get("ratio") == "sequence":
        gap = ((gap * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None].expand(gap.shape)
    rho, advantages = gap.exp(), batch.advantages[:, None]
    if options.get("objective") == "cispo":
        terms = rho.clamp(max=high).detach() * advantages * logps
    else:
        terms = torch.minimum(rho * advantages, rho.clamp(low, high) * advantages)
    if batch.ref_logps is not None:
        x = batch.ref_logps - logps
        terms = terms - KL_WEIGHT * (x.exp() - x - 1)
    return terms, gap, torch.tensor([low, high])


def _loss(batch: Batch, mask: Tensor, terms: Tensor) -> Tensor:
    if POLICY_PRESETS[batch.case.preset].get("aggregate") == "token":
        return -(terms * mask).sum() / mask.sum()
    means = (terms * mask).sum(1) / mask.sum(1).clamp(min=1)
    return -means.sum() / mask.any(1).sum()


def vectorised(batch: Batch) -> Step:
    mask = _in_loss(batch)
    return batch.differentiate(lambda logps: _loss(batch, mask, _terms(batch, mask, logps)[0]))


def with_metrics(batch: Batch) -> Step:
    mask, advantages = _in_loss(batch), batch.advantages[:, None]

    def loss(logps: Tensor) -> Tensor:
        terms, gap, bounds = _terms(batch, mask, logps)
        with torch.no_grad():
            rho, tokens = gap.exp(), mask.sum()
            (rho * mask).sum(1) / mask.sum(1).clamp(min=1)
            ((rho < bounds[0]) & (advantages < 0) & mask).sum() / tokens
            ((rho > bounds[1]) & (advantages > 0) & mask).sum() / tokens
            ((rho - 1 - gap) * mask).sum() / tokens
        return _loss(batch, mask, terms)

    return batch.differentiate(loss)


def bare_bytes(batch: Batch) -> Callable[[], Tensor]:
    """Copy as many bytes as forward and backward must move: log-probs, old and reference ones, tokens, lengths and the
    saved gradient are read; ratios, the saved gradient and the gradient written."""
    sessions, size, rows = batch.sessions, batch.logps.nbytes, batch.advantages.nbytes
    read = (3 + batch.case.ref) * size + sessions.tokens.nbytes + sessions.lengths.nbytes + rows
    there, here = torch.zeros(2, (read + 2 * size + rows) // 2, dtype=torch.uint8, device=batch.logps.device)
    return lambda: here.copy_(there)


METHODS: dict[str, Callable[[Batch], Step]] = {"ours": ours, "vectorised": vectorised, "with_metrics": with_metrics}
