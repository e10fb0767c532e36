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

// Numbers above it are cut off: nodes are fewer, unless beams repeat. A round's strides above it fit 32 bits.
constexpr std::uint32_t kMaxCandidate = 0xffefffff;

__device__ __forceinline__ std::uint32_t candidate_number(std::uint64_t number) {
  return number < kMaxCandidate ? static_cast<std::uint32_t>(number) : kMaxCandidate;
}

// What the evaluation of a candidate reads of its beam, 16 bytes at once.
struct alignas(16) TileBeam {
  std::uint32_t first;
  std::int32_t level;  // both as in Beam
  float score, lse;
};

struct Perturbed {
  float score, most;  // of the beam, and of its children's own the largest
};

// As many of a query's beams as fit, a power of two of them and as many as a block has threads at least, in shared
// memory.
template <typename Args>
struct Tile {
  TileBeam* beams;         // [size]
  Perturbed* perturbed;    // [size], while sampling
  std::uint32_t* begin;    // [size + 1] number of each beam's first candidate, at most kMaxCandidate
  std::uint64_t* scratch;  // [kSliceThreads / 32]
  int size;

  static constexpr std::int64_t kBeamBytes =
      sizeof(TileBeam) + (kSamples<Args> ? sizeof(Perturbed) : 0) + sizeof(std::uint32_t);
  // Of a tile but for its scratch, a multiple of 16.
  __host__ __device__ static constexpr std::int64_t bytes(std::int64_t size) { return size * kBeamBytes + 16; }

  __device__ __forceinline__ Tile(void* memory, std::uint64_t* scratch_, int size_)
      : beams(static_cast<TileBeam*>(memory)),
        perturbed(reinterpret_cast<Perturbed*>(beams + size_)),
        begin(reinterpret_cast<std::uint32_t*>(perturbed + (kSamples<Args> ? size_ : 0))),
        scratch(scratch_),
        size(size_) {}

  // The tile's last beam that begins at candidate c or before: candidate c's, for the c of the tile.
  __device__ __forceinline__ int beam_of(std::uint32_t c) const {
    int beam = 0;
    for (int step = size / 2; step >= kSliceThreads; step /= 2)
      if (begin[beam + step] <= c) beam += step;
#pragma unroll
    for (int step = kSliceThreads / 2; step; step /= 2)
      if (begin[beam + step] <= c) beam += step;
    return beam;
  }
};

// Loads the beams from `beam` on, whose candidates are counted from `first`; returns how many these are. A thread loads
// beams that follow one another.
template <typename Args>
__device__ __forceinline__ std::uint64_t load_tile(const Tile<Args>& tile, const Args& a, const Beam* beams,
                                                   const LogSumExp* sums, const float* most, int splits, int query,
                                                   int beam, std::uint64_t first) {
  const int each = tile.size / kSliceThreads, mine = static_cast<int>(threadIdx.x) * each;
  std::uint64_t count = 0;
  __syncthreads();  // whoever read the tile before is done
#pragma unroll 2
  for (int i = mine; i < mine + each; ++i) {
    Beam b{0, 0, -1, 0.f};
    LogSumExp s{-INFINITY, 0.f};
    const bool inside = beam + i < a.width;
    const std::int64_t at = query * a.width + (beam + i);
    if (inside) {
      b = beams[at];
      for (int split = 0; split < splits; ++split) s = merge(s, sums[at * splits + split]);
    }
    tile.beams[i] = {b.first, b.level, b.score, value_of(s)};
    if constexpr (kSamples<Args>)
      tile.perturbed[i] = inside ? Perturbed{a.perturbed[at], most[at]} : Perturbed{-INFINITY, -INFINITY};
    tile.begin[i] = b.count;
    count += b.count;
  }
  std::uint64_t total;
  std::uint64_t number = first + block_scan<kSliceThreads>(count, tile.scratch, &total);
  for (int i = mine; i < mine + each; ++i) {
    const std::uint32_t children = tile.begin[i];
    tile.begin[i] = candidate_number(number);
    number += children;
  }
  if (threadIdx.x == 0) tile.begin[tile.size] = candidate_number(first + total);
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
  std::uint32_t node[n];
  std::int32_t token[n];   // -1: a finished beam
  float score[n], key[n];  // key = score / length factor, or the perturbed score
  float logp[n];           // of the token, while sampling
};

// n candidates of the tile at once, so that the reads of each stage are in flight together.
template <int n, typename Args>
__device__ __forceinline__ Candidates<n> evaluate(const Args& a, const Tile<Args>& tile, int query, int tile_beam,
                                                  const std::uint32_t (&candidate)[n]) {
  const TrieView& t = a.trie;
  Candidates<n> c;
  std::uint32_t symbol[n];
  float logit[n];
  std::int64_t offset[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    c.beam[i] = tile.beam_of(candidate[i]);
    c.node[i] = tile.beams[c.beam[i]].first + (candidate[i] - tile.begin[c.beam[i]]);
  }
  if (t.live_nodes.bits) {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (tile.beams[c.beam[i]].level >= 0) c.node[i] = static_cast<std::uint32_t>(node_at(t, c.node[i]));
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
    const int level = tile.beams[c.beam[i]].level;
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
      const Perturbed p = tile.perturbed[c.beam[i]];
      c.logp[i] = c.token[i] < 0 ? 0.f : token_logp(a, logit[i], tile.beams[c.beam[i]].lse);
      c.score[i] = tile.beams[c.beam[i]].score + c.logp[i];
      c.key[i] = p.score;
      if (c.token[i] >= 0) {
        const float own = own_score(a, query, tile.beams[c.beam[i]].score, c.logp[i], c.node[i]);
        c.key[i] = p.score == INFINITY ? own : conditioned(p.score, fminf(own, p.most), p.most);
      }
      continue;
    }
    const float logp = logit[i] - tile.beams[c.beam[i]].lse;
    const float step = c.token[i] < 0 ? 0.f : logp > 0.f ? 0.f : logp;  // no child is above its parent, rounding or not
    c.score[i] = tile.beams[c.beam[i]].score + step;
    const int level = tile.beams[c.beam[i]].level;
    const float factor = a.length_factor[level < 0 ? -1 - level : level + 1];
    c.key[i] = factor == 1.f ? c.score[i] : c.score[i] / factor;  // mostly there is no penalty, and a division is slow
  }
  return c;
}

}  // namespace raddpo::cuda
