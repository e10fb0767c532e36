"""The policy loss in plain PyTorch, one row after another; arguments as in raddpo_ext.policy_loss. Autograd computes
the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from raddpo_ext.losses.session import SessionBatch
from raddpo_ext.policy.policy_loss import PolicyLossOutput
from raddpo_ext.reference.sessions import Sid, common_prefix, negative_rows, positive_rows, sids_of

MAX_GAP = 20.0  # of two log-probs in an exponential


def policy_loss(
    logps: Tensor,
    sessions: SessionBatch,
    advantages: Tensor,
    *,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    weights: Tensor | None = None,
    gates: Tensor | None = None,
    objective: str = "clip",
    ratio: str = "token",
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    delta: float = 0.1,
    kl: str = "k3",
    kl_weight: float = 0.0,
    nll_weight: float = 0.0,
    experts: str = "group",
    protect: str = "none",
    aggregate: str = "sequence",
    max_length: float | None = None,
    count: str = "active",
    level_weights: Sequence[float] | Tensor | None = None,
    reduction: str = "mean",
    normalizer: tuple[float | Tensor, float | Tensor] | None = None,
) -> PolicyLossOutput:
    """See :func:`raddpo_ext.policy_loss`."""
    sids, zero, levels = sids_of(sessions), logps[:0].sum(), logps.shape[1]
    plain = (advantages if advantages.dim() == 2 else advantages[:, None].expand(logps.shape)).to(logps).detach()
    gated = plain if gates is None else plain * gates.to(logps).detach()
    old = (logps if old_logps is None else old_logps).detach()
    per_level = logps.new_ones(levels) if level_weights is None else torch.as_tensor(level_weights).to(logps)
    policies: list[Tensor] = []  # a sum per group, as the next two
    kls: list[Tensor] = []
    nlls: list[Tensor] = []
    num_rows = num_tokens = num_expert_tokens = below = above = 0
    drift = 0.0
    for s in range(sessions.num_sessions):
        policy, divergence, nll = zero, zero, zero
        rows = _policy_rows(sessions, s, sids, experts)
        if count == "active" and not any(plain[i, : len(sids[i])].any() for i in rows):
            policies, kls, nlls = [*policies, zero], [*kls, zero], [*nlls, zero]
            continue
        for i in rows:
            length = len(sids[i])
            advantage, tokens = gated[i, :length], logps[i, :length]
            share = 1.0 if weights is None else float(weights[i])  # of each token in the sum
            if aggregate != "token":
                share /= length if aggregate == "sequence" else levels if max_length is None else max_length
            free = tokens
            if protect == "positives":
                free = torch.where(_protected(i, rows, sids, gated), tokens.detach(), tokens)
            new, before = _compared(free, ratio), _compared(old[i, :length], ratio)
            term = _terms(new, before, advantage, objective, clip, dual_clip, delta)
            policy = policy + share * term.sum()
            if ref_logps is not None:
                divergence = divergence + share * _kl(tokens - ref_logps[i, :length].detach(), kl).sum()
            num_rows, num_tokens = num_rows + 1, num_tokens + length
            down, up = _clipped(new.detach(), before, advantage, objective, clip, dual_clip, delta)
            below, above = below + down, above + up
            gap = tokens.detach() - old[i, :length]
            drift += float((_exp(gap) - 1 - gap).sum())
        for i in positive_rows(sessions, s):
            length = len(sids[i])
            nll = nll - sum((w * logp for w, logp in zip(per_level, logps[i, :length], strict=False) if w > 0), zero)
            num_expert_tokens += length
        policies, kls, nlls = [*policies, policy], [*kls, divergence], [*nlls, nll]

    counts = (num_tokens if aggregate == "token" else num_rows, num_expert_tokens)
    divisors = counts if normalizer is None else normalizer
    policy, divergence = (_reduced(terms, zero, divisors[0], reduction) for terms in (policies, kls))
    nll = _reduced(nlls, zero, divisors[1], reduction)
    loss = policy
    if kl_weight != 0:
        loss = loss + kl_weight * divergence
    if nll_weight != 0:
        loss = loss + nll_weight * nll
    ratios = [_mean_ratio(logps[i, : len(sid)].detach(), old[i, : len(sid)], ratio) for i, sid in enumerate(sids)]
    return PolicyLossOutput(
        loss=loss,
        policy=policy.detach(),
        kl=divergence.detach(),
        nll=nll.detach(),
        ratios=logps.new_tensor(ratios),
        clipped=logps.new_tensor([below, above]) / max(num_tokens, 1),
        approx_kl=logps.new_tensor(drift / max(num_tokens, 1)),
    )


def _policy_rows(sessions: SessionBatch, session: int, sids: list[Sid], experts: str) -> list[int]:
    """A group's rows in the policy term: under "group" a rollout that equals an expert is left out."""
    truth = positive_rows(sessions, session) if experts == "group" else []
    known = {sids[i] for i in truth}
    rows = truth + [i for i in negative_rows(sessions, session) if sids[i] not in known]
    return [i for i in rows if sids[i]]


def _protected(row: int, rows: list[int], sids: list[Sid], advantages: Tensor) -> Tensor:
    """The tokens of a row that pull down a prefix which another row pushes up."""
    protected = torch.zeros(len(sids[row]), dtype=torch.bool, device=advantages.device)
    for other in rows:
        shared = common_prefix(sids[row], sids[other])
        protected[:shared] |= (advantages[row, :shared] < 0) & (advantages[other, :shared] > 0)
    return protected


def _compared(logps: Tensor, ratio: str) -> Tensor:
    """What each token compares with the old policy: its own log-prob, the row's mean with the token's gradient, or the
    row's sum."""
    if ratio == "sequence":
        return logps.detach().mean() + logps - logps.detach()
    return logps.sum().expand(logps.shape) if ratio == "item" else logps


def _exp(gap: Tensor) -> Tensor:
    return gap.clamp(-MAX_GAP, MAX_GAP).exp()


def _bound_old(new: Tensor, old: Tensor, advantage: Tensor, objective: str, high: float, delta: float) -> Tensor:
    """The old log-probs as ECPO and GBPO raise them."""
    current = new.detach()
    if objective == "ecpo":
        return torch.maximum(current - math.log(high + delta), old)
    if objective == "gbpo":
        return torch.maximum(old, torch.where(advantage < 0, (-torch.expm1(current.clamp(max=0))).log(), current))
    return old


def _terms(
    new: Tensor,
    old: Tensor,
    advantage: Tensor,
    objective: str,
    clip: tuple[float, float],
    dual_clip: float | None,
    delta: float,
) -> Tensor:
    """The terms of a row's tokens."""
    low, high = 1 - clip[0], 1 + clip[1]
    if objective == "reinforce":
        return -(new - new.detach()).exp() * advantage
    rho = _exp(new - _bound_old(new, old, advantage, objective, high, delta))
    if objective == "cispo":
        return -rho.detach().clamp(max=high) * advantage * new
    if objective == "sapo":
        temperature = torch.where(advantage > 0, new.new_tensor(clip[0]), new.new_tensor(clip[1]))
        return -4 / temperature * torch.sigmoid(temperature * (rho - 1)) * advantage
    if objective == "gbpo":
        return -rho * advantage
    least = torch.minimum(rho * advantage, rho.clamp(low, high) * advantage)
    if dual_clip is not None:
        least = torch.where(advantage < 0, torch.maximum(least, dual_clip * advantage), least)
    return -least


def _clipped(
    new: Tensor,
    old: Tensor,
    advantage: Tensor,
    objective: str,
    clip: tuple[float, float],
    dual_clip: float | None,
    delta: float,
) -> tuple[int, int]:
    """How many tokens' ratios the clip holds from below, and from above."""
    if objective not in ("clip", "cispo", "ecpo"):
        return 0, 0
    low, high = 1 - clip[0], 1 + clip[1]
    rho = _exp(new - _bound_old(new, old, advantage, objective, high, delta))
    if objective == "cispo":
        return 0, int(((rho > high) & (advantage != 0)).sum())
    above = (advantage > 0) & (rho > high)
    if dual_clip is not None:
        above |= (advantage < 0) & (rho > dual_clip)
    return int(((advantage < 0) & (rho < low)).sum()), int(above.sum())


def _kl(gap: Tensor, kl: str) -> Tensor:
    if kl == "k1":
        return gap
    if kl == "k2":
        return gap**2 / 2
    held = gap.clamp(min=-MAX_GAP)
    return torch.expm1(-held) + held


def _mean_ratio(logps: Tensor, old: Tensor, ratio: str) -> float:
    return float(_exp(_compared(logps, ratio) - _compared(old, ratio)).mean()) if len(logps) else 1.0


def _reduced(terms: list[Tensor], zero: Tensor, count: float | Tensor, reduction: str) -> Tensor:
    total = torch.stack([zero, *terms])[1:]  # also stacks no terms
    if reduction == "none":
        return total
    return total.sum() / (count if reduction == "mean" and count != 0 else 1)
