// One query's beams, in order. A beam's children are taken together: their log-probs, then their keys, which need the
// best of them. No perturbed score is above its parent's, so a beam below the threshold is passed over unread.
#include "../beam_search/live_beams.inl"
#include "../common/log_sum_exp.inl"

namespace raddpo::RADDPO_ISA {
namespace {

// The children of one beam, whatever the type of its logits. Functions of a class are inline, but not visible outside.
struct Children {
  const SampleStepArgs& a;
  const TrieView& t;
  Best& best;
  std::uint64_t seed, query_key;
  double* sums;          // [children] running sums of the probabilities, with replacement
  std::uint32_t* words;  // [children + 6] random bits of consecutive nodes, without; the memory of `sums`
  std::uint32_t* nodes;  // [children]
  float *logps, *keys;   // [children]

  Children(const SampleStepArgs& args, std::int64_t query, Best& list, double* scratch)
      : a(args),
        t(args.trie),
        best(list),
        seed(static_cast<std::uint64_t>(*args.seed)),
        query_key(static_cast<std::uint64_t>(args.keys[query])),
        sums(scratch),
        words(reinterpret_cast<std::uint32_t*>(scratch)),
        nodes(words + 2 * (args.symbols + 3)),
        logps(reinterpret_cast<float*>(nodes + args.symbols)),
        keys(logps + args.symbols) {}

  // The children's perturbed scores. An only child has its parent's, whatever its noise; the root has none.
  void perturb(std::int64_t n, float score, float perturbed) {
    const bool is_root = perturbed == INFINITY;
    if (n == 1 && !is_root) {
      keys[0] = perturbed;
      return;
    }
    const std::uint32_t block = nodes[0] / 4;
    const std::int64_t blocks = nodes[n - 1] / 4 - block + 1;
#pragma omp simd
    for (std::int64_t i = 0; i < blocks; ++i) {
      std::uint32_t four[4];
      philox(block + static_cast<std::uint32_t>(i), 0, query_key, seed, four);
      words[4 * i] = four[0];
      words[4 * i + 1] = four[1];
      words[4 * i + 2] = four[2];
      words[4 * i + 3] = four[3];
    }
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (std::int64_t i = 0; i < n; ++i) {
      keys[i] = score + logps[i] + gumbel(words[nodes[i] - 4 * block]);
      most = keys[i] > most ? keys[i] : most;
    }
    if (is_root) return;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) keys[i] = conditioned(perturbed, keys[i], most);
  }

  // How many of the beam's draws each child gets, by the inverse of the distribution function; -inf for none.
  void draw(std::int64_t n, std::int64_t node, std::int64_t draws) {
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      sum += logps[i] > -INFINITY ? fast_exp(logps[i]) : 0.f;
      sums[i] = sum;
      keys[i] = -INFINITY;
    }
    for (std::int64_t j = 0; j < draws; ++j) {
      const double at = (draw_noise(node, j, query_key, seed) + 0.5) * 0x1p-32 * sum;
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
  }

  // Puts the children among the best.
  void offer(std::int64_t n, std::int32_t slot, int level) {
    for (std::int64_t first = 0; first < n; first += kChunk) {
      const int size = static_cast<int>(n - first < kChunk ? n - first : kChunk);
      int hits[kChunk], num_hits = 0;  // without a branch, which would be taken as if at random
      for (int i = 0; i < size; ++i) {
        hits[num_hits] = i;
        num_hits += keys[first + i] > best.threshold;
      }
      for (int h = 0; h < num_hits; ++h) {
        const std::int64_t i = first + hits[h];
        if (keys[i] > best.threshold)
          push(best, {keys[i], logps[i], slot, token_of(t, level, symbol_of(t, nodes[i])), nodes[i]});
      }
    }
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
      add_block<Float32>(s, values, chunk.size);
    }
    const float lse = log_sum_exp(s);
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
      for (int i = 0; i < count; ++i) {
        const LiveBeam& b = beams[i];
        const auto slot = static_cast<std::int32_t>(first + i);
        const float key = a.perturbed[query * a.width + slot];
        if (!(b.score > -INFINITY) || !(key > best.threshold)) continue;
        if (b.children.count == 0) {
          push(best, {key, 0.f, slot, -1, b.node});
        } else if (has_columns(a, b.level)) {
          const std::int64_t n = read(logits + slot * a.stride_beam, b.level, b.children);
          if (!n) continue;
          if (a.replacement)
            draw(n, b.node, static_cast<std::int64_t>(key));
          else
            perturb(n, b.score, key);
          offer(n, slot, b.level);
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
