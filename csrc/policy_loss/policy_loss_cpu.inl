// One stretch of whole groups, whose rows are one after another, at a time on one thread. Passes over all its tokens,
// padding too, are vectorised; then each row adds up its tokens, in order, so that a row without any changes no bit.
// Part of a per-instruction-set region.
#include "policy_loss_rows.inl"

namespace raddpo::RADDPO_ISA {
namespace {

// Finds the tokens' terms, and counts those that the clip holds.
template <Objective objective, typename T>
RADDPO_PASS find_terms(PolicyLossArgs<T> a, PolicyLossScratch m, std::int64_t size, PolicySums& sums) {
  double below = 0, above = 0;
#pragma omp simd reduction(+ : below, above)
  for (std::int64_t t = 0; t < size; ++t) {
    const Move move{m.logps[t], m.gaps[t], m.ratios[t]};
    const PolicyTerm term = term_of(a, objective, move, m.advantages[t]);
    m.values[t] = m.weights[t] * term.value;
    m.slopes[t] = m.weights[t] * term.slope;
    below += term.below;
    above += term.above;
  }
  sums.of[kBelow] += below;
  sums.of[kAbove] += above;
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
RADDPO_PASS write_gradient(PolicyLossArgs<T> a, PolicyLossScratch m, Stretch g) {
  T* const gradient = a.gradient + g.first * a.levels;
  if (a.ratio == Ratio::item) {  // each token moves the ratio of the whole row
    sum_rows(m.slopes, g.rows, a.levels, m.row_sums);
    spread(m.row_sums, g.rows, a.levels, m.slopes);
    for_padding(m, g, a.levels, [&](std::int64_t t) { m.slopes[t] = 0; });
  }
#pragma omp simd
  for (std::int64_t t = 0; t < g.size; ++t) gradient[t] = static_cast<T>(m.slopes[t]);
  if (!a.protect) return;
  for_groups(a, g, [&](std::int64_t, const Session& v, std::int64_t at, std::int64_t size) {
    for (std::int64_t i = 0; i < size; ++i) {
      bool pulls = false;
      for_levels(at + i, a.levels, [&](std::int64_t t, std::int64_t) { pulls |= m.advantages[t] < 0; });
      if (pulls) protect_row(a, v, i, [&](std::int64_t j) { return m.members[at + j]; });
    }
  });
}

// Finds the tokens' terms of the KL to the reference, and adds their gradient.
template <typename T>
RADDPO_PASS find_kl(PolicyLossArgs<T> a, PolicyLossScratch m, Stretch g) {
  const std::int64_t first = g.first * a.levels;
#pragma omp simd
  for (std::int64_t t = 0; t < g.size; ++t) {
    const KlTerm kl = kl_of(a, first + t);
    const bool none = m.weights[t] == 0;  // padding may be NaN
    m.values[t] = none ? 0 : m.weights[t] * kl.value;
    m.slopes[t] = none ? 0 : m.weights[t] * kl.slope;
  }
  if (!a.gradient || a.kl_weight == 0) return;
  T* const gradient = a.gradient + first;
#pragma omp simd
  for (std::int64_t t = 0; t < g.size; ++t) gradient[t] += static_cast<T>(a.kl_weight * m.slopes[t]);
}

// Adds the values of the rows in the policy term to one of their groups' sums.
template <typename T>
RADDPO_PASS add_values(PolicyLossArgs<T> a, PolicyLossScratch m, Stretch g, PolicySum which, PolicySums* sums) {
  sum_rows(m.values, g.rows, a.levels, m.row_sums);
  for_groups(a, g, [&](std::int64_t s, const Session&, std::int64_t at, std::int64_t size) {
    double sum = 0;
    for (std::int64_t i = at; i < at + size; ++i) sum += m.members[i] ? m.row_sums[i] : 0;
    sums[s].of[which] = sum;
  });
}

// Counts of all the stretch are in the sums of its first group.
template <typename T>
RADDPO_HD void run_stretch(const PolicyLossArgs<T>& a, const PolicyLossScratch& m, Stretch g, PolicySums* sums) {
  read_rows(a, m, g, sums);
  find_moves(a, m, g);
  if (g.counts) add_values(a, m, g, kDrift, sums);
  if (a.ratio != Ratio::token) find_moves_of_rows(a, m, g);
  write_ratios(a, m, g);
  if (!g.counts) {
    for (std::int64_t t = 0; a.gradient && t < g.size; ++t) a.gradient[g.first * a.levels + t] = 0;
    return;
  }
  read_tokens(a, m, g, sums[g.begin]);
  find_terms(a, m, g.size, sums[g.begin]);
  add_values(a, m, g, kPolicy, sums);
  if (a.gradient) write_gradient(a, m, g);
  if (a.ref_logps) {
    find_kl(a, m, g);
    add_values(a, m, g, kKl, sums);
  }
  for_groups(a, g, [&](std::int64_t s, const Session& v, std::int64_t, std::int64_t) {
    for (std::int64_t i = 0; a.counted[s] && i < v.positives; ++i) add_nll(a, v.first + i, sums[s]);
  });
}

template <typename T>
RADDPO_HD void run(const PolicyLossArgs<T>& args, const PolicyLossScratch& scratch, std::int64_t begin,
                   std::int64_t end, PolicySums* sums) {
  const PolicyLossArgs<T> a = args;  // local copies: the compiler knows that no store changes them
  const PolicyLossScratch m = scratch;
  for (std::int64_t s = begin; s < end; ++s) sums[s] = {};
  for (std::int64_t s = begin; s < end;) {
    const Stretch g = stretch_of(a, s, end);
    run_stretch(a, m, g, sums);
    for (; s < g.end; ++s) write_group(a, s, a.counted[s], sums[s]);
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
#undef RADDPO_PASS

}  // namespace raddpo::RADDPO_ISA
