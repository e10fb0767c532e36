// Blocks of a beam: its state in shared memory, as float; each warp takes a few children at a time and reads their rows
// of the head once, coalesced. Beams of one query share their rows through the L2 cache.
#include "../common/log_sum_exp.cuh"
#include "../trie/trie_warp.cuh"
#include "child_logits_math.h"

namespace raddpo::cuda {
namespace {

constexpr int kChildThreads = 256;
constexpr int kMaxChildBlocks = 256;  // a beam's; they share its children
constexpr int kFeatures = 4096;       // features of the state in shared memory at a time
constexpr int kChildren = 4;          // that a warp takes at a time: the state is read once for all of them

// Where feature i of the state lies: the lanes, which take a pack of features each, read 16 bytes side by side.
template <typename D>
__device__ __forceinline__ int place_of(int i) {
  constexpr int pack = kPack<D>, packs = kFeatures / pack;
  return (i % pack / 4 * packs + i / pack) * 4 + i % 4;
}

// Adds a lane's share of the dot products of n features in shared memory with the rows; 16 bytes a load where all are
// aligned.
template <typename D>
__device__ __forceinline__ void add_share_of_dots(const float* state, const typename D::T* const (&rows)[kChildren],
                                                  int n, bool aligned, float (&sums)[kChildren]) {
  int done = 0;
  if (aligned) {
    done = n / kPack<D> * kPack<D>;
#pragma unroll 2
    for (int p = lane_id(); p < n / kPack<D>; p += 32) {
      uint4 v[kChildren];
#pragma unroll
      for (int k = 0; k < kChildren; ++k) v[k] = __ldg(reinterpret_cast<const uint4*>(rows[k]) + p);
#pragma unroll
      for (int i = 0; i < kPack<D>; i += 4) {
        const float4 x = *reinterpret_cast<const float4*>(state + place_of<D>(p * kPack<D> + i));
#pragma unroll
        for (int k = 0; k < kChildren; ++k)
          sums[k] += x.x * unpack(D{}, v[k], i) + x.y * unpack(D{}, v[k], i + 1) + x.z * unpack(D{}, v[k], i + 2) +
                     x.w * unpack(D{}, v[k], i + 3);
      }
    }
  }
  for (int i = done + lane_id(); i < n; i += 32)
#pragma unroll
    for (int k = 0; k < kChildren; ++k) sums[k] += state[place_of<D>(i)] * load_logit<D>(rows[k] + i);
}

template <typename D>
__global__ void __launch_bounds__(kChildThreads, 2)
    child_logits_kernel(const __grid_constant__ ChildLogitsArgs a, int blocks) {
  using T = typename D::T;
  __shared__ __align__(16) float state[kFeatures];
  constexpr int kBlockChildren = kChildThreads / 32 * kChildren;
  const std::int64_t row = blockIdx.x / blocks;
  if (!is_extended(a, row)) return;
  const int level = static_cast<int>(a.level);
  const Range children = live_of(a.trie.live_nodes, warp_children_of(a.trie, a.nodes[row]));
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x % blocks) * kBlockChildren;
  if (begin >= children.count) return;
  const auto* hidden = static_cast<const T*>(a.hidden) + row * a.stride_hidden;
  const auto* bias = static_cast<const T*>(a.bias);
  const bool aligned = reinterpret_cast<std::uintptr_t>(a.weight) % 16 == 0 && a.stride_weight % kPack<D> == 0;
  float* out = a.out + row * a.columns;
  for (std::int64_t first = 0; first < a.size; first += kFeatures) {
    const int size = static_cast<int>(a.size - first < kFeatures ? a.size - first : kFeatures);
    __syncthreads();  // every warp is done with the piece before
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kChildThreads)
      state[place_of<D>(i)] = load_logit<D>(hidden + first + i);
    __syncthreads();
    for (std::int64_t i = begin + warp_id() * kChildren; i < children.count;
         i += static_cast<std::int64_t>(blocks) * kBlockChildren) {
      std::int64_t symbols[kChildren], tokens[kChildren];
      const T* rows[kChildren];
      float sums[kChildren] = {};
#pragma unroll
      for (int k = 0; k < kChildren; ++k) {  // beyond the last child, that one again
        const std::int64_t child = i + k < children.count ? i + k : children.count - 1;
        symbols[k] = symbol_of(a.trie, node_at(a.trie, children.first + child));
        tokens[k] = token_of(a.trie, level, symbols[k]);
        rows[k] = static_cast<const T*>(a.weight) + tokens[k] * a.stride_weight + first;
      }
      add_share_of_dots<D>(state, rows, size, aligned, sums);
#pragma unroll
      for (int k = 0; k < kChildren; ++k) {
        const float sum = warp_reduce(sums[k], [](float x, float y) { return x + y; });
        if (lane_id() == 0 && i + k < children.count) {
          float* logit = out + symbols[k];
          const float before = first ? *logit : bias ? load_logit<D>(bias + tokens[k]) : 0.f;
          *logit = first + size < a.size ? before + sum : logit_of(a, before + sum);
        }
      }
    }
  }
}

template <typename D>
int run(const ChildLogitsArgs& a, CUstream_st* stream) {
  const std::int64_t spare = 1024 / a.rows;  // blocks that fill a GPU
  const int blocks = static_cast<int>(spare < 1 ? 1 : spare < kMaxChildBlocks ? spare : kMaxChildBlocks);
  return launch(child_logits_kernel<D>, a.rows * blocks, kChildThreads, stream, a, blocks);
}

}  // namespace

int child_logits(const ChildLogitsArgs& a, CUstream_st* stream) {
  if (!a.rows) return cudaSuccess;
  if (a.type == LogitType::float32) return run<Float32>(a, stream);
  if (a.type == LogitType::bfloat16) return run<BFloat16>(a, stream);
  return run<Float16>(a, stream);
}

}  // namespace raddpo::cuda
