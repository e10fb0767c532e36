#pragma once
// The formulas of group_advantages that the CPU and the CUDA kernels share.
#include <cmath>

#include "group_advantages.h"

namespace raddpo {

// Rewards and weights above this are refused as infinite ones are, so that no product of them overflows.
constexpr double kMaxReward = 1e75;

// A sum with its rounding errors: the order of the terms does not show in the result.
struct TwoSum {
  double high, low;
};

RADDPO_HD void add(TwoSum& sum, double x) {
  const double total = sum.high + x, part = total - sum.high;
  sum.low += (sum.high - (total - part)) + (x - part);
  sum.high = total;
}
RADDPO_HD void add(TwoSum& sum, const TwoSum& more) {
  add(sum, more.high);
  sum.low += more.low;
}
RADDPO_HD double value_of(const TwoSum& sum) { return sum.high + sum.low; }
// The sum of all other terms.
RADDPO_HD double without(TwoSum sum, double x) {
  add(sum, -x);
  return value_of(sum);
}

// What one pass over a set of weighted values finds.
struct Moments {
  bool unit;  // all weights are 1, whose sums need no care
  std::int64_t count;
  double least, most;
  TwoSum weight, weighted;  // sums of w and of w x
};

RADDPO_HD Moments no_moments(bool unit) { return {unit, 0, INFINITY, -INFINITY, {0, 0}, {0, 0}}; }

RADDPO_HD void add(Moments& m, double x, double weight) {
  ++m.count;
  m.least = x < m.least ? x : m.least;
  m.most = x > m.most ? x : m.most;
  if (m.unit) {
    m.weight.high += 1;
    add(m.weighted, x);
  } else {
    add(m.weight, weight);
    add(m.weighted, weight * x);
  }
}
RADDPO_HD void add(Moments& m, const Moments& more) {
  m.count += more.count;
  m.least = more.least < m.least ? more.least : m.least;
  m.most = more.most > m.most ? more.most : m.most;
  add(m.weight, more.weight);
  add(m.weighted, more.weighted);
}

// Equal values have exactly themselves for a mean.
RADDPO_HD double mean_of(const Moments& m) {
  return m.least == m.most ? m.least : value_of(m.weighted) / value_of(m.weight);
}
RADDPO_HD bool differ(const Moments& m) { return m.count > 1 && m.least != m.most; }

// What the next pass finds: the sums of w (x - mean)^2 and of w (W - w), where W is the sum of the weights.
struct Deviations {
  TwoSum squares, freedom;
};

RADDPO_HD void add(Deviations& d, const Moments& m, double mean, double x, double weight) {
  add(d.squares, weight * (x - mean) * (x - mean));
  if (m.unit)
    d.freedom.high += m.weight.high - 1;
  else
    add(d.freedom, weight * without(m.weight, weight));
}
RADDPO_HD void add(Deviations& d, const Deviations& more) {
  add(d.squares, more.squares);
  add(d.freedom, more.freedom);
}

// The unbiased standard deviation, sqrt(sum w (x - mean)^2 / (W - sum w^2 / W)), and that of a population.
RADDPO_HD double unbiased(const Moments& m, const Deviations& d) {
  const double freedom = value_of(d.freedom);
  return freedom > 0 ? std::sqrt(value_of(d.squares) * value_of(m.weight) / freedom) : 0;
}
RADDPO_HD double biased(const Moments& m, const Deviations& d) {
  return std::sqrt(value_of(d.squares) / value_of(m.weight));
}

// A row's reward, and its weight: 0 if the row does not count.
struct Weighted {
  double reward, weight;
};

template <typename T>
RADDPO_HD Weighted read_row(const GroupAdvantagesArgs<T>& a, const Session& v, std::int64_t i) {
  const T reward = a.rewards[v.first + i], weight = a.weights ? a.weights[v.first + i] : T(1);
  const bool counts =
      reward == reward && weight > 0 && a.batch.lengths[v.first + i] > 0 && (a.count_experts || i >= v.positives);
  return {static_cast<double>(reward), counts ? static_cast<double>(weight) : 0.};
}

template <typename T>
RADDPO_HD Sid sid_of(const GroupAdvantagesArgs<T>& a, std::int64_t row) {
  return {a.tokens + row * a.levels, static_cast<std::int32_t>(clamp_length(a.batch.lengths[row], a.levels))};
}

// A row's advantage before it is scaled; `m` and `mean` are the group's.
template <typename T>
RADDPO_HD double centred(const GroupAdvantagesArgs<T>& a, std::int64_t s, const Moments& m, double mean,
                         const Weighted& row) {
  if (a.baselines) return row.reward - a.baselines[s];
  if (a.baseline == Baseline::mean) return row.reward - mean;
  return row.reward - without(m.weighted, row.weight * row.reward) / without(m.weight, row.weight);
}

// A token's advantage, from that among its siblings and that of its row.
template <typename T>
RADDPO_HD T blended(const GroupAdvantagesArgs<T>& a, double siblings, double sequence) {
  return static_cast<T>(a.blend * siblings + (1 - a.blend) * sequence);
}

// The ground truth of a group: rows [first, first + count) of `tokens`.
struct Targets {
  const std::int64_t *tokens, *lengths;
  std::int64_t first, count, levels;
};

template <typename T>
RADDPO_HD Targets targets_of(const GroupAdvantagesArgs<T>& a, const Session& v, std::int64_t s) {
  if (!a.target_offsets) return {a.tokens, a.batch.lengths, v.first, v.positives, a.levels};
  const std::int64_t first = a.target_offsets[s], count = a.target_offsets[s + 1] - first;
  const bool sound = first >= 0 && count >= 0 && count <= a.targets - first;
  return {a.target_tokens, a.target_lengths, sound ? first : 0, sound ? count : 0, a.target_levels};
}

RADDPO_HD Sid sid_of(const Targets& t, std::int64_t i) {
  return {t.tokens + (t.first + i) * t.levels,
          static_cast<std::int32_t>(clamp_length(t.lengths[t.first + i], t.levels))};
}

// Writes what each level of a row adds to its match with the best target, and the row's gates; both are 0 beyond its
// length.
template <typename T>
RADDPO_HD void write_matches(const GroupAdvantagesArgs<T>& a, const Sid& sid, const Targets& targets, double* added,
                             T* gates) {
  for (std::int32_t l = 0; l < a.levels; ++l) added[l] = gates[l] = 0;
  // The match through each level: with weights, and as a number of tokens.
  for (std::int64_t t = 0; t < targets.count; ++t) {
    const Sid target = sid_of(targets, t);
    double sum = 0;
    T tokens = 0;
    bool counts = true;
    for (std::int32_t l = 0; l < sid.length; ++l) {
      const bool same = l < target.length && sid.tokens[l] == target.tokens[l];
      counts &= same || !a.contiguous;
      if (same && counts) {
        sum += a.level_weights ? static_cast<double>(a.level_weights[l]) : 1.;
        tokens += 1;
      }
      added[l] = sum > added[l] ? sum : added[l];
      gates[l] = tokens > gates[l] ? tokens : gates[l];
    }
  }
  for (std::int32_t l = sid.length - 1; l > 0; --l) {
    added[l] -= added[l - 1];
    gates[l] = gates[l - 1] / static_cast<T>(l);
  }
  if (sid.length) gates[0] = 1;
}

}  // namespace raddpo
