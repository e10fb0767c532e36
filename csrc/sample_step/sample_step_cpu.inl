// One query's beams, in order. A beam's children are taken together: their log-probs, then their keys, which need the
// best of them. No perturbed score is above its parent's, so a beam below the threshold is passed over unread. Most
// children are passed over too: a product tells that their noise does not lift them above the threshold.
#include "../beam_search/live_beams.inl"
#include "../common/log_sum_exp.inl"
#include "child_noise.inl"

namespace raddpo::RADDPO_ISA {
namespace {

constexpr int kFew = 16;     // children whose keys cost less than to tell which matter
constexpr int kBatch = 512;  // children whose keys are computed at once
constexpr int kFirst = 128;  // of the root, whose first ones nothing is known of to pass them over
constexpr int kTile = 32;    // children passed over at once
constexpr int kLanes = 16;   // of the widest vectors

// The children of one beam, whatever the type of its logits. Functions of a class are inline, but not visible outside.
struct Children {
  const SampleStepArgs& a;
  const TrieView& t;
  Best& best;
  Noise noise;
  double* sums;          // [children] running sums of the probabilities, with replacement
  std::uint32_t* words;  // [children + 38] random bits of consecutive nodes, without; the memory of `sums`
  std::uint32_t* nodes;  // [children]
  float *logps, *keys;   // [children + kLanes], [children + kTile]
  LiveBeam beam{};
  std::int32_t slot = 0;
  int hits[kBatch + kTile];   // children whose keys are computed,
  float own[kBatch + kTile];  // their own perturbed scores, and then their keys

  Children(const SampleStepArgs& args, std::int64_t query, Best& list, double* scratch)
      : a(args),
        t(args.trie),
        best(list),
        noise(static_cast<std::uint64_t>(*args.seed), static_cast<std::uint64_t>(args.keys[query])),
        sums(scratch),
        words(reinterpret_cast<std::uint32_t*>(scratch)),
        nodes(words + 2 * (args.symbols + 19)),
        logps(reinterpret_cast<float*>(nodes + args.symbols)),
        keys(logps + args.symbols + kLanes) {}

  void offer(std::int64_t i, float key) {
    if (key > best.threshold)
      push(best, {key, logps[i], slot, token_of(t, beam.level, symbol_of(t, nodes[i])), nodes[i]});
  }

  // Whole vectors: a rest is computed one by one, which takes long, and is rounded otherwise.
  static std::int64_t padded(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

  // The own perturbed scores of the hits; returns the best. Never inlined: every call gives a child the same bits.
  __attribute__((noinline)) float perturb(const std::uint32_t* bits, int count) {
    if (!count) return -INFINITY;
    const auto whole = static_cast<int>(padded(count));
    for (int k = count; k < whole; ++k) hits[k] = hits[0];
    std::uint32_t drawn[kBatch + kLanes];
    for (int k = 0; k < whole; ++k) {
      drawn[k] = bits[hits[k]];
      own[k] = logps[hits[k]];
    }
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int k = 0; k < whole; ++k) {
      own[k] = beam.score + own[k] + gumbel(drawn[k]);
      most = own[k] > most ? own[k] : most;
    }
    return most;
  }

  // Puts the hits among the best.
  void offer_hits(int count, float parent, float most) {
    if (parent < INFINITY) {
      const auto whole = static_cast<int>(padded(count));
#pragma omp simd
      for (int k = 0; k < whole; ++k) own[k] = conditioned(parent, own[k], most);
    }
    for (int k = 0; k < count; ++k) offer(hits[k], own[k]);
  }

  // A child's noise is -log(-log u), so that its own score is above x if -log u < p e^(score - x), and -log u is at
  // least 1 - u. Sets `keys` to (1 - u) / p, and to a little less where p is tiny; returns a number that -log u / p of
  // the best child does not exceed: what comes behind the children, as if their p were tiny, is far above that.
  float weigh(const std::uint32_t* bits, std::int64_t n) {
    const std::int64_t whole = padded(n);
    for (std::int64_t i = n; i < whole; ++i) logps[i] = -INFINITY;
    float soonest = INFINITY, *out = keys;
    const float* values = logps;
#pragma omp simd reduction(min : soonest)
    for (std::int64_t i = 0; i < whole; ++i) {
      const float inverse = fast_exp(values[i] > -87.f ? -values[i] : 87.f);
      const float rest = static_cast<float>(static_cast<std::int32_t>(~bits[i] >> 1)) * 0x1p-31f;
      const float above = rest + 0x1p-31f;
      const float latest = above < 0.5f ? (above + above * above) * inverse : INFINITY;  // x + x^2 > -log(1 - x)
      out[i] = rest * inverse;
      soonest = latest < soonest ? latest : soonest;
    }
    for (std::int64_t i = n; i < (n + kTile - 1) / kTile * kTile; ++i) keys[i] = NAN;
    return soonest;
  }

  // Which children of a tile reach the bar, one bit each.
  static std::uint32_t reaching(const float* tile, float bar) {
    std::uint32_t found = 0;
#ifdef RADDPO_BMI2
    for (int i = 0; i < kTile; i += 8) {
      const __m256 reach = _mm256_cmp_ps(_mm256_loadu_ps(tile + i), _mm256_set1_ps(bar), _CMP_LE_OQ);
      found |= static_cast<std::uint32_t>(_mm256_movemask_ps(reach)) << i;
    }
#else
    for (int i = 0; i < kTile; ++i) found |= static_cast<std::uint32_t>(tile[i] <= bar) << i;
#endif
    return found;
  }

  // Finds the children of [first, end) whose keys reach the bar; `first` is a multiple of kTile.
  int sieve(std::int64_t first, std::int64_t end, float bar) {
    int count = 0;
    for (; first < end; first += kTile)
      for (std::uint32_t found = reaching(keys + first, bar); found; found &= found - 1)
        hits[count++] = static_cast<int>(first) + count_trailing_zeros(found);
    return count;
  }

  // e^x to 1e-5 relative, far less than the slack; infinite for a large x, and for NaN.
  static double rough_exp(float x) { return x < 80.f ? fast_exp(x) : INFINITY; }

  // No child whose key is above this gets a perturbed score above the threshold: T_c > t if e^-g_c < e^-t - e^-T +
  // e^-Z. `first` is at least e^(score - Z).
  float bar(float parent, double first, double slack) const {
    slack += 1e-6 * std::fabs(best.threshold);
    if (!(slack < 1)) return INFINITY;
    const double ours = rough_exp(beam.score - best.threshold);
    const double sum = ours - rough_exp(beam.score - parent) + first + slack * (ours + first);
    return sum == sum ? static_cast<float>(sum) : INFINITY;
  }

  // Puts the children among the best by their perturbed scores. An only child has its parent's, whatever its noise; the
  // root, whose score is infinite, has none.
  void sample(std::int64_t n, float parent) {
    const bool is_root = parent == INFINITY;
    if (n == 1 && !is_root) return offer(0, parent);
    const std::uint32_t* bits = noise.draw_words(nodes, n, words);
    if (n <= kFew) {
      for (int i = 0; i < n; ++i) hits[i] = i;
      return offer_hits(static_cast<int>(n), parent, perturb(bits, static_cast<int>(n)));
    }
    const float soonest = weigh(bits, n);
    const double slack = 1e-4 + 1e-6 * (std::fabs(beam.score) + (is_root ? 0.f : std::fabs(parent)));
    const float reach = slack < 1 ? soonest * static_cast<float>(1 + slack) : INFINITY;
    if (n <= kBatch && !is_root) {  // the best child and all others that matter, together
      const float either = bar(parent, reach, slack);
      const int count = sieve(0, n, reach > either ? reach : either);
      if (count == 1) return offer(hits[0], parent);
      return offer_hits(count, parent, perturb(bits, count));
    }
    float most = is_root ? INFINITY : -INFINITY;
    const std::int64_t batch = is_root ? kFirst : kBatch;
    const auto end = [n, batch](std::int64_t first) { return first + batch < n ? first + batch : n; };
    for (std::int64_t first = 0; !is_root && first < n; first += batch) {
      const float best_of_batch = perturb(bits, sieve(first, end(first), reach));
      most = best_of_batch > most ? best_of_batch : most;
    }
    for (std::int64_t first = 0; first < n; first += batch) {
      const int count = sieve(first, end(first), bar(parent, rough_exp(beam.score - most), slack));
      perturb(bits, count);
      offer_hits(count, parent, most);
    }
  }

  // How many of the beam's draws each child gets, by the inverse of the distribution function.
  void draw(std::int64_t n, std::int64_t draws) {
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      sum += logps[i] > -INFINITY ? fast_exp(logps[i]) : 0.f;
      sums[i] = sum;
      keys[i] = -INFINITY;
    }
    for (std::int64_t j = 0; j < draws; ++j) {
      const double at = (draw_noise(beam.node, j, noise.query_key, noise.seed) + 0.5) * 0x1p-32 * sum;
      std::int64_t low = 0, high = n - 1;  // the first child whose sum is above `at`
      while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (sums[middle] > at)
          high = middle;
        else
          low = middle + 1;
      }
      keys[low] = keys[low] > 0.f ? keys[low] + 1.f : 1.f;
    }
    for (std::int64_t i = 0; i < n; ++i) offer(i, keys[i]);
  }
};

template <typename D, typename Symbol>
struct Sampler : Children {
  using Children::Children;

  // The log-probs of the children that are left, and their nodes; returns how many they are. None where the row has no
  // log-probs: a NaN, +inf, or nothing above -inf.
  RADDPO_HD std::int64_t read(const typename D::T* row, int level, Range children) {
    RowSum s;
    std::int64_t n = 0;
    std::int32_t columns[kChunk];
    for (LiveChunks<Symbol, kChunk> chunk(t, children); chunk.next(); n += chunk.size) {
      columns_of(a, level, chunk.symbols, chunk.size, columns);
      for (int i = 0; i < chunk.size; ++i) nodes[n + i] = static_cast<std::uint32_t>(chunk.node(i));
      float* values = logps + n;
      const float scale = a.scale;
#pragma omp simd
      for (int i = 0; i < chunk.size; ++i) values[i] = D::load(row + columns[i]) * scale;
      const std::int64_t whole = padded(chunk.size);
      for (std::int64_t i = chunk.size; i < whole; ++i) values[i] = -INFINITY;
      if (children.count > 1) add_block<Float32>(s, values, whole);
    }
    const float lse = children.count > 1 ? log_sum_exp(s) : n ? logps[0] : -INFINITY;
    if (!(lse > -INFINITY && lse < INFINITY)) return 0;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      const float logp = logps[i] - lse;
      logps[i] = logp > 0.f ? 0.f : logp;  // rounding must not lift a child above its parent
    }
    return n;
  }

  RADDPO_HD void run(std::int64_t query, std::int64_t begin, std::int64_t end) {
    const auto* logits = static_cast<const typename D::T*>(a.logits) + query * a.stride_batch;
    LiveBeam beams[kGroup];
    for (std::int64_t first = begin; first < end; first += kGroup) {
      const int count = look_up<Symbol>(a, query * a.width + first, query * a.width + end, beams);
      prefetch_logits<D, Symbol>(a, logits + first * a.stride_beam, beams, count);
      for (int i = 0; i < count; ++i) {
        beam = beams[i];
        slot = static_cast<std::int32_t>(first + i);
        const float key = a.perturbed[query * a.width + slot];
        if (!(beam.score > -INFINITY) || !(key > best.threshold)) continue;
        if (beam.children.count == 0) {
          push(best, {key, 0.f, slot, -1, beam.node});
        } else if (has_columns(a, beam.level)) {
          const std::int64_t n = read(logits + slot * a.stride_beam, beam.level, beam.children);
          if (!n) continue;
          if (a.replacement)
            draw(n, static_cast<std::int64_t>(key));
          else
            sample(n, key);
        }
      }
    }
  }
};

template <typename D>
RADDPO_HD void run(const SampleStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best,
                   double* scratch) {
  if (a.trie.wide)
    Sampler<D, std::uint32_t>(a, query, best, scratch).run(query, begin, end);
  else
    Sampler<D, std::uint16_t>(a, query, best, scratch).run(query, begin, end);
}

}  // namespace

void sample_step(const SampleStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best,
                 double* scratch) {
  if (a.logit_type == LogitType::float32)
    run<Float32>(a, query, begin, end, best, scratch);
  else if (a.logit_type == LogitType::bfloat16)
    run<BFloat16>(a, query, begin, end, best, scratch);
  else
    run<Float16>(a, query, begin, end, best, scratch);
}

}  // namespace raddpo::RADDPO_ISA
