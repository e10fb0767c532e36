// One query's beams, in order: log-sum-exp of the row, then the children's scores while the row is still in cache.
// No log-prob is above 0, so a beam whose own score does not reach the threshold is passed over unread.
#include "../common/log_sum_exp.inl"

namespace raddpo::RADDPO_ISA {
namespace {

constexpr int kChunk = 64;  // children scored between two looks at the threshold

template <typename D, typename Symbol>
struct Step {
  const BeamStepArgs& a;
  const TrieView& t;
  Best& best;

  RADDPO_HD void push(const Candidate& candidate) {
    best.list[best.count++] = candidate;
    if (best.count == best.capacity) trim(best);
  }

  // Token ids of n symbols of a level.
  RADDPO_HD void tokens_of(int level, const Symbol* symbols, std::int64_t n, std::int32_t* out) const {
    if (t.table[level] < 0) {
      const std::int32_t first = t.first_token[level];
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) out[i] = first + static_cast<std::int32_t>(symbols[i]);
    } else {
      const std::int32_t* tokens = t.tokens + t.table[level];
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) out[i] = tokens[static_cast<std::int32_t>(symbols[i])];
    }
  }

  // Adds the logits at n token ids.
  RADDPO_HD static void add_gathered(LogSumExp& s, const typename D::T* row, const std::int32_t* tokens,
                                     std::int64_t n) {
    float values[kChunk];
    for (std::int64_t begin = 0; begin < n; begin += kChunk) {
      const int size = static_cast<int>(n - begin < kChunk ? n - begin : kChunk);
#pragma omp simd
      for (int i = 0; i < size; ++i) values[i] = D::load(row + tokens[begin + i]);
      add_block<Float32>(s, values, size);
    }
  }

  RADDPO_HD float normalizer(const typename D::T* row, int level, const Symbol* symbols, std::int64_t count) const {
    LogSumExp s{-INFINITY, 0.f};
    if (a.normalize == Normalize::vocab) {
      add_row<D>(s, row, a.vocab);
    } else if (a.normalize == Normalize::level && t.table[level] < 0) {
      add_row<D>(s, row + t.first_token[level], t.num_symbols[level]);
    } else if (a.normalize == Normalize::level) {
      add_gathered(s, row, t.tokens + t.table[level], t.num_symbols[level]);
    } else {
      std::int32_t tokens[kChunk];
      for (std::int64_t begin = 0; begin < count; begin += kChunk) {
        const std::int64_t size = count - begin < kChunk ? count - begin : kChunk;
        tokens_of(level, symbols + begin, size, tokens);
        add_gathered(s, row, tokens, size);
      }
    }
    return value_of(s);
  }

  RADDPO_HD void expand(const typename D::T* row, std::int32_t beam, float score, int level, Range children,
                        const Symbol* symbols) {
    const float lse = normalizer(row, level, symbols, children.count), factor = a.length_factor[level + 1];
    std::int32_t tokens[kChunk];
    float scores[kChunk];
    for (std::int64_t begin = 0; begin < children.count; begin += kChunk) {
      const int size = static_cast<int>(children.count - begin < kChunk ? children.count - begin : kChunk);
      tokens_of(level, symbols + begin, size, tokens);
      float most = -INFINITY;
#pragma omp simd reduction(max : most)
      for (int i = 0; i < size; ++i) {
        const float logp = D::load(row + tokens[i]) - lse;
        scores[i] = score + (logp > 0.f ? 0.f : logp);  // rounding must not lift a child above its parent
        most = scores[i] > most ? scores[i] : most;
      }
      if (!(most / factor > best.threshold)) continue;
      for (int i = 0; i < size; ++i) {
        const float key = scores[i] / factor;
        if (key > best.threshold) push({key, scores[i], beam, tokens[i], children.first + begin + i});
      }
    }
  }

  RADDPO_HD void run(std::int64_t query, std::int64_t begin, std::int64_t end) {
    const auto* logits = static_cast<const typename D::T*>(a.logits) + query * a.stride_batch;
    for (std::int64_t beam = begin; beam < end; ++beam) {
      const float score = a.scores[query * a.width + beam];
      const std::int64_t node = a.nodes[query * a.width + beam];
      if (!(score > -INFINITY) || node < 0 || node >= t.first_node[t.levels + 1]) continue;
      const int level = depth_of(t, node);
      const Range children = children_of(t, node);
      const float bound = score / a.length_factor[children.count ? level + 1 : level];
      if (!(bound > best.threshold)) continue;
      const auto parent = static_cast<std::int32_t>(beam);
      if (!children.count)
        push({bound, score, parent, -1, node});
      else if (last_token_of(t, level) < a.vocab)
        expand(logits + beam * a.stride_beam, parent, score, level, children,
               static_cast<const Symbol*>(t.symbols) + children.first);
    }
  }
};

template <typename D>
RADDPO_HD void run(const BeamStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best) {
  if (a.trie.wide)
    Step<D, std::uint32_t>{a, a.trie, best}.run(query, begin, end);
  else
    Step<D, std::uint16_t>{a, a.trie, best}.run(query, begin, end);
}

}  // namespace

void beam_step(const BeamStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best) {
  if (a.logit_type == LogitType::float32)
    run<Float32>(a, query, begin, end, best);
  else if (a.logit_type == LogitType::bfloat16)
    run<BFloat16>(a, query, begin, end, best);
  else
    run<Float16>(a, query, begin, end, best);
}

}  // namespace raddpo::RADDPO_ISA
