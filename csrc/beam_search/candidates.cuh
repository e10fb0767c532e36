#pragma once
// A query's candidates: numbered beam after beam and child after child, so that a lower number is a lower parent or, of
// the same parent, a lower token.
#include "../common/log_sum_exp.cuh"
#include "../sample_step/sample_step.h"
#include "../sample_step/sample_step_math.h"
#include "beam_search_math.h"
#include "top_keys.cuh"

namespace raddpo::cuda {

// Whether candidates compete by perturbed scores.
template <typename Args>
constexpr bool kSamples = std::is_same_v<Args, SampleStepArgs>;

// While sampling: the log-prob of a child and its own perturbed score, the same bits in every kernel.
__device__ __forceinline__ float token_logp(const SampleStepArgs& a, float logit, float lse) {
  const float logp = rounded_product(logit, a.scale) - lse;
  return logp > 0.f ? 0.f : logp;
}
__device__ __forceinline__ float own_score(const SampleStepArgs& a, std::int64_t query, float score, float logp,
                                           std::int64_t node) {
  std::uint32_t words[4];
  philox(static_cast<std::uint32_t>(node / 4), 0, static_cast<std::uint64_t>(a.keys[query]),
         static_cast<std::uint64_t>(*a.seed), words);
  const int i = static_cast<int>(node % 4);
  const std::uint32_t word = i < 2 ? (i ? words[1] : words[0]) : i == 2 ? words[2] : words[3];
  return score + logp + gumbel(word);
}

// What the ranking of candidates needs of a beam.
struct alignas(16) Beam {
  std::uint32_t first;  // the first child's place among the nodes left (fewer than 2^31), or the finished beam's node
  std::uint32_t count;  // candidates: children, 1 for a finished beam, 0 for an empty slot
  std::int32_t level;   // of the children; of a finished beam -1 - its depth
  float score;
};

constexpr std::uint32_t kMaxCandidate =
    0xfffffffe;  // numbers above it are cut off: nodes are fewer, unless beams repeat

__device__ __forceinline__ std::uint32_t candidate_number(std::uint64_t number) {
  return number < kMaxCandidate ? static_cast<std::uint32_t>(number) : kMaxCandidate;
}

// As many of a query's beams as a block has threads, in shared memory.
template <typename Args>
struct Tile {
  std::uint32_t begin[kSliceThreads + 1];  // number of each beam's first candidate, at most kMaxCandidate
  std::uint32_t first[kSliceThreads];
  float score[kSliceThreads], lse[kSliceThreads];
  std::int8_t level[kSliceThreads];
  std::uint64_t scratch[kSliceThreads / 32];
  float perturbed[kSamples<Args> ? kSliceThreads : 1], most[kSamples<Args> ? kSliceThreads : 1];

  // The tile's last beam that begins at candidate c or before: candidate c's, for the c of the tile.
  __device__ __forceinline__ int beam_of(std::uint32_t c) const {
    int beam = 0;
#pragma unroll
    for (int step = kSliceThreads / 2; step; step /= 2)
      if (begin[beam + step] <= c) beam += step;
    return beam;
  }
};

// Loads the beams from `beam` on, whose candidates are counted from `first`; returns how many these are.
template <typename Args>
__device__ __forceinline__ std::uint64_t load_tile(Tile<Args>& tile, const Args& a, const Beam* beams,
                                                   const LogSumExp* sums, const float* most, int splits,
                                                   std::int64_t query, std::int64_t beam, std::uint64_t first) {
  const int thread = static_cast<int>(threadIdx.x);
  Beam b{0, 0, -1, 0.f};
  LogSumExp s{-INFINITY, 0.f};
  if (beam + thread < a.width) {
    const std::int64_t at = query * a.width + beam + thread;
    b = beams[at];
    for (int i = 0; i < splits; ++i) s = merge(s, sums[at * splits + i]);
  }
  std::uint64_t total;
  const std::uint64_t before = block_scan<kSliceThreads>(static_cast<std::uint64_t>(b.count), tile.scratch, &total);
  tile.begin[thread] = candidate_number(first + before);
  if (thread == 0) tile.begin[kSliceThreads] = candidate_number(first + total);
  tile.first[thread] = b.first;
  tile.score[thread] = b.score;
  tile.lse[thread] = value_of(s);
  tile.level[thread] = static_cast<std::int8_t>(b.level);
  if constexpr (kSamples<Args>) {
    const bool inside = beam + thread < a.width;
    tile.perturbed[thread] = inside ? a.perturbed[query * a.width + beam + thread] : -INFINITY;
    tile.most[thread] = inside ? most[query * a.width + beam + thread] : -INFINITY;
  }
  __syncthreads();
  return total;
}

// Keys order as their float does, and among equals the lower candidate number, that is the lower parent and then the
// lower token, is the larger key. NaN and -inf are no candidates.
__device__ __forceinline__ Key key_of(float value, std::uint32_t candidate) {
  if (!(value > -INFINITY)) return 0;
  const unsigned bits = __float_as_uint(value + 0.f);  // -0 becomes 0
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(ordered) << 32 | ~candidate;
}

template <int n>
struct Candidates {
  std::int32_t beam[n];  // of the tile
  std::int64_t node[n];
  std::int32_t token[n];   // -1: a finished beam
  float score[n], key[n];  // key = score / length factor, or the perturbed score
  float logp[n];           // of the token, while sampling
};

// n candidates of the tile at once, so that the reads of each stage are in flight together.
template <int n, typename Args>
__device__ __forceinline__ Candidates<n> evaluate(const Args& a, const Tile<Args>& tile, std::int64_t query,
                                                  std::int64_t tile_beam, const std::uint32_t (&candidate)[n]) {
  const TrieView& t = a.trie;
  Candidates<n> c;
  std::uint32_t symbol[n];
  float logit[n];
  std::int64_t offset[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    c.beam[i] = tile.beam_of(candidate[i]);
    c.node[i] = static_cast<std::int64_t>(tile.first[c.beam[i]]) + (candidate[i] - tile.begin[c.beam[i]]);
  }
  if (t.live_nodes.bits) {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (tile.level[c.beam[i]] >= 0) c.node[i] = node_at(t, c.node[i]);
  }
  if (t.wide) {
#pragma unroll
    for (int i = 0; i < n; ++i) symbol[i] = static_cast<const std::uint32_t*>(t.symbols)[c.node[i]];
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) symbol[i] = static_cast<const std::uint16_t*>(t.symbols)[c.node[i]];
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const int level = tile.level[c.beam[i]];
    c.token[i] = level < 0 ? -1 : token_of(t, level, symbol[i]);
    offset[i] = query * a.stride_batch + (tile_beam + c.beam[i]) * a.stride_beam +
                (a.level < 0 ? c.token[i] : static_cast<std::int32_t>(symbol[i]));
    logit[i] = NAN;
  }
  if (a.logit_type == LogitType::float32) {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (c.token[i] >= 0) logit[i] = load_logit<Float32>(static_cast<const float*>(a.logits) + offset[i]);
  } else if (a.logit_type == LogitType::bfloat16) {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (c.token[i] >= 0) logit[i] = load_logit<BFloat16>(static_cast<const std::uint16_t*>(a.logits) + offset[i]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (c.token[i] >= 0) logit[i] = load_logit<Float16>(static_cast<const std::uint16_t*>(a.logits) + offset[i]);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (kSamples<Args>) {
      const int beam = c.beam[i];
      const float parent = tile.perturbed[beam];
      c.logp[i] = c.token[i] < 0 ? 0.f : token_logp(a, logit[i], tile.lse[beam]);
      c.score[i] = tile.score[beam] + c.logp[i];
      c.key[i] = parent;
      if (c.token[i] >= 0) {
        const float own = own_score(a, query, tile.score[beam], c.logp[i], c.node[i]);
        c.key[i] = parent == INFINITY ? own : conditioned(parent, fminf(own, tile.most[beam]), tile.most[beam]);
      }
      continue;
    }
    const float logp = logit[i] - tile.lse[c.beam[i]];
    const float step = c.token[i] < 0 ? 0.f : logp > 0.f ? 0.f : logp;  // no child is above its parent, rounding or not
    c.score[i] = tile.score[c.beam[i]] + step;
    const int level = tile.level[c.beam[i]];
    const float factor = a.length_factor[level < 0 ? -1 - level : level + 1];
    c.key[i] = factor == 1.f ? c.score[i] : c.score[i] / factor;  // mostly there is no penalty, and a division is slow
  }
  return c;
}

}  // namespace raddpo::cuda
