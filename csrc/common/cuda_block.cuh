#pragma once
// Launches, and what the threads of a warp or a block work out together. Blocks are one-dimensional, of whole warps.
#include <cuda_runtime.h>

#include <cstdint>

#include "math.h"

namespace raddpo::cuda {

constexpr unsigned kAllLanes = ~0u;

struct Grid {
  std::int64_t blocks;
  int threads;
  int cluster = 1;       // blocks that follow one another and run at the same time
  int shared_bytes = 0;  // of memory at dynamic_shared()
  bool early = false;    // may begin before the launch before has ended: the kernel calls wait_for_launch_before()
};

constexpr int kPlainSharedBytes = 48 << 10;  // of a block, unless its kernel asks for more

// Whether the code that the current device runs of a kernel is that for sm_90 or later: it may have been compiled for
// an earlier GPU.
template <typename... Parameters>
bool is_for_sm_90(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Grid& grid, CUstream_st* stream, const Arguments&... arguments) {
  if (grid.blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (grid.shared_bytes > kPlainSharedBytes) {
    const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes);
    if (error) return error;
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[count++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (grid.early && is_for_sm_90(kernel)) {
    cudaLaunchAttribute& attribute = attributes[count++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, CUstream_st* stream,
           const Arguments&... arguments) {
  return launch(kernel, Grid{blocks, threads}, stream, arguments...);
}

// A block's shared memory of the size that its launch says, aligned to 16 bytes.
#if defined(__CUDACC__)
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}
#else
void* dynamic_shared();  // of whoever runs kernels that another compiler compiled
#endif

// An attribute of the current device; 0 if there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return known ? value : 0;
}

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / 32); }

// op over a warp's values, given to every lane.
template <typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int d = 16; d; d /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, d));
  return value;
}

__device__ __forceinline__ LogSumExp warp_merge(LogSumExp s) {
#pragma unroll
  for (int d = 16; d; d /= 2)
    s = merge(s, {__shfl_xor_sync(kAllLanes, s.max, d), __shfl_xor_sync(kAllLanes, s.sum, d)});
  return s;
}

// op over a block's values, given to every thread; `scratch`: shared, one T a warp.
template <int threads, typename T, typename Op>
__device__ __forceinline__ T block_reduce(T value, T* scratch, Op op) {
  value = warp_reduce(value, op);
  __syncthreads();  // whoever used the scratch before is done
  if (lane_id() == 0) scratch[warp_id()] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int w = 1; w < threads / 32; ++w) value = op(value, scratch[w]);
  return value;
}

// Adds 1 and returns the number before. Who counts later sees what was written before: by this thread and, if a barrier
// came first, by its block. Cheaper than two fences, which nvcc makes sequentially consistent.
__device__ __forceinline__ unsigned count_and_share(unsigned* counter) {
#if defined(__CUDA_ARCH__)
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter))
               : "memory");
  return before;
#else
  return atomicAdd(counter, 1u);
#endif
}

// Whether all other blocks that count here have done so: the last one then sees what each wrote before. One thread
// counts for all, as the barriers order what the others wrote and read. `last`: shared.
__device__ __forceinline__ bool is_last_block(unsigned* done, std::int64_t blocks, bool* last) {
  __syncthreads();
  if (threadIdx.x == 0) *last = count_and_share(done) == blocks - 1;
  __syncthreads();
  return *last;
}

// let_next_launch_begin(): an early launch after this one may begin, once all blocks have called it or ended.
// wait_for_launch_before() returns once that one has ended, and what it wrote is seen: before, an early launch must
// neither read that nor write anything. Before sm_90 both do nothing, and no launch is early.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ void let_next_launch_begin() { cudaTriggerProgrammaticLaunchCompletion(); }
__device__ __forceinline__ void wait_for_launch_before() { cudaGridDependencySynchronize(); }
#else
__device__ __forceinline__ void let_next_launch_begin() {}
__device__ __forceinline__ void wait_for_launch_before() {}
#endif

// Clusters: a block's own number in its cluster is known from its index. Code for GPUs before sm_90, which have no
// clusters, compiles too and must not be run in one.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
// The variable in shared memory of the cluster's block `rank` that corresponds to this block's *p.
template <typename T>
__device__ __forceinline__ T* shared_of(T* p, int rank) {
  return static_cast<T*>(__cluster_map_shared_rank(p, static_cast<unsigned>(rank)));
}
// wait() returns once every thread of the cluster has arrived, or ended; what they wrote before is seen, but for
// arrivals that are relaxed.
__device__ __forceinline__ void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ __forceinline__ void cluster_arrive_relaxed() { __cluster_barrier_arrive_relaxed(); }
__device__ __forceinline__ void cluster_wait() { __cluster_barrier_wait(); }
#else
constexpr bool kHasClusters = false;
template <typename T>
__device__ __forceinline__ T* shared_of(T* p, int) {
  return p;
}
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_arrive_relaxed() {}
__device__ __forceinline__ void cluster_wait() {}
#endif

// Whether the current device has them.
inline bool device_has_clusters() { return device_attribute(cudaDevAttrClusterLaunch) != 0; }

// Sum of the values of the threads before this one, and of all; `scratch`: shared, one T a warp, which a barrier
// separates from whoever used it before.
template <int threads, typename T>
__device__ __forceinline__ T block_scan(T value, T* scratch, T* total) {
  T through = value;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(kAllLanes, through, d);
    if (lane_id() >= d) through += other;
  }
  if (lane_id() == 31) scratch[warp_id()] = through;
  __syncthreads();
  T before = 0;
  *total = 0;
#pragma unroll
  for (int w = 0; w < threads / 32; ++w) {
    if (w < warp_id()) before += scratch[w];
    *total += scratch[w];
  }
  return before + through - value;
}

}  // namespace raddpo::cuda
