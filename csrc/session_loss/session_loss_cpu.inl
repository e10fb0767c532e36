// One session at a time on one thread. Sessions are short: their loops are vectorised by 8 and, where they stay within
// scratch memory, padded to whole vectors; rows of 3 or 4 log-probs have loops of their own. Part of a
// per-instruction-set region.
namespace raddpo::RADDPO_ISA {
namespace {

RADDPO_HD std::int64_t padded(std::int64_t n) { return (n + 7) / 8 * 8; }

// Rewards of rows of kColumns log-probs, all of that length if `whole`.
template <int kColumns, bool whole, typename T>
RADDPO_HD void find_rewards(const SessionLossArgs<T>& a, const Session& v, const std::int32_t* lengths) {
  const T* logps = a.logps + v.first * kColumns;
  const T* ref_logps = a.ref_logps ? a.ref_logps + v.first * kColumns : nullptr;
  T* rewards = a.rewards + v.first;
#pragma omp simd simdlen(8)
  for (std::int64_t c = 0; c < v.positives + v.negatives; ++c) {
    const std::int32_t length = whole ? kColumns : lengths[c];
    T sum = 0;
    for (int i = 0; i < kColumns; ++i) {
      const T x = ref_logps ? logps[c * kColumns + i] - ref_logps[c * kColumns + i] : logps[c * kColumns + i];
      sum += i < length ? x : T(0);
    }
    const T size = static_cast<T>(length > 1 ? length : 1);
    rewards[c] = length ? (a.length_normalized ? a.beta / size : a.beta) * sum : T(0);
  }
}

template <int kColumns, typename T>
RADDPO_HD void find_rewards(const SessionLossArgs<T>& a, const Session& v, const std::int32_t* lengths, bool whole) {
  if (whole)
    find_rewards<kColumns, true>(a, v, lengths);
  else
    find_rewards<kColumns, false>(a, v, lengths);
}

// The lengths and rewards of a session's candidates; its negatives' rewards are copied.
template <typename T>
RADDPO_HD void read_candidates(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m) {
  const std::int64_t size = v.positives + v.negatives;
  std::int32_t shorter = 0;
  for (std::int64_t c = 0; c < size; ++c) {
    m.lengths[c] = static_cast<std::int32_t>(clamp_length(a.batch.lengths[v.first + c], a.levels));
    shorter += m.lengths[c] < a.levels;
  }
  if (a.columns == 4 && a.levels == 4)
    find_rewards<4>(a, v, m.lengths, !shorter);
  else if (a.columns == 3 && a.levels == 3)
    find_rewards<3>(a, v, m.lengths, !shorter);
  else
    for (std::int64_t c = v.first; c < v.first + size; ++c) a.rewards[c] = reward_of(a, c);
  for (std::int64_t j = 0; j < v.negatives; ++j) m.rewards[j] = a.rewards[v.first + v.positives + j];
  for (std::int64_t j = v.negatives; j < padded(v.negatives); ++j) {
    m.rewards[j] = 0;
    m.weights[j] = 1;
    m.prefixes[j] = -1;
  }
}

// Sets `prefixes` to 0, or to -1 for negatives that are empty or whose weight, in `weights`, is 0. Whether all weights
// are finite and at least 0.
template <typename T>
RADDPO_HD bool open_pairs(const Session& v, const SessionLossScratch<T>& m, const T* weights) {
  const std::int32_t* lengths = m.lengths + v.positives;
  std::int32_t bad = 0;
  if (!weights) {
    for (std::int64_t j = 0; j < v.negatives; ++j) m.prefixes[j] = lengths[j] ? 0 : -1;
    return true;
  }
#pragma omp simd simdlen(8) reduction(+ : bad)
  for (std::int64_t j = 0; j < v.negatives; ++j) {
    const T weight = weights[j];
    m.weights[j] = weight;
    m.prefixes[j] = (lengths[j] > 0) & (weight > 0) ? 0 : -1;
    bad += (weight >= 0) & (weight < INFINITY) ? 0 : 1;
  }
  return bad == 0;
}

// How many tokens a positive, not empty, has in common with each negative of an open pair; -1 if all.
template <typename T>
RADDPO_HD void find_prefixes(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m,
                             std::int64_t p) {
  const Sid positive{a.tokens + (v.first + p) * a.levels, m.lengths[p]};
  const std::int64_t* tokens = a.tokens + (v.first + v.positives) * a.levels;
  const std::int32_t* lengths = m.lengths + v.positives;
  for (std::int64_t j = 0; j < v.negatives; ++j, tokens += a.levels) {
    if (m.prefixes[j] < 0 || *tokens != *positive.tokens) continue;
    const std::int32_t k = common_prefix(positive, {tokens, lengths[j]});
    m.prefixes[j] = no_pair(k, positive.length, lengths[j]) ? -1 : k;
  }
}

// The most tokens that each negative has in common with any positive. Drops those equal to one of them.
template <typename T>
RADDPO_HD void find_guarded(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m) {
  const std::int32_t* lengths = m.lengths + v.positives;
  for (std::int64_t j = 0; j < v.negatives; ++j) m.guarded[j] = 0;
  for (std::int64_t p = 0; p < v.positives; ++p) {
    const Sid positive{a.tokens + (v.first + p) * a.levels, m.lengths[p]};
    const std::int64_t* tokens = a.tokens + (v.first + v.positives) * a.levels;
    if (!positive.length) continue;
    for (std::int64_t j = 0; j < v.negatives; ++j, tokens += a.levels) {
      if (!lengths[j] || *tokens != *positive.tokens) continue;
      const std::int32_t k = common_prefix(positive, {tokens, lengths[j]});
      m.guarded[j] = k > m.guarded[j] ? k : m.guarded[j];
      if (no_pair(k, positive.length, lengths[j])) m.prefixes[j] = -1;
    }
  }
}

template <typename T>
RADDPO_HD void find_margins(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m,
                            std::int64_t p) {
  const T positive = a.rewards[v.first + p];
  T* margins = a.margins + v.first_pair + p * v.negatives;
#pragma omp simd simdlen(8)
  for (std::int64_t j = 0; j < v.negatives; ++j) {
    const T margin = margin_of(positive, m.rewards[j]);
    margins[j] = m.prefixes[j] >= 0 ? margin : T(0);
  }
}

// Counts the pairs that a positive of the loss keeps, and the margins above 0 among them.
template <typename T>
RADDPO_HD std::int32_t count_pairs(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m,
                                   std::int64_t p, SessionSums& sums) {
  const T positive = a.rewards[v.first + p];
  std::int32_t wins = 0, pairs = 0;
#pragma omp simd simdlen(8) reduction(+ : wins, pairs)
  for (std::int64_t j = 0; j < padded(v.negatives); ++j) {
    wins += (m.prefixes[j] >= 0) & (positive > m.rewards[j]);
    pairs += m.prefixes[j] >= 0;
  }
  sums.wins += wins;
  sums.pairs += pairs;
  return pairs;
}

// What each negative puts into the log-sum-exp, in `shares`; -inf if it is dropped. The greatest of them.
template <typename T>
RADDPO_HD T find_exponents(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m) {
  const T sign = sign_of(a);
  const std::int64_t size = padded(v.negatives);
  T most = -INFINITY;
  if (a.pair_weights && a.weighting == Weighting::reward) {
#pragma omp simd simdlen(8) reduction(max : most)
    for (std::int64_t j = 0; j < size; ++j) {
      T x = sign * (m.rewards[j] * m.weights[j]);
      x = m.prefixes[j] >= 0 ? x : T(-INFINITY);
      m.shares[j] = x;
      most = x > most ? x : most;
    }
  } else if (a.pair_weights) {
#pragma omp simd simdlen(8) reduction(max : most)
    for (std::int64_t j = 0; j < size; ++j) {
      T x = sign * m.rewards[j] + fast_log(m.weights[j]);
      x = m.prefixes[j] >= 0 ? x : T(-INFINITY);
      m.shares[j] = x;
      most = x > most ? x : most;
    }
  } else {
#pragma omp simd simdlen(8) reduction(max : most)
    for (std::int64_t j = 0; j < size; ++j) {
      T x = sign * m.rewards[j];
      x = m.prefixes[j] >= 0 ? x : T(-INFINITY);
      m.shares[j] = x;
      most = x > most ? x : most;
    }
  }
  return most;
}

template <typename T>
struct LogSum {
  T most, sum;
};

// The log-sum-exp of the kept negatives' exponents; leaves e^(exponent - most) in `shares`, 0 for dropped ones.
template <typename T>
RADDPO_HD LogSum<T> sum_negatives(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m) {
  const T most = find_exponents(a, v, m);
  T sum = 0;
#pragma omp simd simdlen(8) reduction(+ : sum)
  for (std::int64_t j = 0; j < padded(v.negatives); ++j) {
    const T share = share_of(m.shares[j], most);
    m.shares[j] = share;
    sum += share;
  }
  return {most, sum};
}

// Which tokens of the kept negatives are detached, from those they share with the winner.
template <typename T>
RADDPO_HD void choose_detached(const SessionLossArgs<T>& a, std::int64_t n, const SessionLossScratch<T>& m) {
  if (a.detach || a.protect == Protect::none) {
    for (std::int64_t j = 0; j < n; ++j) m.prefixes[j] = m.prefixes[j] < 0 ? -1 : 0;
  } else if (a.protect == Protect::positives || a.positives == Positives::pooled) {
    for (std::int64_t j = 0; j < n; ++j) m.prefixes[j] = m.prefixes[j] < 0 ? -1 : m.guarded[j];
  }
}

// Adds to each row its factor from the column `begin` to the length. Rows with a begin of -1 have no gradient.
template <int kColumns, typename T>
RADDPO_HD void add_rows(const std::int32_t* begins, const std::int32_t* lengths, const T* factors, std::int64_t n,
                        T* gradient) {
  for (std::int64_t j = 0; j < n; ++j, gradient += kColumns) {
    const std::int32_t begin = begins[j], end = begin < 0 ? 0 : lengths[j];
    const T factor = factors[j];
    for (int i = 0; i < kColumns; ++i) gradient[i] += i >= begin && i < end ? factor : T(0);
  }
}

// The gradient of the negatives: their shares, which it spends, times `factor`.
template <typename T>
RADDPO_HD void add_negatives(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m, T factor) {
  const std::int32_t columns = static_cast<std::int32_t>(a.columns);
  const std::int32_t* lengths = m.lengths + v.positives;
  choose_detached(a, v.negatives, m);
  factor *= a.beta;
  if (a.pair_weights && a.weighting == Weighting::reward)
    for (std::int64_t j = 0; j < v.negatives; ++j) m.shares[j] *= m.weights[j];
#pragma omp simd simdlen(8)
  for (std::int64_t j = 0; j < v.negatives; ++j) {
    const std::int32_t length = lengths[j] < columns ? lengths[j] : columns;
    m.shares[j] *= a.length_normalized ? factor / static_cast<T>(length > 1 ? length : 1) : factor;
  }
  T* gradient = a.gradient + (v.first + v.positives) * a.columns;
  if (columns == 4) return add_rows<4>(m.prefixes, lengths, m.shares, v.negatives, gradient);
  if (columns == 3) return add_rows<3>(m.prefixes, lengths, m.shares, v.negatives, gradient);
  for (std::int64_t j = 0; j < v.negatives; ++j, gradient += columns)
    for (std::int32_t i = m.prefixes[j]; m.prefixes[j] >= 0 && i < lengths[j] && i < columns; ++i)
      gradient[i] += m.shares[j];
}

// The term of kept negatives against a winner's reward, and their gradient.
template <typename T>
RADDPO_HD Term<T> add_term(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m, T winner) {
  const LogSum<T> s = sum_negatives(a, v, m);
  const Term<T> term = term_of(gap_of(a, s.most + fast_log(s.sum), winner), a.label_smoothing);
  if (a.gradient) add_negatives(a, v, m, term.slope / s.sum);
  return term;
}

// The first positive, or the mean over those that keep a pair.
template <typename T>
RADDPO_HD void add_winners(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m,
                           SessionSums& sums) {
  if (a.gradient && a.protect == Protect::positives && !a.detach) find_guarded(a, v, m);
  std::int64_t terms = 0;
  double total = 0;
  for (std::int64_t p = 0; p < v.positives; ++p) {
    const T* weights = a.pair_weights ? a.pair_weights + v.first_pair + p * v.negatives : nullptr;
    if (!open_pairs(v, m, weights)) sums.bad_weights = 1;
    if (m.lengths[p])
      find_prefixes(a, v, m, p);
    else
      for (std::int64_t j = 0; j < v.negatives; ++j) m.prefixes[j] = -1;
    find_margins(a, v, m, p);
    const bool in_loss = p == 0 || a.positives == Positives::each;
    if (!in_loss || !count_pairs(a, v, m, p, sums)) continue;
    const Term<T> term = add_term(a, v, m, a.rewards[v.first + p]);
    if (a.gradient) add_gradient(a, v.first + p, 0, -term.slope);
    total += term.value;
    ++terms;
  }
  if (!terms) return;
  sums.kept = 1;
  sums.preference = total / static_cast<double>(terms);
  if (terms == 1 || !a.gradient) return;
  T* gradient = a.gradient + v.first * a.columns;
  for (std::int64_t i = 0; i < (v.positives + v.negatives) * a.columns; ++i) gradient[i] /= static_cast<T>(terms);
}

// The least weight of each negative with any positive of the pool. Whether all are finite and at least 0.
template <typename T>
RADDPO_HD bool find_least(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m) {
  const T* weights = a.pair_weights + v.first_pair;
  std::int32_t bad = 0;
  for (std::int64_t j = 0; j < v.negatives; ++j) m.weights[j] = INFINITY;
  for (std::int64_t p = 0; p < v.positives; ++p, weights += v.negatives) {
    const bool member = m.lengths[p] > 0;
#pragma omp simd simdlen(8) reduction(+ : bad)
    for (std::int64_t j = 0; j < v.negatives; ++j) {
      const T weight = weights[j];
      m.weights[j] = member & (weight < m.weights[j]) ? weight : m.weights[j];
      bad += (weight >= 0) & (weight < INFINITY) ? 0 : 1;
    }
  }
  return bad == 0;
}

// All positives at once, but empty ones, against the negatives that differ from every one of them.
template <typename T>
RADDPO_HD void add_pool(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m,
                        SessionSums& sums) {
  const T* rewards = a.rewards + v.first;
  if (a.pair_weights && !find_least(a, v, m)) sums.bad_weights = 1;
  for (std::int64_t j = 0; j < v.negatives; ++j)
    m.prefixes[j] = m.lengths[v.positives + j] && (!a.pair_weights || m.weights[j] > 0) ? 0 : -1;
  find_guarded(a, v, m);
  T most = -INFINITY, sum = 0;
  for (std::int64_t p = 0; p < v.positives; ++p) most = m.lengths[p] && rewards[p] > most ? rewards[p] : most;
  for (std::int64_t p = 0; p < v.positives; ++p) {
    if (m.lengths[p]) {
      find_margins(a, v, m, p);
      count_pairs(a, v, m, p, sums);
      sum += share_of(rewards[p], most);
    } else {
      for (std::int64_t j = 0; j < v.negatives; ++j) a.margins[v.first_pair + p * v.negatives + j] = 0;
    }
  }
  if (!sums.pairs) return;
  const Term<T> term = add_term(a, v, m, most + fast_log(sum));
  sums.kept = 1;
  sums.preference = term.value;
  for (std::int64_t p = 0; a.gradient && p < v.positives; ++p)
    if (m.lengths[p]) add_gradient(a, v.first + p, 0, -term.slope * share_of(rewards[p], most) / sum);
}

template <typename T>
RADDPO_HD SessionSums run_session(const SessionLossArgs<T>& a, const SessionLossScratch<T>& m, const Session& v) {
  SessionSums sums{};
  const std::int64_t first = v.first * a.columns, end = first + (v.positives + v.negatives) * a.columns;
  read_candidates(a, v, m);
  for (std::int64_t p = v.first; p < v.first + v.positives; ++p) add_sft(a, p, sums);
  if (a.gradient)
    for (std::int64_t i = first; i < end; ++i) a.gradient[i] = 0;
  if (a.positives == Positives::pooled)
    add_pool(a, v, m, sums);
  else
    add_winners(a, v, m, sums);
  if (a.gradient && a.detach)
    for (std::int64_t i = first; i < end; ++i) a.gradient[i] = a.detach[i] ? T(0) : a.gradient[i];
  return sums;
}

template <typename T>
RADDPO_HD void run(const SessionLossArgs<T>& args, const SessionLossScratch<T>& scratch, std::int64_t begin,
                   std::int64_t end, SessionSums* sums) {
  const SessionLossArgs<T> a = args;  // copies of our own, which no store can change
  const SessionLossScratch<T> m = scratch;
  for (std::int64_t s = begin; s < end; ++s) {
    sums[s] = run_session(a, m, session_of(a, s));
    if (a.reduction == Reduction::none)
      write_losses(a, s, static_cast<T>(sums[s].preference), static_cast<T>(sums[s].sft));
  }
}

template <typename T>
RADDPO_HD void run(const SessionLossBackwardArgs<T>& args, std::int64_t begin, std::int64_t end) {
  const SessionLossBackwardArgs<T> a = args;
  for (std::int64_t s = begin; s < end; ++s) {
    const Session v = session_of(a.batch, s);
    const T preference = preference_factor(a, s), sft = sft_factor(a, s);
    const std::int64_t first = v.first * a.columns, size = (v.positives + v.negatives) * a.columns;
#pragma omp simd simdlen(8)
    for (std::int64_t i = first; i < first + size; ++i) a.grad_logps[i] = preference * a.gradient[i];
    for (std::int64_t p = v.first; p < v.first + v.positives; ++p) {
      const std::int64_t length = clamp_length(a.batch.lengths[p], a.columns);
      for (std::int64_t i = 0; i < length; ++i)
        a.grad_logps[p * a.columns + i] -= sft * (a.level_weights ? a.level_weights[i] : T(1));
    }
  }
}

}  // namespace

#define RADDPO_DEFINE(T)                                                                                               \
  void session_loss(const SessionLossArgs<T>& a, const SessionLossScratch<T>& m, std::int64_t begin, std::int64_t end, \
                    SessionSums* sums) {                                                                               \
    run(a, m, begin, end, sums);                                                                                       \
  }                                                                                                                    \
  void session_loss_backward(const SessionLossBackwardArgs<T>& a, std::int64_t begin, std::int64_t end) {              \
    run(a, begin, end);                                                                                                \
  }
RADDPO_DEFINE(float)
RADDPO_DEFINE(double)
#undef RADDPO_DEFINE

}  // namespace raddpo::RADDPO_ISA
