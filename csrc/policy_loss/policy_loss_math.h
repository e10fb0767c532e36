#pragma once
// The formulas of policy_loss that the CPU and the CUDA kernels share.
#include <cmath>

#include "policy_loss.h"

namespace raddpo {

constexpr double kMaxGap = 20;  // of two log-probs in an exponential; no gradient beyond
constexpr double kMaxRatio = 485165195.40979027, kMinRatio = 1 / kMaxRatio;  // e^kMaxGap

// x - y; 0 for equal infinities too.
RADDPO_HD double gap_of(double x, double y) { return zero_unless(x != y, x - y); }
// The least of two, or `gap` if it is NaN.
RADDPO_HD double at_most(double gap, double most) { return most < gap ? most : gap; }
RADDPO_HD bool is_within(double gap) { return !(std::fabs(gap) > kMaxGap); }
RADDPO_HD double within(double gap, double least, double most) { return at_most(gap < least ? least : gap, most); }
RADDPO_HD double ratio_of(double gap) { return bounded_exp(std::copysign(at_most(std::fabs(gap), kMaxGap), gap)); }

// How far a token or a row has moved from the old policy.
struct Move {
  double logp, gap, ratio;
};
RADDPO_HD Move move_of(double logp, double old_logp) {
  const double gap = gap_of(logp, old_logp);
  return {logp, gap, ratio_of(gap)};
}

template <typename T>
RADDPO_HD Sid sid_of(const PolicyLossArgs<T>& a, std::int64_t row) {
  return {a.tokens + row * a.levels, static_cast<std::int32_t>(clamp_length(a.batch.lengths[row], a.levels))};
}

template <typename T>
RADDPO_HD Move move_of_token(const PolicyLossArgs<T>& a, std::int64_t at) {
  return move_of(a.logps[at], (a.old_logps ? a.old_logps : a.logps)[at]);
}

template <typename T>
RADDPO_HD Move move_of_row(const PolicyLossArgs<T>& a, std::int64_t row, std::int32_t length) {
  const std::int64_t begin = row * a.levels;
  double logp = 0, old_logp = 0;
  for (std::int64_t at = begin; at < begin + length; ++at) {
    logp += a.logps[at];
    old_logp += (a.old_logps ? a.old_logps : a.logps)[at];
  }
  const double size = a.ratio == Ratio::sequence ? length : 1;
  return move_of(logp / size, old_logp / size);
}

// A token's advantage without its gate, and with it.
template <typename T>
RADDPO_HD double plain_advantage(const PolicyLossArgs<T>& a, std::int64_t row, std::int32_t level) {
  return a.advantages[a.by_token ? row * a.levels + level : row];
}
template <typename T>
RADDPO_HD double advantage_of(const PolicyLossArgs<T>& a, std::int64_t row, std::int32_t level) {
  const double advantage = plain_advantage(a, row, level);
  return a.gates ? advantage * a.gates[row * a.levels + level] : advantage;
}

// Whether row i of a group is in the policy term if the group counts. A rollout that equals an expert there is not.
template <typename T>
RADDPO_HD bool is_in_policy(const PolicyLossArgs<T>& a, const Session& v, std::int64_t i) {
  const Sid sid = sid_of(a, v.first + i);
  if (!sid.length) return false;
  if (i < v.positives) return a.use_experts;
  for (std::int64_t e = 0; a.use_experts && e < v.positives; ++e) {
    const Sid expert = sid_of(a, v.first + e);
    if (expert.length == sid.length && common_prefix(expert, sid) == sid.length) return false;
  }
  return true;
}

template <typename T>
RADDPO_HD bool has_advantage(const PolicyLossArgs<T>& a, std::int64_t row) {
  const std::int32_t size = a.by_token ? sid_of(a, row).length : 1;
  for (std::int32_t l = 0; l < size; ++l)
    if (plain_advantage(a, row, l) != 0) return true;
  return false;
}

// A token's term, its derivative in the log-prob, and whether the clip holds its ratio from below or from above.
struct PolicyTerm {
  double value, slope;
  double below, above;  // 0 or 1
};

// pi / (1 - pi); no bound without a probability below 1.
RADDPO_HD double odds_of(double logp) {
  const double held = -at_most(std::fabs(logp), 700);
  return logp < 0 ? bounded_exp(held) / -bounded_expm1(held) : INFINITY;
}

// Without branches, but for those on `objective`: the CPU's loops are of one objective each, and vectorised.
template <typename T>
RADDPO_HD PolicyTerm term_of(const PolicyLossArgs<T>& a, Objective objective, const Move& m, double advantage) {
  const double high = 1 + a.high, low = 1 - a.low;
  const bool some = advantage != 0;  // 0 * inf is NaN
  const auto term = [=](double value, double slope, double below, double above) {
    return PolicyTerm{zero_unless(some, value), zero_unless(some, slope), zero_unless(some, below),
                      zero_unless(some, above)};
  };
  if (objective == Objective::reinforce) return term(-advantage, -advantage, 0, 0);
  if (objective == Objective::cispo) {
    const double factor = at_most(m.ratio, high) * advantage;
    return term(-factor * m.logp, -factor, 0, zero_unless(m.ratio > high, 1));
  }
  double ratio = m.ratio, slope = zero_unless(is_within(m.gap), 1);
  if (objective == Objective::ecpo || objective == Objective::gbpo) {  // which raise the old probability
    const double bound = objective == Objective::ecpo
                             ? high + a.delta
                             : zero_unless(advantage < 0, odds_of(m.logp)) + zero_unless(!(advantage < 0), 1);
    ratio = at_most(ratio, bound < kMinRatio ? kMinRatio : bound);
    slope = m.gap < -kMaxGap || bound < kMinRatio || (m.gap > kMaxGap && bound > kMaxRatio) ? 0 : 1;
  }
  slope = zero_unless(slope != 0, -ratio * advantage);
  if (objective == Objective::gbpo) return term(-ratio * advantage, slope, 0, 0);
  if (objective == Objective::sapo) {
    const double t = advantage > 0 ? a.low : a.high;
    const double s = 1 / (1 + bounded_exp(within(-t * (ratio - 1), -700, 700)));
    return term(-4 / t * s * advantage, 4 * s * (1 - s) * slope, 0, 0);
  }
  // The bounds that hold for this sign of the advantage.
  const double least = advantage < 0 ? low : -INFINITY;
  const double most = advantage > 0 ? high : a.dual_clip > 0 ? a.dual_clip : INFINITY;
  const double below = zero_unless(ratio < least, 1), above = zero_unless(ratio > most, 1);
  return term(-within(ratio, least, most) * advantage, zero_unless(below + above == 0, slope), below, above);
}

struct KlTerm {
  double value, slope;
};

template <typename T>
RADDPO_HD KlTerm kl_of(const PolicyLossArgs<T>& a, std::int64_t at) {
  const double x = gap_of(a.logps[at], a.ref_logps[at]);
  if (a.divergence == Divergence::k1) return {x, 1};
  if (a.divergence == Divergence::k2) return {x * x / 2, x};
  const bool far = x < -kMaxGap;
  const double held = zero_unless(!far, x) + zero_unless(far, -kMaxGap);
  const double rest = bounded_expm1(-at_most(held, 700));
  return {rest + held, zero_unless(!far, -rest)};
}

// The factor of a token's term in the sums.
template <typename T>
RADDPO_HD double weight_of(const PolicyLossArgs<T>& a, std::int64_t row, std::int32_t length) {
  const double weight = a.weights ? a.weights[row] : 1;
  if (a.aggregate == Aggregate::token) return weight;
  return weight / (a.aggregate == Aggregate::sequence ? length : a.max_length);
}

// Sets the gradient of the tokens that pull down a prefix of a row that is pushed up to exactly 0. `is_member(j)`:
// whether row j is in the policy term.
template <typename T, typename IsMember>
RADDPO_HD void protect_row(const PolicyLossArgs<T>& a, const Session& v, std::int64_t i, const IsMember& is_member) {
  const std::int64_t row = v.first + i;
  const Sid sid = sid_of(a, row);
  for (std::int64_t j = 0; j < v.positives + v.negatives; ++j) {
    const std::int32_t shared = common_prefix(sid, sid_of(a, v.first + j));
    if (!shared || j == i || !is_member(j)) continue;
    for (std::int32_t l = 0; l < shared; ++l)
      if (advantage_of(a, row, l) < 0 && advantage_of(a, v.first + j, l) > 0) a.gradient[row * a.levels + l] = 0;
  }
}

// Adds the NLL of an expert.
template <typename T>
RADDPO_HD void add_nll(const PolicyLossArgs<T>& a, std::int64_t row, PolicySums& sums) {
  const std::int32_t length = sid_of(a, row).length;
  sums.of[kExpertTokens] += length;
  for (std::int32_t l = 0; l < length; ++l) {
    const double weight = a.level_weights ? a.level_weights[l] : 1;
    if (weight > 0) sums.of[kNll] -= weight * a.logps[row * a.levels + l];  // 0 * -inf is NaN
  }
}

RADDPO_HD void add(PolicySums& sums, const PolicySums& more) {
  for (int i = 0; i < kPolicySums; ++i) sums.of[i] += more.of[i];
}

// Writes entry `at` of the losses.
template <typename T>
RADDPO_HD void write_entry(const PolicyLossArgs<T>& a, std::int64_t at, const PolicySums& sums, double policy_scale,
                           double nll_scale) {
  const double policy = sums.of[kPolicy] * policy_scale, kl = sums.of[kKl] * policy_scale;
  const double nll = sums.of[kNll] * nll_scale;
  a.policy[at] = static_cast<T>(policy);
  a.kl[at] = static_cast<T>(kl);
  a.nll[at] = static_cast<T>(nll);
  double loss = policy;
  if (a.kl_weight > 0) loss += a.kl_weight * kl;  // 0 * inf is NaN
  if (a.nll_weight > 0) loss += a.nll_weight * nll;
  a.loss[at] = static_cast<T>(loss);
}

template <typename T>
RADDPO_HD void write_group(const PolicyLossArgs<T>& a, std::int64_t s, bool counts, const PolicySums& sums) {
  a.counted[s] = counts;
  if (a.reduction == Reduction::none) write_entry(a, s, sums, 1, 1);
}

template <typename T>
RADDPO_HD void write_batch(const PolicyLossArgs<T>& a, const PolicySums& sums) {
  const double rows = sums.of[kPolicyRows], tokens = sums.of[kPolicyTokens];
  const double counts[2] = {a.aggregate == Aggregate::token ? tokens : rows, sums.of[kExpertTokens]};
  double scales[2];
  for (int i = 0; i < 2; ++i) {
    const double given = a.divisors ? a.divisors[i] : a.divisor[i];
    a.counts[i] = counts[i];
    const double divisor = given > 0 ? given : counts[i] > 1 ? counts[i] : 1;
    scales[i] = a.reduction == Reduction::mean ? 1 / divisor : 1;
    a.scales[i] = static_cast<T>(scales[i]);
  }
  if (a.reduction != Reduction::none) write_entry(a, 0, sums, scales[0], scales[1]);
  const double count = tokens > 0 ? tokens : 1;
  a.clipped[0] = static_cast<T>(sums.of[kBelow] / count);
  a.clipped[1] = static_cast<T>(sums.of[kAbove] / count);
  a.approx_kl[0] = static_cast<T>(sums.of[kDrift] / count);
}

// The gradient of a token's log-prob in row i of group s.
template <typename T>
RADDPO_HD T gradient_of(const PolicyLossBackwardArgs<T>& a, const Session& v, std::int64_t s, std::int64_t i,
                        std::int64_t level) {
  const std::int64_t row = v.first + i, at = row * a.levels + level;
  double value = static_cast<double>(a.scales[0]) * a.gradient[at];
  if (i < v.positives && a.nll_weight > 0 && a.counted[s] && level < a.batch.lengths[row])
    value -= a.nll_weight * a.scales[1] * (a.level_weights ? a.level_weights[level] : T(1));
  return static_cast<T>(a.grad_loss[s * a.stride] * value);
}

}  // namespace raddpo
