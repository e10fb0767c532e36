// One query's beams, in order: log-sum-exp of the row, then the children's scores while the row is still in cache.
// No log-prob is above 0, so a beam whose own score does not reach the threshold is passed over unread.
#include "../common/log_sum_exp.inl"
#include "live_beams.inl"

namespace raddpo::RADDPO_ISA {
namespace {

template <typename D, typename Symbol>
struct Step {
  const BeamStepArgs& a;
  const TrieView& t;
  Best& best;

  // No score up to this has a key above the threshold: a cheap test before the exact one, which divides.
  RADDPO_HD float lowest_score(float factor) const {
    const float score = best.threshold * factor;
    return score - 1e-6f * std::fabs(score);
  }

  // Adds the logits in n columns.
  RADDPO_HD static void add_gathered(RowSum& s, const typename D::T* row, const std::int32_t* columns, std::int64_t n) {
    float values[kChunk];
    for (std::int64_t begin = 0; begin < n; begin += kChunk) {
      const int size = static_cast<int>(n - begin < kChunk ? n - begin : kChunk);
#pragma omp simd
      for (int i = 0; i < size; ++i) values[i] = D::load(row + columns[begin + i]);
      add_block<Float32>(s, values, size);
    }
  }

  RADDPO_HD float normalizer(const typename D::T* row, int level, Range children) const {
    RowSum s;
    if (a.normalize == Normalize::vocab) {
      add_row<D>(s, row, a.vocab);
    } else if (a.normalize == Normalize::level && in_sequence(a, level)) {
      add_row<D>(s, row + first_column(a, level), t.num_symbols[level]);
    } else if (a.normalize == Normalize::level) {
      add_gathered(s, row, t.tokens + t.table[level], t.num_symbols[level]);
    } else {
      std::int32_t columns[kChunk];
      for (LiveChunks<Symbol, kChunk> chunk(t, children); chunk.next();) {
        columns_of(a, level, chunk.symbols, chunk.size, columns);
        add_gathered(s, row, columns, chunk.size);
      }
    }
    return log_sum_exp(s);
  }

  RADDPO_HD void expand(const typename D::T* row, std::int32_t beam, float score, int level, Range children,
                        const float* given_lse) {
    const float lse = given_lse ? *given_lse : normalizer(row, level, children);
    const float factor = a.length_factor[level + 1];
    std::int32_t columns[kChunk];
    float scores[kChunk];
    for (LiveChunks<Symbol, kChunk> chunk(t, children); chunk.next();) {
      const int size = chunk.size;
      columns_of(a, level, chunk.symbols, size, columns);
      float most = -INFINITY;
#pragma omp simd reduction(max : most)
      for (int i = 0; i < size; ++i) {
        const float logp = D::load(row + columns[i]) - lse;
        scores[i] = score + (logp > 0.f ? 0.f : logp);  // rounding must not lift a child above its parent
        most = scores[i] > most ? scores[i] : most;
      }
      if (!(most / factor > best.threshold)) continue;
      int hits[kChunk], num_hits = 0;  // without a branch, which would be taken as if at random
      const float bar = lowest_score(factor);
      for (int i = 0; i < size; ++i) {
        hits[num_hits] = i;
        num_hits += scores[i] > bar;
      }
      for (int h = 0; h < num_hits; ++h) {
        const int i = hits[h];
        const float key = scores[i] / factor;
        if (key > best.threshold)
          push(best, {key, scores[i], beam, token_of(t, level, chunk.symbols[i]), chunk.node(i)});
      }
    }
  }

  RADDPO_HD void run(std::int64_t query, std::int64_t begin, std::int64_t end) {
    const auto* logits = static_cast<const typename D::T*>(a.logits) + query * a.stride_batch;
    LiveBeam beams[kGroup];
    for (std::int64_t first = begin; first < end; first += kGroup) {
      const int count = look_up<Symbol>(a, query * a.width + first, query * a.width + end, beams);
      for (int i = 0; i < count; ++i) {
        const LiveBeam& b = beams[i];
        const bool leaf = b.children.count == 0;
        const float bound = b.score / a.length_factor[leaf ? b.level : b.level + 1];
        if (!(bound > best.threshold)) continue;
        const auto slot = static_cast<std::int32_t>(first + i);
        if (leaf)
          push(best, {bound, b.score, slot, -1, b.node});
        else if (has_columns(a, b.level))
          expand(logits + slot * a.stride_beam, slot, b.score, b.level, b.children,
                 a.lse ? a.lse + query * a.width + slot : nullptr);
      }
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
