// One block a beam: its state in shared memory, as float; each warp takes a child at a time and reads the child's row
// of the head once, coalesced. Beams of one query share their rows through the L2 cache.
#include "../common/log_sum_exp.cuh"
#include "../trie/trie_warp.cuh"
#include "child_logits_math.h"

namespace raddpo::cuda {
namespace {

constexpr int kChildThreads = 256;
constexpr int kMaxChildBlocks = 16;  // a beam's; they share its children
constexpr int kFeatures = 4096;      // features of the state in shared memory at a time

// A lane's share of the dot product of n features in shared memory with a row; 16 bytes a load where both are aligned.
template <typename D>
__device__ __forceinline__ float share_of_dot(const float* state, const typename D::T* row, int n, bool aligned) {
  float sum = 0.f;
  int done = 0;
  if (aligned) {
    const auto* packs = reinterpret_cast<const uint4*>(row);
    done = n / kPack<D> * kPack<D>;
    for (int p = lane_id(); p < n / kPack<D>; p += 32) {
      const uint4 v = __ldg(packs + p);
#pragma unroll
      for (int i = 0; i < kPack<D>; ++i) sum += state[p * kPack<D> + i] * unpack(D{}, v, i);
    }
  }
  for (int i = done + lane_id(); i < n; i += 32) sum += state[i] * load_logit<D>(row + i);
  return sum;
}

template <typename D>
__global__ void __launch_bounds__(kChildThreads)
    child_logits_kernel(const __grid_constant__ ChildLogitsArgs a, int blocks) {
  using T = typename D::T;
  __shared__ float state[kFeatures];
  const std::int64_t row = blockIdx.x / blocks;
  if (!is_extended(a, row)) return;
  const int level = static_cast<int>(a.level), stride = blocks * (kChildThreads / 32);
  const Range children = live_of(a.trie.live_nodes, warp_children_of(a.trie, a.nodes[row]));
  const auto* hidden = static_cast<const T*>(a.hidden) + row * a.stride_hidden;
  const auto* bias = static_cast<const T*>(a.bias);
  const bool aligned = reinterpret_cast<std::uintptr_t>(a.weight) % 16 == 0 && a.stride_weight % kPack<D> == 0;
  float* out = a.out + row * a.columns;
  for (std::int64_t first = 0; first < a.size; first += kFeatures) {
    const int size = static_cast<int>(a.size - first < kFeatures ? a.size - first : kFeatures);
    __syncthreads();  // every warp is done with the piece before
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kChildThreads)
      state[i] = load_logit<D>(hidden + first + i);
    __syncthreads();
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x % blocks) * (kChildThreads / 32) + warp_id();
         i < children.count; i += stride) {
      const std::int64_t symbol = symbol_of(a.trie, node_at(a.trie, children.first + i));
      const std::int64_t token = token_of(a.trie, level, symbol);
      const T* weight = static_cast<const T*>(a.weight) + token * a.stride_weight + first;
      const float sum =
          warp_reduce(share_of_dot<D>(state, weight, size, aligned), [](float x, float y) { return x + y; });
      if (lane_id() == 0) {
        const float before = first ? out[symbol] : bias ? load_logit<D>(bias + token) : 0.f;
        out[symbol] = first + size < a.size ? before + sum : logit_of(a, before + sum);
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
