// What policy_loss reads of a stretch of groups before their terms: which rows count, how far they have moved, their
// weights. Part of a per-instruction-set region.
namespace raddpo::RADDPO_ISA {
namespace {

// A pass is a function of its own, and takes its arguments by value, which no store can change: in one large function
// the loops run out of registers.
#define RADDPO_PASS __attribute__((noinline)) void

// Calls body(levels). SIDs mostly have 3 or 4 tokens: the compiler knows these numbers, and unrolls the loops.
template <typename Body>
RADDPO_HD void with_levels(std::int64_t levels, const Body& body) {
  if (levels == 4)
    body(std::integral_constant<std::int64_t, 4>());
  else if (levels == 3)
    body(std::integral_constant<std::int64_t, 3>());
  else
    body(levels);
}

// Calls body(t, l) for each token of a row, padding too.
template <typename Body>
RADDPO_HD void for_levels(std::int64_t i, std::int64_t levels, const Body& body) {
  with_levels(levels, [&](const auto n) {
    for (std::int64_t l = 0; l < n; ++l) body(i * n + l, l);
  });
}

// Adds up the tokens of each row, padding too.
RADDPO_HD void sum_rows(const double* values, std::int64_t rows, std::int64_t levels, double* sums) {
  with_levels(levels, [&](const auto n) {
#pragma omp simd
    for (std::int64_t i = 0; i < rows; ++i) {
      double sum = 0;
      for (std::int64_t l = 0; l < n; ++l) sum += values[i * n + l];
      sums[i] = sum;
    }
  });
}

// Gives each token what its row has.
RADDPO_HD void spread(const double* of_rows, std::int64_t rows, std::int64_t levels, double* of_tokens) {
  with_levels(levels, [&](const auto n) {
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t l = 0; l < n; ++l) of_tokens[i * n + l] = of_rows[i];
  });
}

// Groups [begin, end), of rows [first, first + rows).
struct Stretch {
  std::int64_t begin, end, first, rows, size;  // size: of the tokens, padding too
  bool padded, counts;                         // counts: a group does
};

// The first of the groups [begin, end): as many as have stretch_rows, and at least one.
template <typename T>
RADDPO_HD Stretch stretch_of(const PolicyLossArgs<T>& a, std::int64_t begin, std::int64_t end) {
  const Session v = session_of(a.batch, begin);
  const std::int64_t most = stretch_rows(a.levels);
  Stretch g{begin, begin + 1, v.first, v.positives + v.negatives, 0, false, false};
  for (; g.end < end; ++g.end) {
    const Session next = session_of(a.batch, g.end);
    const std::int64_t rows = g.rows + next.positives + next.negatives;
    if (next.first != g.first + g.rows || rows > most) break;
    g.rows = rows;
  }
  g.size = g.rows * a.levels;
  return g;
}

// Calls body(s, v, at, size) for each group, whose rows are [at, at + size) of the stretch.
template <typename T, typename Body>
RADDPO_HD void for_groups(const PolicyLossArgs<T>& a, const Stretch& g, const Body& body) {
  for (std::int64_t s = g.begin; s < g.end; ++s) {
    const Session v = session_of(a.batch, s);
    body(s, v, v.first - g.first, v.positives + v.negatives);
  }
}

// Whether group v, whose rows are [at, at + size) of the stretch, counts.
template <typename T>
RADDPO_HD bool group_counts(const PolicyLossArgs<T>& a, const PolicyLossScratch& m, const Session& v, std::int64_t at,
                            std::int64_t size) {
  bool counts = a.count_all;
  for (std::int64_t i = 0; !counts && i < size; ++i) counts = m.members[at + i] && has_advantage(a, v.first + i);
  return counts;
}

// Finds which groups count and which rows are in the policy term, and how many these and their tokens are.
template <typename T>
RADDPO_PASS read_rows(PolicyLossArgs<T> a, PolicyLossScratch m, Stretch& g, PolicySums* sums) {
  const std::int64_t* const lengths = a.batch.lengths + g.first;
  int padded = 0;
#pragma omp simd reduction(| : padded)
  for (std::int64_t i = 0; i < g.rows; ++i) {
    const auto length = static_cast<std::int32_t>(clamp_length(lengths[i], a.levels));
    m.lengths[i] = length;
    m.members[i] = length > 0;
    padded |= length != a.levels;
  }
  g.padded = padded;
  for_groups(a, g, [&](std::int64_t s, const Session& v, std::int64_t at, std::int64_t size) {
    for (std::int64_t i = 0; !a.use_experts && i < v.positives; ++i) m.members[at + i] = 0;
    for (std::int64_t i = v.positives; a.use_experts && v.positives && i < size; ++i)
      m.members[at + i] = is_in_policy(a, v, i);
    a.counted[s] = group_counts(a, m, v, at, size);
    g.counts |= a.counted[s];
    for (std::int64_t i = at; !a.counted[s] && i < at + size; ++i) m.members[i] = 0;
  });
  std::int32_t rows = 0, tokens = 0;
#pragma omp simd reduction(+ : rows, tokens)
  for (std::int64_t i = 0; i < g.rows; ++i) {
    rows += m.members[i];
    tokens += m.members[i] ? m.lengths[i] : 0;
  }
  sums[g.begin].of[kPolicyRows] = rows;
  sums[g.begin].of[kPolicyTokens] = tokens;
}

// Calls clear(t) for each token of the padding.
template <typename Clear>
RADDPO_HD void for_padding(const PolicyLossScratch& m, const Stretch& g, std::int64_t levels, const Clear& clear) {
  for (std::int64_t i = 0; g.padded && i < g.rows; ++i)
    for (std::int64_t t = i * levels + m.lengths[i]; t < (i + 1) * levels; ++t) clear(t);
}

// Finds how far each token has moved, and into `values` its estimate of the KL from the old policy; 0 for padding.
template <typename T>
RADDPO_PASS find_moves(PolicyLossArgs<T> a, PolicyLossScratch m, Stretch g) {
  const T* const logps = a.logps + g.first * a.levels;
  if (a.old_logps) {
    const T* const old_logps = a.old_logps + g.first * a.levels;
#pragma omp simd
    for (std::int64_t t = 0; t < g.size; ++t) {
      const Move move = move_of(logps[t], old_logps[t]);
      m.logps[t] = move.logp;
      m.gaps[t] = move.gap;
      m.ratios[t] = move.ratio;
      m.values[t] = move.ratio - 1 - move.gap;
    }
  } else {
#pragma omp simd
    for (std::int64_t t = 0; t < g.size; ++t) {
      m.logps[t] = logps[t];
      m.gaps[t] = m.values[t] = 0;
      m.ratios[t] = 1;
    }
  }
  for_padding(m, g, a.levels, [&](std::int64_t t) { m.logps[t] = m.gaps[t] = m.ratios[t] = m.values[t] = 0; });
}

// Finds how far the rows have moved, and gives it to their tokens.
template <typename T>
RADDPO_PASS find_moves_of_rows(PolicyLossArgs<T> a, PolicyLossScratch m, Stretch g) {
  const T* const old_logps = (a.old_logps ? a.old_logps : a.logps) + g.first * a.levels;
  for (std::int64_t t = 0; t < g.size; ++t) m.gaps[t] = old_logps[t];
  for_padding(m, g, a.levels, [&](std::int64_t t) { m.gaps[t] = 0; });
  sum_rows(m.logps, g.rows, a.levels, m.row_logps);
  sum_rows(m.gaps, g.rows, a.levels, m.row_gaps);
  const bool mean = a.ratio == Ratio::sequence;
#pragma omp simd
  for (std::int64_t i = 0; i < g.rows; ++i) {
    const double size = mean && m.lengths[i] ? m.lengths[i] : 1;
    const Move whole = move_of(m.row_logps[i] / size, m.row_gaps[i] / size);
    m.row_logps[i] = whole.logp;
    m.row_gaps[i] = whole.gap;
    m.row_ratios[i] = whole.ratio;
  }
  spread(m.row_logps, g.rows, a.levels, m.logps);
  spread(m.row_gaps, g.rows, a.levels, m.gaps);
  spread(m.row_ratios, g.rows, a.levels, m.ratios);
}

// Writes the rows' ratios: 1 without tokens.
template <typename T>
RADDPO_PASS write_ratios(PolicyLossArgs<T> a, PolicyLossScratch m, Stretch g) {
  const bool mean = a.ratio == Ratio::token;
  if (mean) sum_rows(m.ratios, g.rows, a.levels, m.row_ratios);
  T* const ratios = a.ratios + g.first;
#pragma omp simd
  for (std::int64_t i = 0; i < g.rows; ++i) {
    const double size = mean && m.lengths[i] ? m.lengths[i] : 1;
    ratios[i] = static_cast<T>(m.lengths[i] ? m.row_ratios[i] / size : 1);
  }
}

// Reads the tokens' advantages and weights. Both are 0 for what is not in the policy term, which makes nothing of it.
template <typename T>
RADDPO_PASS read_tokens(PolicyLossArgs<T> a, PolicyLossScratch m, Stretch g, PolicySums& sums) {
  for (std::int64_t i = 0; a.weights && i < g.rows; ++i) m.row_weights[i] = a.weights[g.first + i];
  for (std::int64_t i = 0; !a.weights && i < g.rows; ++i) m.row_weights[i] = 1;
  if (a.aggregate == Aggregate::sequence)
    for (std::int64_t i = 0; i < g.rows; ++i) m.row_weights[i] /= m.lengths[i];
  if (a.aggregate == Aggregate::constant)
    for (std::int64_t i = 0; i < g.rows; ++i) m.row_weights[i] /= a.max_length;
  int invalid = 0;
#pragma omp simd reduction(+ : invalid)
  for (std::int64_t i = 0; i < g.rows; ++i) {
    const double weight = zero_unless(m.members[i] != 0, m.row_weights[i]);
    m.row_weights[i] = weight;
    invalid += weight >= 0 ? 0 : 1;
    invalid += weight < INFINITY ? 0 : 1;
  }
  spread(m.row_weights, g.rows, a.levels, m.weights);
  if (a.by_token || a.gates) {
    for (std::int64_t i = 0; i < g.rows; ++i) {
      const std::int32_t length = m.members[i] ? m.lengths[i] : 0;
      for_levels(i, a.levels, [&](std::int64_t t, std::int64_t l) {
        const double advantage = l < length ? advantage_of(a, g.first + i, static_cast<std::int32_t>(l)) : 0;
        m.advantages[t] = advantage;
        invalid += std::fabs(advantage) < INFINITY ? 0 : 1;
      });
    }
  } else {
    const T* const advantages = a.advantages + g.first;
#pragma omp simd reduction(+ : invalid)
    for (std::int64_t i = 0; i < g.rows; ++i) {
      const double advantage = m.members[i] ? advantages[i] : 0;
      m.row_advantages[i] = advantage;
      invalid += std::fabs(advantage) < INFINITY ? 0 : 1;
    }
    spread(m.row_advantages, g.rows, a.levels, m.advantages);
  }
  for_padding(m, g, a.levels, [&](std::int64_t t) { m.weights[t] = m.advantages[t] = 0; });
  sums.of[kInvalid] += invalid;
}

}  // namespace
}  // namespace raddpo::RADDPO_ISA
