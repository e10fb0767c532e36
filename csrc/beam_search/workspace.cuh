#pragma once
// The device memory of a step, and how its work is cut into blocks.
#include <cstdint>
#include <type_traits>

#include "candidates.cuh"

namespace raddpo::cuda {
namespace {

constexpr int kReaders = 128;                      // threads that read a row; one more warp looks up its children
constexpr int kRowBytes = kReaders * kLoads * 16;  // that they read in one go
constexpr std::int64_t kRowBlocks = 1024;          // rows are split among blocks while that makes no more of them
constexpr std::int64_t kMaxSplits = 64;
constexpr std::int64_t kGathered = 4 * kReaders;  // logits of children, in no order, that a block reads
constexpr std::int64_t kMaxSlices = 256;          // of a query
static_assert(kMaxSlices <= kSliceThreads);
constexpr int kBufferKeys = 4096;            // keys that a block gathers at least
constexpr std::int64_t kMaxWidth = 1 << 28;  // of a result that has as many candidates

struct Workspace {
  Key* lists;                          // [batch, slices + 1, stride] best keys of each slice; the last for their union
  Key* bounds;                         // [batch, slices] that `want` keys of the slice reach, or 0
  Key* shares;                         // [batch, slices] that the slice's even share of `want` keys reach, or 0
  Beam* beams;                         // [batch, width]
  LogSumExp* sums;                     // [batch, width, splits]
  float* most;                         // [batch, width] best child's own perturbed score, while sampling
  unsigned* counts;                    // [batch, slices] keys in each list
  unsigned* done;                      // [batch] slices that are finished
  std::int64_t bytes;                  // of all this
  std::int64_t slices, least, stride;  // at most so many slices, whole clusters, of at least so many candidates
  int splits, want, limit, capacity;
  int cluster;        // blocks that come together, 1 or kCluster
  std::uint32_t few;  // so many candidates are one block's
  int tile;           // beams that a block holds
  bool in_shared;     // the buffers that keys are gathered in; else they are in global memory
  int shared_bytes;   // of a block of slices
};

// What a block of slices has in shared memory before its tile and its buffer.
struct alignas(16) SliceShared {
  TopKeysShared top;
  std::uint64_t tile_scratch[kSliceThreads / 32];
  bool last;
};

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Puts into shared memory what fits: the buffer, which is used more, and then as many of `width` beams as can be.
template <typename Args>
void share(Workspace& w, std::int64_t width) {
  const std::int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const auto bytes = [&](std::int64_t tile) {
    return static_cast<std::int64_t>(sizeof(SliceShared)) + Tile<Args>::bytes(tile) +
           (w.in_shared ? (w.capacity + w.limit) * static_cast<std::int64_t>(sizeof(Key)) : 0);
  };
  w.in_shared = true;
  w.in_shared = bytes(kSliceThreads) <= most;
  w.tile = kSliceThreads;
  while (w.tile < width && bytes(2 * w.tile) <= most) w.tile *= 2;
  w.shared_bytes = static_cast<int>(bytes(w.tile));
}

// Blocks of slices that run at once: two per multiprocessor, if these have the memory.
std::int64_t slice_blocks(const Workspace& w) {
  constexpr int kReserved = 1024;  // per block
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int each = w.in_shared && 2 * w.shared_bytes + kReserved <= most ? 2 : 1;
  return static_cast<std::int64_t>(each) * device_attribute(cudaDevAttrMultiProcessorCount);
}

// Teams of `size` blocks that share so many candidates.
__host__ __device__ inline std::int64_t teams_of(const Workspace& w, std::int64_t candidates, int size) {
  if (size > 1 && candidates <= static_cast<std::int64_t>(size) * w.capacity) return 1;
  return clamp(ceil_div(candidates, size * w.least), 1, w.slices / w.cluster);
}

// Sizes follow from shapes and the device, which the host knows alone.
template <typename Args>
Workspace lay_out(const Args& a, void* memory) {
  std::int64_t symbols = 1;
  for (int level = 0; level < a.trie.levels; ++level)
    if (a.trie.num_symbols[level] > symbols) symbols = a.trie.num_symbols[level];
  const std::int64_t candidates = a.width * symbols;  // of a query, at most
  const std::int64_t rows = a.batch * a.width;
  const std::int64_t row_bytes = a.vocab * (a.logit_type == LogitType::float32 ? 4 : 2);
  const std::int64_t spare_blocks = clamp(rows ? kRowBlocks / rows : 1, 1, kMaxSplits);
  Workspace w{};
  const std::int64_t useful =
      a.normalize == Normalize::trie ? ceil_div(symbols, kGathered) : ceil_div(row_bytes, kRowBytes);
  w.splits = a.lse || kSamples<Args> ? 1 : static_cast<int>(clamp(useful, 1, spare_blocks));
  w.want = static_cast<int>(clamp(candidates, 1, a.beam_width < kMaxWidth ? a.beam_width : kMaxWidth));
  w.limit = w.want + (w.want > 64 ? w.want / 2 : 32);
  w.capacity = w.limit + kRound > kBufferKeys ? w.limit + kRound : kBufferKeys;
  share<Args>(w, a.width);
  w.few = w.want > kSliceThreads ? kSliceThreads : kRound;
  w.cluster = w.in_shared && candidates > w.few && device_has_clusters() ? kCluster : 1;
  w.stride = w.in_shared ? w.limit : w.capacity + w.limit;
  const bool wide = w.limit > kRound / 4;
  w.least = !wide ? kRound : w.cluster == 1 ? 4 * std::int64_t{w.limit} : w.limit > kRound ? w.limit : kRound;
  // At least a cluster, or, where there are none, 8 blocks.
  const std::int64_t most = clamp(slice_blocks(w) / a.batch / w.cluster, kCluster / w.cluster, kMaxSlices / w.cluster);
  w.slices = most * w.cluster;
  w.slices = teams_of(w, candidates, w.cluster) * w.cluster;
  const auto take = [&](auto*& array, std::int64_t size) {
    array =
        reinterpret_cast<std::remove_reference_t<decltype(array)>>(reinterpret_cast<std::uintptr_t>(memory) + w.bytes);
    w.bytes += ceil_div(size * sizeof(*array), 16) * 16;
  };
  take(w.lists, a.batch * (w.slices + 1) * w.stride);
  take(w.bounds, a.batch * w.slices);
  take(w.shares, a.batch * w.slices);
  take(w.beams, rows);
  take(w.sums, rows * w.splits);
  take(w.most, kSamples<Args> ? rows : 0);
  take(w.counts, a.batch * w.slices);
  take(w.done, a.batch);
  return w;
}

}  // namespace
}  // namespace raddpo::cuda
