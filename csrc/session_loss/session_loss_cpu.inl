// One session at a time on one thread. Sessions are short: loops are vectorised by 8 and, where they only touch scratch
// memory, padded to whole vectors. Rows of 3 or 4 log-probs have their own loops. Part of a per-instruction-set region.
namespace raddpo::RADDPO_ISA {
namespace {

RADDPO_HD std::int64_t padded(std::int64_t n) { return (n + 7) / 8 * 8; }

// Rewards of rows of kColumns log-probs; with `whole`, every row has this length.
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

// Reads the lengths and computes the rewards of a session's candidates, and copies the negatives' rewards to scratch.
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

// Finds the common prefix of a positive with each negative, -1 where the pair is dropped. Returns how many are dropped.
template <typename T>
RADDPO_HD std::int64_t find_prefixes(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m,
                                     std::int64_t p) {
  const Sid positive{a.tokens + (v.first + p) * a.levels, m.lengths[p]};
  const std::int64_t* tokens = a.tokens + (v.first + v.positives) * a.levels;
  const std::int32_t* lengths = m.lengths + v.positives;
  std::int64_t dropped = 0;
  for (std::int64_t j = 0; j < v.negatives; ++j, tokens += a.levels) {
    std::int32_t k = positive.length && lengths[j] ? 0 : -1;
    if (k == 0 && *tokens == *positive.tokens) {
      k = common_prefix(positive, {tokens, lengths[j]});
      if (no_pair(k, positive.length, lengths[j])) k = -1;
    }
    m.prefixes[j] = k;
    dropped += k < 0;
  }
  return dropped;
}

// Copies a positive's pair weights and drops its pairs of weight 0. Returns whether all are finite and at least 0.
template <typename T>
RADDPO_HD bool drop_weightless(const Session& v, const SessionLossScratch<T>& m, const T* weights) {
  std::int32_t bad = 0;
#pragma omp simd simdlen(8) reduction(+ : bad)
  for (std::int64_t j = 0; j < v.negatives; ++j) {
    const T weight = weights[j];
    m.weights[j] = weight;
    m.prefixes[j] = weight > 0 ? m.prefixes[j] : -1;
    bad += (weight >= 0) & (weight < INFINITY) ? 0 : 1;
  }
  return bad == 0;
}

// Finds the longest prefix that each negative has in common with any positive. Drops negatives that equal a positive.
// Returns the number of pairs with equal or empty SIDs.
template <typename T>
RADDPO_HD std::int64_t find_guarded(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m) {
  const std::int32_t* lengths = m.lengths + v.positives;
  std::int64_t dropped = 0;
  for (std::int64_t j = 0; j < v.negatives; ++j) m.guarded[j] = 0;
  for (std::int64_t p = 0; p < v.positives; ++p) {
    const Sid positive{a.tokens + (v.first + p) * a.levels, m.lengths[p]};
    const std::int64_t* tokens = a.tokens + (v.first + v.positives) * a.levels;
    for (std::int64_t j = 0; j < v.negatives; ++j, tokens += a.levels) {
      if (!positive.length || !lengths[j]) {
        ++dropped;
        continue;
      }
      if (*tokens != *positive.tokens) continue;
      const std::int32_t k = common_prefix(positive, {tokens, lengths[j]});
      m.guarded[j] = k > m.guarded[j] ? k : m.guarded[j];
      if (!no_pair(k, positive.length, lengths[j])) continue;
      m.prefixes[j] = -1;
      ++dropped;
    }
  }
  return dropped;
}

// Writes the margins of a positive's pairs, and which pairs the loss keeps.
template <typename T>
RADDPO_HD void write_pairs(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m,
                           std::int64_t p, bool in_loss) {
  const T positive = a.rewards[v.first + p];
  T* margins = a.margins + v.first_pair + p * v.negatives;
  bool* kept = a.kept + v.first_pair + p * v.negatives;
#pragma omp simd simdlen(8)
  for (std::int64_t j = 0; j < v.negatives; ++j) {
    const T margin = margin_of(positive, m.rewards[j]);
    margins[j] = m.prefixes[j] >= 0 ? margin : T(0);
  }
  for (std::int64_t j = 0; j < v.negatives; ++j) kept[j] = in_loss & (m.prefixes[j] >= 0);
}

// Adds the kept pairs of a positive to the sums. Returns their number.
template <typename T>
RADDPO_HD std::int32_t count_pairs(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m,
                                   std::int64_t p, SessionSums& sums) {
  const std::int64_t first_pair = v.first_pair + p * v.negatives;
  const T* margins = a.margins + first_pair;
  const T positive = a.rewards[v.first + p];
  const std::int32_t* lengths = m.lengths + v.positives;
  const std::int32_t* counts = a.detach ? m.guarded : m.prefixes;
  std::int32_t wins = 0, pairs = 0, detached = 0, tokens = 0;
  double margin = 0;
#pragma omp simd simdlen(8) reduction(+ : wins, pairs, detached, tokens, margin)
  for (std::int64_t j = 0; j < v.negatives; ++j) {
    const bool kept = m.prefixes[j] >= 0;
    wins += kept & (positive > m.rewards[j]);
    pairs += kept;
    detached += kept ? counts[j] : 0;
    tokens += kept ? lengths[j] : 0;
    margin += margins[j];  // 0 for a dropped pair
  }
  double weight = pairs;
  if (a.pair_weights) {
    const T* weights = a.pair_weights + first_pair;
    weight = 0;
    for (std::int64_t j = 0; j < v.negatives; ++j) weight += m.prefixes[j] >= 0 ? weights[j] : T(0);
  }
  add(sums.of[kMargins], margin, pairs);
  add(sums.of[kWins], wins, pairs);
  add(sums.of[kWeights], weight, pairs);
  add(sums.of[kDetached], detached, tokens);
  return pairs;
}

// Writes each negative's exponent of the log-sum-exp into `softmax`, -inf if it is dropped. Returns the maximum.
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
      m.softmax[j] = x;
      most = x > most ? x : most;
    }
  } else if (a.pair_weights) {
#pragma omp simd simdlen(8) reduction(max : most)
    for (std::int64_t j = 0; j < size; ++j) {
      T x = sign * m.rewards[j] + fast_log(m.weights[j]);
      x = m.prefixes[j] >= 0 ? x : T(-INFINITY);
      m.softmax[j] = x;
      most = x > most ? x : most;
    }
  } else {
#pragma omp simd simdlen(8) reduction(max : most)
    for (std::int64_t j = 0; j < size; ++j) {
      T x = sign * m.rewards[j];
      x = m.prefixes[j] >= 0 ? x : T(-INFINITY);
      m.softmax[j] = x;
      most = x > most ? x : most;
    }
  }
  return most;
}

template <typename T>
struct LogSum {
  T most, sum;
};

// The log-sum-exp of the kept negatives' exponents. Leaves e^(exponent - most) in `softmax`, 0 for dropped negatives.
template <typename T>
RADDPO_HD LogSum<T> sum_negatives(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m) {
  const T most = find_exponents(a, v, m);
  T sum = 0;
#pragma omp simd simdlen(8) reduction(+ : sum)
  for (std::int64_t j = 0; j < padded(v.negatives); ++j) {
    const T weight = softmax_weight(m.softmax[j], most);
    m.softmax[j] = weight;
    sum += weight;
  }
  return {most, sum};
}

// Replaces the common prefixes of the kept negatives by the number of leading tokens to detach. With `detach` no prefix
// is detached, and `guarded` counts the tokens that `detach` marks.
template <typename T>
RADDPO_HD void choose_detached(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m) {
  const std::int64_t n = v.negatives;
  for (std::int64_t j = 0; a.detach && j < n; ++j) m.guarded[j] = detached_of(a, v.first + v.positives + j);
  if (a.detach || a.protect == Protect::none) {
    for (std::int64_t j = 0; j < n; ++j) m.prefixes[j] = m.prefixes[j] < 0 ? -1 : 0;
  } else if (a.protect == Protect::positives || a.positives == Positives::pooled) {
    for (std::int64_t j = 0; j < n; ++j) m.prefixes[j] = m.prefixes[j] < 0 ? -1 : m.guarded[j];
  }
}

// Adds each row's factor to its columns from `begin` up to its length. Rows with begin = -1 have no gradient.
template <int kColumns, typename T>
RADDPO_HD void add_rows(const std::int32_t* begins, const std::int32_t* lengths, const T* factors, std::int64_t n,
                        T* gradient) {
  for (std::int64_t j = 0; j < n; ++j, gradient += kColumns) {
    const std::int32_t begin = begins[j], end = begin < 0 ? 0 : lengths[j];
    const T factor = factors[j];
    for (int i = 0; i < kColumns; ++i) gradient[i] += i >= begin && i < end ? factor : T(0);
  }
}

// Adds the gradient of the negatives: their softmax weights, which are overwritten, times `factor`.
template <typename T>
RADDPO_HD void add_negatives(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m, T factor) {
  const std::int32_t columns = static_cast<std::int32_t>(a.columns);
  const std::int32_t* lengths = m.lengths + v.positives;
  factor *= a.beta;
  if (a.pair_weights && a.weighting == Weighting::reward)
    for (std::int64_t j = 0; j < v.negatives; ++j) m.softmax[j] *= m.weights[j];
#pragma omp simd simdlen(8)
  for (std::int64_t j = 0; j < v.negatives; ++j) {
    const std::int32_t length = lengths[j] < columns ? lengths[j] : columns;
    m.softmax[j] *= a.length_normalized ? factor / static_cast<T>(length > 1 ? length : 1) : factor;
  }
  T* gradient = a.gradient + (v.first + v.positives) * a.columns;
  if (columns == 4) return add_rows<4>(m.prefixes, lengths, m.softmax, v.negatives, gradient);
  if (columns == 3) return add_rows<3>(m.prefixes, lengths, m.softmax, v.negatives, gradient);
  for (std::int64_t j = 0; j < v.negatives; ++j, gradient += columns)
    for (std::int32_t i = m.prefixes[j]; m.prefixes[j] >= 0 && i < lengths[j] && i < columns; ++i)
      gradient[i] += m.softmax[j];
}

// The term of the kept negatives against a winner's reward. Adds the negatives' gradient.
template <typename T>
RADDPO_HD Term<T> add_term(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m, T winner) {
  const LogSum<T> s = sum_negatives(a, v, m);
  const Term<T> term = term_of(loss_argument(a, s.most + fast_log(s.sum), winner), a.label_smoothing);
  if (a.gradient) add_negatives(a, v, m, term.derivative / s.sum);
  return term;
}

// Adds the term of the first positive or, under `each`, the mean term of the positives that keep a pair.
template <typename T>
RADDPO_HD void add_winners(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m,
                           SessionSums& sums) {
  if (a.protect == Protect::positives && !a.detach) find_guarded(a, v, m);
  std::int64_t terms = 0;
  double total = 0;
  for (std::int64_t p = 0; p < v.positives; ++p) {
    const std::int64_t dropped = find_prefixes(a, v, m, p);
    add(sums.of[kDropped], static_cast<double>(dropped), static_cast<double>(v.negatives));
    if (a.pair_weights && !drop_weightless(v, m, a.pair_weights + v.first_pair + p * v.negatives)) sums.bad_weights = 1;
    const bool in_loss = p == 0 || a.positives == Positives::each;
    write_pairs(a, v, m, p, in_loss);
    if (!in_loss) continue;
    choose_detached(a, v, m);
    if (!count_pairs(a, v, m, p, sums)) continue;
    const Term<T> term = add_term(a, v, m, a.rewards[v.first + p]);
    if (a.gradient) add_gradient(a, v.first + p, 0, -term.derivative);
    total += term.value;
    ++terms;
  }
  if (!terms) return;
  sums.of[kPreference] = {total / static_cast<double>(terms), 1};
  if (terms == 1 || !a.gradient) return;
  T* gradient = a.gradient + v.first * a.columns;
  for (std::int64_t i = 0; i < (v.positives + v.negatives) * a.columns; ++i) gradient[i] /= static_cast<T>(terms);
}

// Finds each negative's minimum weight over the positives of the pool. Returns whether all weights are finite and at
// least 0.
template <typename T>
RADDPO_HD bool find_min_weights(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m) {
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

// Adds the term of all non-empty positives against the negatives that differ from every positive.
template <typename T>
RADDPO_HD void add_pool(const SessionLossArgs<T>& a, const Session& v, const SessionLossScratch<T>& m,
                        SessionSums& sums) {
  const T* rewards = a.rewards + v.first;
  if (a.pair_weights && !find_min_weights(a, v, m)) sums.bad_weights = 1;
  for (std::int64_t j = 0; j < v.negatives; ++j)
    m.prefixes[j] = m.lengths[v.positives + j] && (!a.pair_weights || m.weights[j] > 0) ? 0 : -1;
  const std::int64_t dropped = find_guarded(a, v, m);
  sums.of[kDropped] = {static_cast<double>(dropped), static_cast<double>(v.positives * v.negatives)};
  choose_detached(a, v, m);
  T most = -INFINITY, sum = 0;
  for (std::int64_t p = 0; p < v.positives; ++p) most = m.lengths[p] && rewards[p] > most ? rewards[p] : most;
  for (std::int64_t p = 0; p < v.positives; ++p) {
    if (m.lengths[p]) {
      write_pairs(a, v, m, p, true);
      count_pairs(a, v, m, p, sums);
      sum += softmax_weight(rewards[p], most);
    } else {
      const std::int64_t first_pair = v.first_pair + p * v.negatives;
      for (std::int64_t j = 0; j < v.negatives; ++j) {
        a.margins[first_pair + j] = 0;
        a.kept[first_pair + j] = false;
      }
    }
  }
  if (!(sums.of[kWins].count > 0)) return;
  const Term<T> term = add_term(a, v, m, most + fast_log(sum));
  sums.of[kPreference] = {static_cast<double>(term.value), 1};
  for (std::int64_t p = 0; a.gradient && p < v.positives; ++p)
    if (m.lengths[p]) add_gradient(a, v.first + p, 0, -term.derivative * softmax_weight(rewards[p], most) / sum);
}

template <typename T>
RADDPO_HD SessionSums run_session(const SessionLossArgs<T>& a, const SessionLossScratch<T>& m, const Session& v) {
  SessionSums sums{};
  const std::int64_t first = v.first * a.columns, end = first + (v.positives + v.negatives) * a.columns;
  read_candidates(a, v, m);
  for (std::int64_t p = v.first; p < v.first + v.positives; ++p) add_sft(a, p, sums);
  for (std::int64_t c = 0; c < v.positives + v.negatives; ++c)
    add(sums.of[c < v.positives ? kChosen : kRejected], a.rewards[v.first + c], m.lengths[c] > 0);
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
  const SessionLossArgs<T> a = args;  // local copies: the compiler knows that no store changes them
  const SessionLossScratch<T> m = scratch;
  for (std::int64_t s = begin; s < end; ++s) {
    sums[s] = run_session(a, m, session_of(a, s));
    write_session(a, s, sums[s]);
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
