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
RADDPO_HD std::int64_t read_rows(const GroupAdvantagesArgs<T>& a, const Session& v, GroupRow* rows, bool& valid) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < v.positives + v.negatives; ++i) {
    valid &= is_valid(a, v.first + i);
    const Weighted row = read_row(a, v, i);
    rows[count] = {sid_of(a, v.first + i), v.first + i, row.reward, row.weight, 0};
    count += row.weight > 0;
  }
  return count;
}

RADDPO_HD Moments reward_moments(const GroupRow* rows, std::int64_t count, bool unit) {
  Moments m = no_moments(unit);
  for (std::int64_t k = 0; k < count; ++k) add(m, rows[k].reward, rows[k].weight);
  return m;
}

// The advantages of whole rows.
template <typename T>
RADDPO_HD void find_sequence(const GroupAdvantagesArgs<T>& a, GroupRow* rows, std::int64_t s, std::int64_t count,
                             const Moments& sums, double batch_std) {
  const double mean = mean_of(sums);
  double divisor = 1;
  if (a.scale == Scale::batch) divisor = batch_std + a.eps;
  if (a.scale == Scale::group) {
    Deviations d{};
    for (std::int64_t k = 0; k < count; ++k) add(d, sums, mean, rows[k].reward, rows[k].weight);
    divisor = unbiased(sums, d) + a.eps;
  }
  for (std::int64_t k = 0; k < count; ++k)
    rows[k].sequence = centred(a, s, sums, mean, {rows[k].reward, rows[k].weight}) / divisor;
}

RADDPO_HD bool is_less(const GroupRow* rows, const GroupPlace& x, const GroupPlace& y) {
  if (x.token != y.token) return x.token < y.token;
  const Sid &first = rows[x.row].sid, &second = rows[y.row].sid;
  const std::int32_t k = common_prefix(first, second);
  return k < first.length && k < second.length ? first.tokens[k] < second.tokens[k] : first.length < second.length;
}

// Orders the rows by their SIDs, and returns where they are then. Runs are made by insertion, and merged two by two.
RADDPO_HD const GroupRow* sort_rows(const GroupScratch& m, std::int64_t count) {
  constexpr std::int64_t kRun = 16;
  GroupPlace *places = m.places, *spare = m.places + count;
  for (std::int64_t k = 0; k < count; ++k) {
    const GroupPlace place{m.rows[k].sid.tokens[0], k};
    std::int64_t j = k;
    for (; j > k / kRun * kRun && is_less(m.rows, place, places[j - 1]); --j) places[j] = places[j - 1];
    places[j] = place;
  }
  for (std::int64_t width = kRun; width < count; width *= 2) {
    for (std::int64_t begin = 0; begin < count; begin += 2 * width) {
      const std::int64_t middle = begin + width < count ? begin + width : count;
      const std::int64_t end = middle + width < count ? middle + width : count;
      std::int64_t i = begin, j = middle;
      for (std::int64_t k = begin; k < end; ++k) {
        const bool first = j == end || (i < middle && !is_less(m.rows, places[j], places[i]));
        spare[k] = first ? places[i++] : places[j++];
      }
    }
    GroupPlace* const sorted = spare;
    spare = places;
    places = sorted;
  }
  for (std::int64_t k = 0; k < count; ++k) {
    m.sorted[k] = m.rows[places[k].row];
    m.shared[k] = k ? common_prefix(m.sorted[k - 1].sid, m.sorted[k].sid) : 0;
  }
  return m.sorted;
}

// The end of the rows from `begin` on that have a prefix of this depth in common.
RADDPO_HD std::int64_t end_of(const GroupScratch& m, std::int64_t begin, std::int64_t count, std::int32_t depth) {
  std::int64_t end = begin + 1;
  while (end < count && m.shared[end] >= depth) ++end;
  return end;
}

// The children of one prefix of `depth` tokens, of the rows [begin, end) in order: each one's score is the mean reward
// of its rows.
template <typename T>
RADDPO_HD void write_children(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, const GroupRow* rows,
                              std::int64_t begin, std::int64_t end, std::int32_t depth) {
  Moments scores = no_moments(true);
  std::int64_t children = 0;
  for (std::int64_t first = begin, last; first < end; first = last) {
    last = end_of(m, first, end, depth + 1);
    const bool single = last == first + 1;
    const double score = single ? rows[first].reward : mean_of(reward_moments(rows + first, last - first, !a.weights));
    m.children[children] = first;
    m.scores[children++] = score;
    add(scores, score, 1);
  }
  m.children[children] = end;
  if (!differ(scores)) return;
  Deviations d{};
  const double mean = mean_of(scores);
  for (std::int64_t c = 0; c < children; ++c) add(d, scores, mean, m.scores[c], 1);
  const double divisor = biased(scores, d) + a.eps;
  for (std::int64_t c = 0; c < children; ++c) {
    const double score = (m.scores[c] - mean) / divisor;
    for (std::int64_t k = m.children[c]; k < m.children[c + 1]; ++k)
      a.values[rows[k].row * a.levels + depth] = blended(a, score, rows[k].sequence);
  }
}

template <typename T>
RADDPO_HD void write_siblings(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, std::int64_t count) {
  const GroupRow* const rows = sort_rows(m, count);
  if (a.blend != 1)  // where a prefix has one child
    for (std::int64_t k = 0; k < count; ++k)
      for (std::int32_t l = 0; l < rows[k].sid.length; ++l)
        a.values[rows[k].row * a.levels + l] = blended(a, 0, rows[k].sequence);
  std::int32_t deepest = 0;  // prefix that several rows share
  for (std::int64_t k = 1; k < count; ++k) deepest = m.shared[k] > deepest ? m.shared[k] : deepest;
  for (std::int32_t depth = 0; depth <= deepest && depth < a.levels; ++depth)
    for (std::int64_t begin = 0, end; begin < count; begin = end) {
      end = end_of(m, begin, count, depth);
      if (end - begin < 2) continue;
      std::int64_t child = begin;  // rows that end with the prefix come first
      while (child < end && rows[child].sid.length <= depth) ++child;
      if (end - child > 1) write_children(a, m, rows, child, end, depth);
    }
}

template <typename T>
RADDPO_HD void write_marginal(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, std::int64_t count) {
  const GroupRow* const rows = m.rows;
  for (std::int32_t l = 0; l < a.levels; ++l) {
    const double* const added = m.scores + l;
    Moments sums = no_moments(!a.weights);
    for (std::int64_t k = 0; k < count; ++k)
      if (l < rows[k].sid.length) add(sums, added[k * a.levels], rows[k].weight);
    if (!differ(sums)) continue;
    Deviations d{};
    const double mean = mean_of(sums);
    for (std::int64_t k = 0; k < count; ++k)
      if (l < rows[k].sid.length) add(d, sums, mean, added[k * a.levels], rows[k].weight);
    const double divisor = unbiased(sums, d) + a.eps;
    for (std::int64_t k = 0; k < count; ++k)
      if (l < rows[k].sid.length)
        a.values[rows[k].row * a.levels + l] = static_cast<T>((added[k * a.levels] - mean) / divisor);
  }
}

// Writes the gates of all rows of a group, and to `scores` what the levels of those that count add to their match.
template <typename T>
RADDPO_HD void find_matches(const GroupAdvantagesArgs<T>& a, const Session& v, const GroupScratch& m, std::int64_t s,
                            std::int64_t count) {
  const Targets targets = targets_of(a, v, s);
  std::int64_t k = 0;
  for (std::int64_t row = v.first; row < v.first + v.positives + v.negatives; ++row) {
    write_matches(a, sid_of(a, row), targets, m.scores + k * a.levels, a.gates + row * a.levels);
    k += k < count && m.rows[k].row == row;
  }
}

template <typename T>
RADDPO_HD bool run_group(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, std::int64_t s, double batch_std) {
  const Session v = session_of(a.batch, s);
  bool valid = true;
  const std::int64_t count = read_rows(a, v, m.rows, valid);
  const Moments sums = reward_moments(m.rows, count, !a.weights);
  const bool active = differ(sums);
  a.active[s] = active;
  const std::int64_t columns = a.credit == Credit::sequence ? 1 : a.levels, first = v.first * columns;
  for (std::int64_t i = first; i < first + (v.positives + v.negatives) * columns; ++i) a.values[i] = 0;
  if (a.credit == Credit::marginal) find_matches(a, v, m, s, count);
  if (!active) return valid;
  if (a.credit == Credit::marginal) {
    write_marginal(a, m, count);
    return valid;
  }
  if (a.credit == Credit::sequence || a.blend != 1) find_sequence(a, m.rows, s, count, sums, batch_std);
  if (a.credit == Credit::siblings)
    write_siblings(a, m, count);
  else
    for (std::int64_t k = 0; k < count; ++k) a.values[m.rows[k].row] = static_cast<T>(m.rows[k].sequence);
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
  Moments sums = no_moments(!a.weights);
  for_rows(a, [&](const Weighted& row) { add(sums, row.reward, row.weight); });
  Deviations d{};
  const double mean = mean_of(sums);
  for_rows(a, [&](const Weighted& row) { add(d, sums, mean, row.reward, row.weight); });
  return unbiased(sums, d);
}

template <typename T>
RADDPO_HD bool run(const GroupAdvantagesArgs<T>& args, const GroupScratch& scratch, double batch_std,
                   std::int64_t begin, std::int64_t end) {
  const GroupAdvantagesArgs<T> a = args;  // local copies: the compiler knows that no store changes them
  const GroupScratch m = scratch;
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
