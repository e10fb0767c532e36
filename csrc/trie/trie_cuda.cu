// One thread per row or node: a lookup is a chain of dependent reads, so many must run at once to keep memory busy.
#include "../common/cuda_block.cuh"
#include "trie_ops.h"

namespace raddpo::cuda {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ std::int64_t thread_number() {
  return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}

__global__ void __launch_bounds__(kThreads) trie_walk_kernel(const __grid_constant__ TrieWalkArgs a) {
  const std::int64_t row = thread_number();
  if (row < a.rows) trie_walk_row(a, row);
}

__global__ void __launch_bounds__(kThreads) trie_paths_kernel(const __grid_constant__ TriePathsArgs a) {
  const std::int64_t i = thread_number();
  if (i < a.count) trie_path(a, i);
}

__global__ void __launch_bounds__(kThreads) trie_ranges_kernel(const __grid_constant__ TrieRangesArgs a) {
  const std::int64_t i = thread_number();
  if (i < a.count) trie_range(a, i);
}

// A block per row, whose threads take as many nodes each, one after another.
__global__ void __launch_bounds__(kThreads) trie_top_items_kernel(const __grid_constant__ TrieTopItemsArgs a) {
  __shared__ std::int64_t scratch[kThreads / 32];
  const std::int64_t row = blockIdx.x, share = (a.columns + kThreads - 1) / kThreads;
  const std::int64_t begin = threadIdx.x * share, end = begin + share < a.columns ? begin + share : a.columns;
  const std::int64_t* nodes = a.nodes + row * a.columns;
  std::int64_t count = 0, total;
  for (std::int64_t column = begin; column < end; ++column) count += live_range(a.trie, nodes[column], true).count;
  std::int64_t place = block_scan<kThreads>(count, scratch, &total);
  for (std::int64_t column = begin; column < end && place < a.top_k; ++column) {
    const Range range = live_range(a.trie, nodes[column], true);
    put_items(a, row, column, range, place);
    place += range.count;
  }
  for (std::int64_t at = total + threadIdx.x; at < a.top_k; at += kThreads) put_nothing(a, row, at);
}

__global__ void __launch_bounds__(kThreads) trie_select_kernel(const __grid_constant__ TrieSelectArgs a) {
  const std::int64_t i = thread_number();
  if (i < a.count) raddpo::trie_select(a, i);
}

std::int64_t blocks_of(std::int64_t size) { return (size + kThreads - 1) / kThreads; }

}  // namespace

int trie_walk(const TrieWalkArgs& a, CUstream_st* stream) {
  return a.rows ? launch(trie_walk_kernel, blocks_of(a.rows), kThreads, stream, a) : cudaSuccess;
}

int trie_paths(const TriePathsArgs& a, CUstream_st* stream) {
  return a.count ? launch(trie_paths_kernel, blocks_of(a.count), kThreads, stream, a) : cudaSuccess;
}

int trie_ranges(const TrieRangesArgs& a, CUstream_st* stream) {
  return a.count ? launch(trie_ranges_kernel, blocks_of(a.count), kThreads, stream, a) : cudaSuccess;
}

int trie_top_items(const TrieTopItemsArgs& a, CUstream_st* stream) {
  return a.rows && a.top_k ? launch(trie_top_items_kernel, a.rows, kThreads, stream, a) : cudaSuccess;
}

int trie_select(const TrieSelectArgs& a, CUstream_st* stream) {
  return a.count ? launch(trie_select_kernel, blocks_of(a.count), kThreads, stream, a) : cudaSuccess;
}

}  // namespace raddpo::cuda
