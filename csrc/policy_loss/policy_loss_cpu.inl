// One group at a time on one thread. Passes over all tokens of the group, padding too, are vectorised; then each row
// adds up its tokens, in order, so that a row without any changes no bit. Part of a per-instruction-set region.
namespace raddpo::RADDPO_ISA {
namespace {

// Calls body(t) for each token of a row, padding too. SIDs mostly have 3 or 4 tokens: the compiler unrolls these loops.
template <typename Body>
RADDPO_HD void for_levels(std::int64_t i, std::int64_t levels, const Body& body) {
  if (levels == 4)
    for (std::int64_t l = 0; l < 4; ++l) body(4 * i + l, l);
  else if (levels == 3)
    for (std::int64_t l = 0; l < 3; ++l) body(3 * i + l, l);
  else
    for (std::int64_t l = 0; l < levels; ++l) body(levels * i + l, l);
}

RADDPO_HD double sum_of_row(const double* values, std::int64_t i, std::int64_t levels) {
  double sum = 0;
  for_levels(i, levels, [&](std::int64_t t, std::int64_t) { sum += values[t]; });
  return sum;
}

// Reads which rows are in the policy term if the group counts, and returns whether it does.
template <typename T>
RADDPO_HD bool read_rows(const PolicyLossArgs<T>& a, const Session& v, const PolicyLossScratch& m) {
  bool counts = a.count_all;
  for (std::int64_t i = 0; i < v.positives + v.negatives; ++i) {
    m.lengths[i] = sid_of(a, v.first + i).length;
    m.members[i] = is_in_policy(a, v, i);
    counts = counts || (m.members[i] && has_advantage(a, v.first + i));
  }
  return counts;
}

// Finds how far each token has moved, and into `values` its estimate of the KL from the old policy; 0 for padding.
template <typename T>
RADDPO_HD void find_moves(const PolicyLossArgs<T>& a, const Session& v, const PolicyLossScratch& m, std::int64_t size) {
  const T* const logps = a.logps + v.first * a.levels;
  const T* const old_logps = (a.old_logps ? a.old_logps : a.logps) + v.first * a.levels;
  if (a.old_logps) {
#pragma omp simd
    for (std::int64_t t = 0; t < size; ++t) {
      const Move move = move_of(logps[t], old_logps[t]);
      m.logps[t] = move.logp;
      m.gaps[t] = move.gap;
      m.ratios[t] = move.ratio;
      m.values[t] = move.ratio - 1 - move.gap;
    }
  } else {
#pragma omp simd
    for (std::int64_t t = 0; t < size; ++t) {
      m.logps[t] = logps[t];
      m.gaps[t] = m.values[t] = 0;
      m.ratios[t] = 1;
    }
  }
  for (std::int64_t i = 0; i < v.positives + v.negatives; ++i)
    for (std::int64_t t = i * a.levels + m.lengths[i]; t < (i + 1) * a.levels; ++t)
      m.logps[t] = m.gaps[t] = m.ratios[t] = m.values[t] = 0;
}

// Writes the rows' ratios and, unless each token has its own, gives the row's to its tokens.
template <typename T>
RADDPO_HD void write_ratios(const PolicyLossArgs<T>& a, const Session& v, const PolicyLossScratch& m) {
  for (std::int64_t i = 0; i < v.positives + v.negatives; ++i) {
    const std::int64_t row = v.first + i;
    if (a.ratio == Ratio::token || !m.lengths[i]) {
      a.ratios[row] = static_cast<T>(m.lengths[i] ? sum_of_row(m.ratios, i, a.levels) / m.lengths[i] : 1);
      continue;
    }
    const Move whole = move_of_row(a, row, m.lengths[i]);
    a.ratios[row] = static_cast<T>(whole.ratio);
    for_levels(i, a.levels, [&](std::int64_t t, std::int64_t) {
      m.logps[t] = whole.logp;
      m.gaps[t] = whole.gap;
      m.ratios[t] = whole.ratio;
    });
  }
}

// Reads the tokens' advantages and weights, and counts what is in the policy term. Both are 0 for all other tokens,
// which makes nothing of their terms.
template <typename T>
RADDPO_HD void read_tokens(const PolicyLossArgs<T>& a, const Session& v, const PolicyLossScratch& m, PolicySums& sums) {
  for (std::int64_t i = 0; i < v.positives + v.negatives; ++i) {
    const std::int64_t row = v.first + i;
    const std::int32_t length = m.members[i] ? m.lengths[i] : 0;
    const double weight = length ? weight_of(a, row, length) : 0;
    sums.of[kPolicyRows] += length > 0;
    sums.of[kPolicyTokens] += length;
    for_levels(i, a.levels, [&](std::int64_t t, std::int64_t l) { m.weights[t] = l < length ? weight : 0; });
    if (a.by_token || a.gates) {
      for_levels(i, a.levels, [&](std::int64_t t, std::int64_t l) {
        m.advantages[t] = l < length ? advantage_of(a, row, static_cast<std::int32_t>(l)) : 0;
      });
    } else {
      const double advantage = a.advantages[row];
      for_levels(i, a.levels, [&](std::int64_t t, std::int64_t l) { m.advantages[t] = l < length ? advantage : 0; });
    }
  }
}

// Finds the tokens' terms, and counts those that the clip holds.
template <Objective objective, typename T>
RADDPO_HD void find_terms(const PolicyLossArgs<T>& a, const PolicyLossScratch& m, std::int64_t size, PolicySums& sums) {
  double below = 0, above = 0, invalid = 0;
#pragma omp simd reduction(+ : below, above, invalid)
  for (std::int64_t t = 0; t < size; ++t) {
    const Move move{m.logps[t], m.gaps[t], m.ratios[t]};
    const PolicyTerm term = term_of(a, objective, move, m.advantages[t]);
    m.values[t] = m.weights[t] * term.value;
    m.slopes[t] = m.weights[t] * term.slope;
    below += term.below;
    above += term.above;
    invalid += std::fabs(m.advantages[t]) < INFINITY && m.weights[t] >= 0 && m.weights[t] < INFINITY ? 0 : 1;
  }
  sums.of[kBelow] += below;
  sums.of[kAbove] += above;
  sums.of[kInvalid] += invalid;
}

template <typename T>
RADDPO_HD void find_terms(const PolicyLossArgs<T>& a, const PolicyLossScratch& m, std::int64_t size, PolicySums& sums) {
  switch (a.objective) {
    case Objective::reinforce:
      return find_terms<Objective::reinforce>(a, m, size, sums);
    case Objective::clip:
      return find_terms<Objective::clip>(a, m, size, sums);
    case Objective::cispo:
      return find_terms<Objective::cispo>(a, m, size, sums);
    case Objective::sapo:
      return find_terms<Objective::sapo>(a, m, size, sums);
    case Objective::ecpo:
      return find_terms<Objective::ecpo>(a, m, size, sums);
    case Objective::gbpo:
      return find_terms<Objective::gbpo>(a, m, size, sums);
  }
}

// Writes the gradient of the policy term.
template <typename T>
RADDPO_HD void write_gradient(const PolicyLossArgs<T>& a, const Session& v, const PolicyLossScratch& m,
                              std::int64_t size) {
  const std::int64_t rows = v.positives + v.negatives;
  T* const gradient = a.gradient + v.first * a.levels;
  for (std::int64_t i = 0; a.ratio == Ratio::item && i < rows; ++i) {  // each token moves the ratio of the whole row
    const double slopes = sum_of_row(m.slopes, i, a.levels);
    for_levels(i, a.levels, [&](std::int64_t t, std::int64_t l) { m.slopes[t] = l < m.lengths[i] ? slopes : 0; });
  }
#pragma omp simd
  for (std::int64_t t = 0; t < size; ++t) gradient[t] = static_cast<T>(m.slopes[t]);
  for (std::int64_t i = 0; a.protect && i < rows; ++i) {
    bool pulls = false;
    for_levels(i, a.levels, [&](std::int64_t t, std::int64_t) { pulls |= m.advantages[t] < 0; });
    if (pulls) protect_row(a, v, i, [&](std::int64_t j) { return m.members[j]; });
  }
}

// Finds the tokens' terms of the KL to the reference, and adds their gradient.
template <typename T>
RADDPO_HD void find_kl(const PolicyLossArgs<T>& a, const Session& v, const PolicyLossScratch& m, std::int64_t size) {
  const std::int64_t first = v.first * a.levels;
#pragma omp simd
  for (std::int64_t t = 0; t < size; ++t) {
    const KlTerm kl = kl_of(a, first + t);
    const bool none = m.weights[t] == 0;  // padding may be NaN
    m.values[t] = none ? 0 : m.weights[t] * kl.value;
    m.slopes[t] = none ? 0 : m.weights[t] * kl.slope;
  }
  if (!a.gradient || a.kl_weight == 0) return;
  T* const gradient = a.gradient + first;
#pragma omp simd
  for (std::int64_t t = 0; t < size; ++t) gradient[t] += static_cast<T>(a.kl_weight * m.slopes[t]);
}

template <typename T>
RADDPO_HD PolicySums run_group(const PolicyLossArgs<T>& a, const PolicyLossScratch& m, const Session& v, bool counts) {
  const std::int64_t rows = v.positives + v.negatives, size = rows * a.levels, first = v.first * a.levels;
  PolicySums sums{};
  find_moves(a, v, m, size);
  for (std::int64_t i = 0; counts && i < rows; ++i)
    if (m.members[i]) sums.of[kDrift] += sum_of_row(m.values, i, a.levels);
  write_ratios(a, v, m);
  if (!counts) {
    for (std::int64_t t = first; a.gradient && t < first + size; ++t) a.gradient[t] = 0;
    return sums;
  }
  read_tokens(a, v, m, sums);
  find_terms(a, m, size, sums);
  for (std::int64_t i = 0; i < rows; ++i) sums.of[kPolicy] += sum_of_row(m.values, i, a.levels);
  if (a.gradient) write_gradient(a, v, m, size);
  if (a.ref_logps) {
    find_kl(a, v, m, size);
    for (std::int64_t i = 0; i < rows; ++i) sums.of[kKl] += sum_of_row(m.values, i, a.levels);
  }
  for (std::int64_t i = 0; i < v.positives; ++i) add_nll(a, v.first + i, sums);
  return sums;
}

template <typename T>
RADDPO_HD void run(const PolicyLossArgs<T>& args, const PolicyLossScratch& scratch, std::int64_t begin,
                   std::int64_t end, PolicySums* sums) {
  const PolicyLossArgs<T> a = args;  // local copies: the compiler knows that no store changes them
  const PolicyLossScratch m = scratch;
  for (std::int64_t s = begin; s < end; ++s) {
    const Session v = session_of(a.batch, s);
    const bool counts = read_rows(a, v, m);
    sums[s] = run_group(a, m, v, counts);
    write_group(a, s, counts, sums[s]);
  }
}

template <typename T>
RADDPO_HD void run(const PolicyLossBackwardArgs<T>& args, std::int64_t begin, std::int64_t end) {
  const PolicyLossBackwardArgs<T> a = args;
  for (std::int64_t s = begin; s < end; ++s) {
    const Session v = session_of(a.batch, s);
    const std::int64_t first = v.first * a.levels, size = (v.positives + v.negatives) * a.levels;
    const double factor = static_cast<double>(a.grad_loss[s * a.stride]) * a.scales[0];
#pragma omp simd
    for (std::int64_t t = first; t < first + size; ++t) a.grad_logps[t] = static_cast<T>(factor * a.gradient[t]);
    for (std::int64_t i = 0; a.nll_weight > 0 && i < v.positives; ++i)
      for (std::int64_t l = 0; l < a.levels; ++l)
        a.grad_logps[(v.first + i) * a.levels + l] = gradient_of(a, v, s, i, l);
  }
}

}  // namespace

#define RADDPO_DEFINE(T)                                                                                         \
  void policy_loss(const PolicyLossArgs<T>& a, const PolicyLossScratch& m, std::int64_t begin, std::int64_t end, \
                   PolicySums* sums) {                                                                           \
    run(a, m, begin, end, sums);                                                                                 \
  }                                                                                                              \
  void policy_loss_backward(const PolicyLossBackwardArgs<T>& a, std::int64_t begin, std::int64_t end) {          \
    run(a, begin, end);                                                                                          \
  }
RADDPO_DEFINE(float)
RADDPO_DEFINE(double)
#undef RADDPO_DEFINE

}  // namespace raddpo::RADDPO_ISA
