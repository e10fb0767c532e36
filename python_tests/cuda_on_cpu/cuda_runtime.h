#pragma once
// The part of CUDA that the kernels use, for a C++ compiler: put this folder on the include path before CUDA's own.
// One-dimensional grids and blocks of whole warps, full masks, blocks one after another. There is no memory model: what
// a missing __threadfence or a stale cache would do is not seen here.
#include <math.h>

#include <cmath>

#include "fibers.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
// All shared memory in one section, to be filled with garbage before each block.
#define __shared__ static __attribute__((section("cuda_shared")))
extern "C" char __start_cuda_shared[] __attribute__((visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((visibility("hidden")));
#endif
#define CUDA_ON_CPU_LINE const char *what = __builtin_FUNCTION(), int line = __builtin_LINE()

using dim3 = cuda_on_cpu::Dim3;
using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9,
              cudaErrorLaunchFailure = 719;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

#define threadIdx (::cuda_on_cpu::thread_index)
inline dim3 blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
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

namespace cuda_on_cpu {
inline unsigned block_order = 0;  // as Block::order
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  if (!config->gridDim.x || !config->blockDim.x || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  if (config->blockDim.x % 32) return cudaErrorInvalidConfiguration;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const std::function<void()> body = [&] { kernel(arguments...); };
  std::vector<unsigned> order(gridDim.x);
  std::iota(order.begin(), order.end(), 0u);
  if (block_order == 1) std::reverse(order.begin(), order.end());
  if (block_order > 1) std::shuffle(order.begin(), order.end(), std::mt19937(block_order));
  for (unsigned i : order) {
#if !defined(__SANITIZE_ADDRESS__)
    std::memset(__start_cuda_shared, 0xa5, __stop_cuda_shared - __start_cuda_shared);
#endif
    blockIdx = {i};
    if (!run_block(blockDim.x, body)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
