// One group at a time on one thread. Siblings are found by sorting the group's SIDs: the rows with a prefix are then
// one after another. Part of a per-instruction-set region.
namespace raddpo::RADDPO_ISA {
namespace {

template <typename T>
RADDPO_HD bool is_valid(const GroupAdvantagesArgs<T>& a, std::int64_t row) {
  const bool bad_reward = std::fabs(a.rewards[row]) > kMaxReward;  // NaN is not
  return !bad_reward && (!a.weights || (a.weights[row] >= 0 && a.weights[row] <= kMaxReward));
}

// Lists the rows that count, and returns how many they are.
template <typename T>
RADDPO_HD std::int64_t read_rows(const GroupAdvantagesArgs<T>& a, const Session& v, const GroupScratch& m,
                                 bool& valid) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < v.positives + v.negatives; ++i) {
    valid &= is_valid(a, v.first + i);
    const Weighted row = read_row(a, v, i);
    m.rows[count] = v.first + i;
    m.rewards[count] = row.reward;
    m.weights[count] = row.weight;
    count += row.weight > 0;
  }
  return count;
}

// The moments of value_at(k), k in [0, count), and their deviations; where weight_at(k) is 0, k does not count.
template <typename Value, typename Weight>
RADDPO_HD Moments moments(std::int64_t count, Value value_at, Weight weight_at) {
  Moments m = no_moments();
  for (std::int64_t k = 0; k < count; ++k)
    if (weight_at(k) > 0) add(m, value_at(k), weight_at(k));
  return m;
}
template <typename Value, typename Weight>
RADDPO_HD Deviations deviations(std::int64_t count, const Moments& m, Value value_at, Weight weight_at) {
  Deviations d{};
  const double mean = mean_of(m);
  for (std::int64_t k = 0; k < count; ++k)
    if (weight_at(k) > 0) add(d, m, mean, value_at(k), weight_at(k));
  return d;
}

// The advantages of whole rows.
template <typename T>
RADDPO_HD void find_sequence(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, std::int64_t s, std::int64_t count,
                             const Moments& sums, double batch_std) {
  double divisor = 1;
  if (a.scale == Scale::batch) divisor = batch_std + a.eps;
  if (a.scale == Scale::group) {
    const Deviations d = deviations(
        count, sums, [&](std::int64_t k) { return m.rewards[k]; }, [&](std::int64_t k) { return m.weights[k]; });
    divisor = unbiased(sums, d) + a.eps;
  }
  for (std::int64_t k = 0; k < count; ++k) m.sequence[k] = centred(a, s, sums, {m.rewards[k], m.weights[k]}) / divisor;
}

RADDPO_HD bool is_less(const Sid& x, const Sid& y) {
  const std::int32_t k = common_prefix(x, y);
  return k < x.length && k < y.length ? x.tokens[k] < y.tokens[k] : x.length < y.length;
}

// Orders the rows by their SIDs, by merging runs that are in order.
template <typename T>
RADDPO_HD const std::int64_t* sort_rows(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, std::int64_t count) {
  std::int64_t *order = m.order, *spare = m.spare;
  for (std::int64_t k = 0; k < count; ++k) order[k] = k;
  for (std::int64_t width = 1; width < count; width *= 2) {
    for (std::int64_t begin = 0; begin < count; begin += 2 * width) {
      const std::int64_t middle = begin + width < count ? begin + width : count;
      const std::int64_t end = middle + width < count ? middle + width : count;
      std::int64_t i = begin, j = middle;
      for (std::int64_t k = begin; k < end; ++k) {
        const bool first =
            j == end || (i < middle && !is_less(sid_of(a, m.rows[order[j]]), sid_of(a, m.rows[order[i]])));
        spare[k] = first ? order[i++] : order[j++];
      }
    }
    std::int64_t* const sorted = spare;
    spare = order;
    order = sorted;
  }
  for (std::int64_t k = 1; k < count; ++k)
    m.shared[k] = common_prefix(sid_of(a, m.rows[order[k - 1]]), sid_of(a, m.rows[order[k]]));
  return order;
}

// The end of the rows from `begin` on that have a prefix of this depth in common.
RADDPO_HD std::int64_t end_of(const GroupScratch& m, std::int64_t begin, std::int64_t count, std::int32_t depth) {
  std::int64_t end = begin + 1;
  while (end < count && m.shared[end] >= depth) ++end;
  return end;
}

// The children of one prefix of `depth` tokens, the rows [begin, end) in order: each one's score is the mean reward of
// its rows.
template <typename T>
RADDPO_HD void add_siblings(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, const std::int64_t* order,
                            std::int64_t begin, std::int64_t end, std::int32_t depth) {
  Moments scores = no_moments();
  for (std::int64_t first = begin, last; first < end; first = last) {
    last = end_of(m, first, end, depth + 1);
    const Moments rows = moments(
        last - first, [&](std::int64_t k) { return m.rewards[order[first + k]]; },
        [&](std::int64_t k) { return m.weights[order[first + k]]; });
    m.scores[first] = mean_of(rows);
    add(scores, m.scores[first], 1);
  }
  if (!differ(scores)) return;
  Deviations d{};
  const double mean = mean_of(scores);
  for (std::int64_t first = begin; first < end; first = end_of(m, first, end, depth + 1))
    add(d, scores, mean, m.scores[first], 1);
  const double divisor = biased(scores, d) + a.eps;
  for (std::int64_t first = begin, last; first < end; first = last) {
    last = end_of(m, first, end, depth + 1);
    const double score = (m.scores[first] - mean) / divisor;
    for (std::int64_t k = first; k < last; ++k)
      a.values[m.rows[order[k]] * a.levels + depth] = blended(a, score, m.sequence[order[k]]);
  }
}

template <typename T>
RADDPO_HD void write_siblings(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, std::int64_t count) {
  const std::int64_t* const order = sort_rows(a, m, count);
  for (std::int64_t k = 0; k < count; ++k)  // unless a prefix has several children
    for (std::int32_t l = 0; l < sid_of(a, m.rows[k]).length; ++l)
      a.values[m.rows[k] * a.levels + l] = blended(a, 0, m.sequence[k]);
  for (std::int32_t depth = 0; depth < a.levels; ++depth)
    for (std::int64_t begin = 0, end; begin < count; begin = end) {
      end = end_of(m, begin, count, depth);
      std::int64_t child = begin;  // rows that end with the prefix come first
      while (child < end && sid_of(a, m.rows[order[child]]).length <= depth) ++child;
      if (end - child > 1) add_siblings(a, m, order, child, end, depth);
    }
}

template <typename T>
RADDPO_HD void write_marginal(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, std::int64_t count) {
  for (std::int32_t l = 0; l < a.levels; ++l) {
    const auto value_at = [&](std::int64_t k) { return m.scores[k * a.levels + l]; };
    const auto weight_at = [&](std::int64_t k) { return l < sid_of(a, m.rows[k]).length ? m.weights[k] : 0.; };
    const Moments sums = moments(count, value_at, weight_at);
    if (!differ(sums)) continue;
    const double mean = mean_of(sums), divisor = unbiased(sums, deviations(count, sums, value_at, weight_at)) + a.eps;
    for (std::int64_t k = 0; k < count; ++k)
      if (weight_at(k) > 0) a.values[m.rows[k] * a.levels + l] = static_cast<T>((value_at(k) - mean) / divisor);
  }
}

// Writes the gates of all rows of a group, and to `scores` what the levels of those that count add to their match.
template <typename T>
RADDPO_HD void find_matches(const GroupAdvantagesArgs<T>& a, const Session& v, const GroupScratch& m, std::int64_t s) {
  const Targets targets = targets_of(a, v, s);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < v.positives + v.negatives; ++i) {
    const std::int64_t row = v.first + i;
    write_matches(a, sid_of(a, row), targets, m.scores + count * a.levels, a.gates + row * a.levels);
    count += read_row(a, v, i).weight > 0;
  }
}

template <typename T>
RADDPO_HD bool run_group(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, std::int64_t s, double batch_std) {
  const Session v = session_of(a.batch, s);
  bool valid = true;
  const std::int64_t count = read_rows(a, v, m, valid), columns = a.credit == Credit::sequence ? 1 : a.levels;
  const Moments sums =
      moments(count, [&](std::int64_t k) { return m.rewards[k]; }, [&](std::int64_t k) { return m.weights[k]; });
  a.active[s] = differ(sums);
  for (std::int64_t i = v.first * columns; i < (v.first + v.positives + v.negatives) * columns; ++i) a.values[i] = 0;
  if (a.credit == Credit::marginal) find_matches(a, v, m, s);
  if (!differ(sums)) return valid;
  if (a.credit == Credit::marginal) {
    write_marginal(a, m, count);
    return valid;
  }
  find_sequence(a, m, s, count, sums, batch_std);
  if (a.credit == Credit::siblings) {
    write_siblings(a, m, count);
    return valid;
  }
  for (std::int64_t k = 0; k < count; ++k) a.values[m.rows[k]] = static_cast<T>(m.sequence[k]);
  return valid;
}

// Calls body(row) for each row that counts.
template <typename T, typename Body>
RADDPO_HD void for_rows(const GroupAdvantagesArgs<T>& a, const Body& body) {
  for (std::int64_t s = 0; s < a.batch.sessions; ++s) {
    const Session v = session_of(a.batch, s);
    for (std::int64_t i = 0; i < v.positives + v.negatives; ++i) {
      const Weighted row = read_row(a, v, i);
      if (row.weight > 0) body(row);
    }
  }
}

template <typename T>
RADDPO_HD double std_of(const GroupAdvantagesArgs<T>& a) {
  Moments sums = no_moments();
  for_rows(a, [&](const Weighted& row) { add(sums, row.reward, row.weight); });
  Deviations d{};
  const double mean = mean_of(sums);
  for_rows(a, [&](const Weighted& row) { add(d, sums, mean, row.reward, row.weight); });
  return unbiased(sums, d);
}

template <typename T>
RADDPO_HD bool run(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, double batch_std, std::int64_t begin,
                   std::int64_t end) {
  bool valid = true;
  for (std::int64_t s = begin; s < end; ++s) valid &= run_group(a, m, s, batch_std);
  return valid;
}

}  // namespace

#define RADDPO_DEFINE(T)                                                                                              \
  double batch_std(const GroupAdvantagesArgs<T>& a) { return std_of(a); }                                             \
  bool group_advantages(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, double batch_std, std::int64_t begin, \
                        std::int64_t end) {                                                                           \
    return run(a, m, batch_std, begin, end);                                                                          \
  }
RADDPO_DEFINE(float)
RADDPO_DEFINE(double)
#undef RADDPO_DEFINE

}  // namespace raddpo::RADDPO_ISA
