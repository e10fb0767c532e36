#pragma once
// The part of CUDA that the kernels use, for a C++ compiler: put this folder on the include path before CUDA's own.
// One-dimensional grids and blocks of whole warps, full masks, blocks (or clusters of them) one after another. There is
// no memory model: what a missing __threadfence or a stale cache would do is not seen here.
#include <math.h>

#include <cmath>

#include "fibers.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
// The only thread-local variables of this library, so that all shared memory is in one place, found below.
#define __shared__ static thread_local
#endif
#define CUDA_ON_CPU_LINE const char *what = __builtin_FUNCTION(), int line = __builtin_LINE()

using dim3 = cuda_on_cpu::Dim3;
using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9,
              cudaErrorInvalidDeviceFunction = 98, cudaErrorLaunchFailure = 719;

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaDeviceAttr {
  cudaDevAttrClusterLaunch,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  int ptxVersion;
};

#define threadIdx (::cuda_on_cpu::thread_index)
inline dim3 blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename To, typename From>
To cuda_on_cpu_bits(From value) {
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
inline unsigned __float_as_uint(float x) { return cuda_on_cpu_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
template <typename T>
T __ldg(const T* p) {
  return *p;
}

inline void __syncthreads(CUDA_ON_CPU_LINE) { cuda_on_cpu::leave(cuda_on_cpu::State::at_block, what, line); }
inline void __syncwarp(unsigned = ~0u, CUDA_ON_CPU_LINE) {
  cuda_on_cpu::leave(cuda_on_cpu::State::at_warp, what, line);
}
inline void __threadfence() {}
inline void __cluster_barrier_arrive() { ++cuda_on_cpu::current().arrivals; }
inline void __cluster_barrier_arrive_relaxed() { __cluster_barrier_arrive(); }
inline void __cluster_barrier_wait(CUDA_ON_CPU_LINE) { cuda_on_cpu::wait_for_cluster(what, line); }
inline void __stwb(uint4* p, uint4 value) { *p = value; }

template <typename T>
T __shfl_sync(unsigned, T value, unsigned from, CUDA_ON_CPU_LINE) {
  return cuda_on_cpu::exchange(value, [=](unsigned) { return from % 32; }, what, line);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned mask, CUDA_ON_CPU_LINE) {
  return cuda_on_cpu::exchange(value, [=](unsigned lane) { return lane ^ mask; }, what, line);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned by, unsigned width = 32, CUDA_ON_CPU_LINE) {
  return cuda_on_cpu::exchange(value, [=](unsigned lane) { return lane % width < by ? lane : lane - by; }, what, line);
}
inline unsigned __ballot_sync(unsigned, bool vote, CUDA_ON_CPU_LINE) {
  cuda_on_cpu::Fiber& me = cuda_on_cpu::current();
  const unsigned turn = me.exchanges % 2, warp = cuda_on_cpu::block.current / 32 * 32;
  cuda_on_cpu::exchange(std::uint64_t(vote), [](unsigned lane) { return lane; }, what, line);
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) votes |= unsigned(cuda_on_cpu::block.fibers[warp + i].values[turn]) << i;
  return votes;
}
template <typename T>
T atomicAdd(T* at, T value) {
  cuda_on_cpu::preempt();
  const T before = *at;
  *at += value;
  return before;
}

#include "launches.h"
