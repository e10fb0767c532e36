"""The session losses in plain loops over sessions, positives and negatives. Autograd computes the gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from raddpo_ext.losses.rad_dpo_loss import SessionLossOutput
from raddpo_ext.losses.session import SessionBatch
from raddpo_ext.reference.sessions import Sid, common_prefix, negative_rows, positive_rows, sids_of

Number = float | int | Tensor
PairWeights = dict[tuple[int, int], Tensor]  # by the rows of the pair's positive and negative


def rad_dpo_loss(
    logps: Tensor,
    sessions: SessionBatch,
    *,
    ref_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    beta: float = 2.0,
    gamma: float = 0.0,
    length_normalized: bool = True,
    protect: str = "winner",
    detach: Tensor | None = None,
    aggregation: str = "negatives",
    weighting: str = "loss",
    positives: str = "winner",
    sft_weight: float = 1.0,
    level_weights: Sequence[float] | Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    normalizer: tuple[Number, Number] | None = None,
) -> SessionLossOutput:
    """See :func:`raddpo_ext.rad_dpo_loss`."""
    sids = sids_of(sessions)
    levels = [1.0] * logps.shape[1] if level_weights is None else torch.as_tensor(level_weights).tolist()

    def reward(row: int, num_detached: int = 0) -> Tensor:
        """``r_c``, without gradient through its first ``num_detached`` tokens or, if given, those of ``detach``."""
        length = len(sids[row])
        detached = torch.arange(length, device=logps.device) < num_detached if detach is None else detach[row, :length]
        tokens = torch.where(detached, logps[row, :length].detach(), logps[row, :length])
        if ref_logps is not None:
            tokens = tokens - ref_logps[row, :length].detach()
        return beta * tokens.sum() / (max(length, 1) if length_normalized else 1)

    def negative_reward(row: int, protected: Sequence[int]) -> Tensor:
        """``r_n``, detached on its longest prefix in common with the positives ``protected``."""
        return reward(row, 0 if protect == "none" else max(common_prefix(sids[p], sids[row]) for p in protected))

    def loss_of(winner: Tensor, against: list[tuple[Tensor, Tensor]]) -> Tensor:
        return _smoothed(_loss_argument(winner, against, gamma, aggregation, weighting), label_smoothing)

    zero = logps[:0].sum()  # a zero with a gradient path to logps
    rewards = [reward(row).detach() for row in range(sessions.num_candidates)]
    margins: list[Tensor] = []  # of all pairs
    in_loss: list[bool] = []
    totals: list[list[tuple[float, float]]] = []  # of each session: sums and their counts
    preferences, num_kept = [], 0
    log_likelihoods, num_tokens = [], 0
    for session in range(sessions.num_sessions):
        # The pairs that are kept, and the margin of each pair.
        rows = positive_rows(sessions, session)
        weights = _pair_weights(sessions, session, pair_weights, logps)
        kept = _kept(weights, sids, positives == "pooled")
        first_pair = len(margins)
        for p, n in weights:
            tied = bool(rewards[p] == rewards[n])  # infinities too
            margins.append(rewards[p] - rewards[n] if (p, n) in kept and not tied else zero.detach())
            in_loss.append((p, n) in kept and (positives != "winner" or p == rows[0]))
        marked = zip(weights, margins[first_pair:], in_loss[first_pair:], strict=True)
        of_loss = {pair: float(margin) for pair, margin, is_in in marked if is_in}

        # The preference of the session: one term, or one per positive.
        terms = []
        if positives == "pooled" and kept:
            pool = _log_sum_exp([reward(p) for p in rows if sids[p]])
            terms.append(loss_of(pool, [(negative_reward(n, rows), w) for n, w in _min_weights(kept).items()]))
        elif positives != "pooled":
            for p in rows if positives == "each" else rows[:1]:
                protected = rows if protect == "positives" else [p]
                against = [(negative_reward(n, protected), w) for (q, n), w in kept.items() if q == p]
                if against:
                    terms.append(loss_of(reward(p), against))
        preferences.append(sum(terms, zero) / max(len(terms), 1))
        num_kept += len(terms) > 0

        # SFT: the log-probs of all positives' tokens.
        tokens = [(levels[i], logps[p, i]) for p in rows for i in range(len(sids[p]))]
        log_likelihoods.append(sum((weight * logp for weight, logp in tokens if weight != 0), zero))
        num_tokens += len(tokens)

        def num_detached(p: int, n: int, rows: list[int] = rows) -> int:
            if detach is not None:
                return int(detach[n, : len(sids[n])].sum())
            protected = rows if protect == "positives" or positives == "pooled" else [p]
            return 0 if protect == "none" else max(common_prefix(sids[q], sids[n]) for q in protected)

        # The sums and counts behind the metrics, in the order of TOTALS.
        chosen = [float(rewards[p]) for p in rows if sids[p]]
        rejected = [float(rewards[n]) for n in negative_rows(sessions, session) if sids[n]]
        equal = [not sids[p] or not sids[n] or sids[p] == sids[n] for p, n in weights]
        totals.append(
            [
                (float(preferences[-1].detach()), len(terms) > 0),
                (-float(log_likelihoods[-1].detach()), len(tokens)),
                (sum(chosen), len(chosen)),
                (sum(rejected), len(rejected)),
                (sum(of_loss.values()), len(of_loss)),
                (sum(margin > 0 for margin in of_loss.values()), len(of_loss)),
                (sum(float(weights[pair]) for pair in of_loss), len(of_loss)),
                (sum(num_detached(*pair) for pair in of_loss), sum(len(sids[n]) for _, n in of_loss)),
                (sum(equal), len(equal)),
            ]
        )

    # Reduce over the sessions.
    table = torch.tensor(totals, dtype=torch.float64, device=logps.device).reshape(-1, 9, 2)
    summed = table.sum(0)
    kept_and_tokens = (num_kept, num_tokens) if normalizer is None else normalizer
    preference = _reduced(preferences, zero, kept_and_tokens[0], reduction)
    sft = -_reduced(log_likelihoods, zero, kept_and_tokens[1], reduction)
    return SessionLossOutput(
        loss=preference + sft_weight * sft if sft_weight != 0 else preference,  # 0 * inf would be NaN
        preference=preference,
        sft=sft,
        rewards=_stacked(rewards, zero.detach()),
        margins=_stacked(margins, zero.detach()),
        accuracy=logps.new_tensor(float(summed[5, 0] / summed[5, 1].clamp(min=1))),
        kept=torch.tensor(in_loss, dtype=torch.bool, device=logps.device),
        totals=table if reduction == "none" else summed,
    )


def multilabel_contrastive_loss(
    scores: Tensor,
    sessions: SessionBatch,
    *,
    pair_weights: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    normalizer: Number | None = None,
) -> Tensor:
    """See :func:`raddpo_ext.multilabel_contrastive_loss`."""
    sids = sids_of(sessions)
    zero = scores[:0].sum()
    terms, num_kept = [], 0
    for session in range(sessions.num_sessions):
        weights = _pair_weights(sessions, session, pair_weights, scores)
        kept = _kept(weights, sids, pooled=True)
        if kept:
            pool = _log_sum_exp([scores[p] / temperature for p in positive_rows(sessions, session) if sids[p]])
            against = [(scores[n] / temperature, weight) for n, weight in _min_weights(kept).items()]
            terms.append(_smoothed(_loss_argument(pool, against, 0.0, "negatives", "loss"), 0.0))
        else:
            terms.append(zero)
        num_kept += len(kept) > 0
    return _reduced(terms, zero, num_kept if normalizer is None else normalizer, reduction)


def _pair_weights(sessions: SessionBatch, session: int, pair_weights: Tensor | None, like: Tensor) -> PairWeights:
    """The weights of a session's pairs, positive-major."""
    rows = positive_rows(sessions, session)
    negatives = negative_rows(sessions, session)
    first = int(sessions.pair_offsets[session])
    pairs = enumerate(((p, n) for p in rows for n in negatives), first)
    return {pair: like.new_ones(()) if pair_weights is None else pair_weights[i].detach().to(like) for i, pair in pairs}


def _kept(weights: PairWeights, sids: list[Sid], pooled: bool) -> PairWeights:
    """The pairs that are not dropped. A pool drops a negative from all its pairs."""
    present = {(p, n): weight for (p, n), weight in weights.items() if sids[p] and sids[n]}
    bad = {(p, n) for (p, n), weight in present.items() if sids[p] == sids[n] or weight == 0}
    if pooled:
        bad_negatives = {n for _, n in bad}
        bad = {(p, n) for p, n in present if n in bad_negatives}
    return {pair: weight for pair, weight in present.items() if pair not in bad}


def _min_weights(kept: PairWeights) -> dict[int, Tensor]:
    """The minimum weight ``w_n = min_p w_pn`` of each negative."""
    smallest: dict[int, Tensor] = {}
    for (_, n), weight in kept.items():
        smallest[n] = torch.minimum(smallest.get(n, weight), weight)
    return smallest


def _log_sum_exp(terms: list[Tensor]) -> Tensor:
    """Log-sum-exp whose gradient is not NaN for an infinite maximum: the terms that equal it have equal weights."""
    stacked = torch.stack(terms)
    most = stacked.detach().max()
    return stacked[stacked == most].mean() if most.isinf() else stacked.logsumexp(0)


def _loss_argument(
    winner: Tensor, against: list[tuple[Tensor, Tensor]], gamma: float, aggregation: str, weighting: str
) -> Tensor:
    """The loss argument ``A`` of a winner's reward against rewards and weights.

    ``LSE(r_j + gamma + log w_j) - r_w`` or, with ``aggregation="margins"``, ``-LSE(-r_j - gamma + log w_j) - r_w``. It
    is ``-inf`` if the term of the negatives is, whatever ``r_w``.
    """
    sign = 1 if aggregation == "negatives" else -1
    if weighting == "loss":
        terms = [sign * (reward + gamma) + weight.log() for reward, weight in against]
    else:
        terms = [sign * (weight * reward + gamma) for reward, weight in against]
    lse = sign * _log_sum_exp(terms)
    return lse if lse == -math.inf else lse - winner


def _smoothed(argument: Tensor, label_smoothing: float) -> Tensor:
    """``(1 - e) softplus(A) + e softplus(-A)``, where ``softplus(x) = -logsigmoid(-x)``."""
    if label_smoothing == 0:  # 0 * softplus(inf) would be NaN
        return -logsigmoid(-argument)
    return -(1 - label_smoothing) * logsigmoid(-argument) - label_smoothing * logsigmoid(argument)


def _stacked(terms: list[Tensor], zero: Tensor) -> Tensor:
    return torch.stack([zero, *terms])[1:]  # also stacks no terms


def _reduced(terms: list[Tensor], zero: Tensor, count: Number, reduction: str) -> Tensor:
    total = _stacked(terms, zero)
    if reduction == "none":
        return total
    return total.sum() / (count if reduction == "mean" and count != 0 else 1)
