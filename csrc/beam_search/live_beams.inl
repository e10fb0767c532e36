// The live beams of a step and their children's columns, for beam_step and sample_step. Part of a per-instruction-set
// region.
namespace raddpo::RADDPO_ISA {
namespace {

constexpr int kChunk = 128;  // children taken at a time
constexpr int kGroup = 16;   // beams whose children are looked up at once

struct LiveBeam {
  std::int64_t node;
  float score;  // -inf: an empty slot
  int level;
  Range children;
};

RADDPO_HD void push(Best& best, const Candidate& candidate) {
  best.list[best.count++] = candidate;
  if (best.count == best.capacity) trim(best);
}

// Looks up the next beams' children together, so that their cache misses overlap one another and the rows' reading.
template <typename Symbol>
RADDPO_HD int look_up(const BeamStepArgs& a, std::int64_t first, std::int64_t end, LiveBeam* beams) {
  const TrieView& t = a.trie;
  const int count = static_cast<int>(end - first < kGroup ? end - first : kGroup);
  for (int i = 0; i < count; ++i) {
    LiveBeam& b = beams[i];
    b = {a.nodes[first + i], a.scores[first + i], 0, {0, 0}};
    if (!(b.score > -INFINITY) || !is_node(t, b.node)) {
      b.score = -INFINITY;
      continue;
    }
    b.level = depth_of(t, b.node);
    b.children = children_of(t, b.node);
    if (t.live_nodes.bits) __builtin_prefetch(t.live_nodes.bits + b.children.first / 64);
    const auto* symbols = static_cast<const Symbol*>(t.symbols) + b.children.first;
    for (std::int64_t at = 0; at < b.children.count && at < kChunk; at += 64 / sizeof(Symbol))
      __builtin_prefetch(symbols + at);
  }
  return count;
}

// Columns of n symbols of a level.
template <typename Symbol>
RADDPO_HD void columns_of(const BeamStepArgs& a, int level, const Symbol* symbols, std::int64_t n, std::int32_t* out) {
  if (in_sequence(a, level)) {
    const std::int32_t first = first_column(a, level);
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = first + static_cast<std::int32_t>(symbols[i]);
  } else {
    const std::int32_t* tokens = a.trie.tokens + a.trie.table[level];
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) out[i] = tokens[static_cast<std::int32_t>(symbols[i])];
  }
}

// Fetches the logits of beams that have few children, each of them a cache miss in a row of its own. `logits`: of the
// first beam.
template <typename D, typename Symbol>
RADDPO_HD void prefetch_logits(const BeamStepArgs& a, const typename D::T* logits, const LiveBeam* beams, int count) {
  for (int i = 0; i < count; ++i) {
    const LiveBeam& b = beams[i];
    if (!(b.score > -INFINITY) || !b.children.count || !has_columns(a, b.level)) continue;
    const auto* symbols = static_cast<const Symbol*>(a.trie.symbols) + b.children.first;
    for (std::int64_t at = 0; at < b.children.count && at < 8; ++at)
      __builtin_prefetch(logits + i * a.stride_beam + column_of(a, b.level, symbols[at]));
  }
}

}  // namespace
}  // namespace raddpo::RADDPO_ISA
