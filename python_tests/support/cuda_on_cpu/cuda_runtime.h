#pragma once
// The part of CUDA that the kernels use, for a C++ compiler: put this folder on the include path before CUDA's own.
// One-dimensional grids and blocks of whole warps, full masks, blocks (or clusters of them) one after another. There is
// no memory model: what a missing __threadfence or a stale cache would do is not seen here.
#include <link.h>
#include <math.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <map>
#include <tuple>

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

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
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

namespace cuda_on_cpu {
inline unsigned block_order = 0;  // as Block::order
inline bool has_clusters = true;
constexpr int kSharedBytes = 48 << 10;        // of a block, without asking for more
inline int most_shared_bytes = 227 << 10;     // that it may ask for
inline std::map<const void*, int> asked_for;  // by kernel

// The index of the cluster's first block, and the number of the one that runs. Each has shared memory of its own. That
// of the source's variables is copied to where they are while a block runs; under AddressSanitizer all blocks share
// them, and they are not filled.
inline unsigned first_block, entered;
inline std::vector<bool> started;
inline bool translated;  // whether the kernel that runs is

struct SharedMemory {
  char* begin;
  std::size_t size;
};
struct Memories {
  std::vector<std::unique_ptr<char[]>> of;  // each block
  std::size_t size = 0;
  void allocate(unsigned blocks, std::size_t bytes) {
    of.clear();
    size = bytes;
    for (unsigned i = 0; i < blocks; ++i) of.emplace_back(new char[bytes]);
  }
  SharedMemory operator[](unsigned block) const { return {of[block].get(), size}; }
};
inline SharedMemory shared;        // of this thread: the source's variables, or what the translated kernel addresses
inline Memories copies, dynamics;  // of the source's variables; of memory whose size the launch says

inline SharedMemory find_shared_memory() {
#if defined(__SANITIZE_ADDRESS__)
  return {nullptr, 0};
#else
  static thread_local char anchor;
  SharedMemory found{&anchor, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* library, std::size_t, void* data) {
        auto* wanted = static_cast<SharedMemory*>(data);
        auto* begin = static_cast<char*>(library->dlpi_tls_data);
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const auto& part = library->dlpi_phdr[i];
          if (part.p_type != PT_TLS || wanted->begin < begin || wanted->begin >= begin + part.p_memsz) continue;
          *wanted = {begin, part.p_memsz};
          return 1;
        }
        return 0;
      },
      &found);
  if (!found.size) std::abort();
  return found;
#endif
}

// What was written before is lost.
inline void spoil(SharedMemory memory) { std::memset(memory.begin, 0xa5, memory.size); }

inline void enter_block(unsigned number) {
  blockIdx = {first_block + number};
  if (number != entered && copies.size) {
    std::memcpy(copies[entered].begin, shared.begin, shared.size);
    std::memcpy(shared.begin, copies[number].begin, shared.size);
  }
  if (dynamics.size && translated) shared.begin = dynamics[number].begin;
  entered = number;
  if (started[number]) return;
  if (dynamics.size)
    spoil(dynamics[number]);
  else if (shared.size)
    spoil(shared);
  started[number] = true;
}
}  // namespace cuda_on_cpu

inline void* __cluster_map_shared_rank(void* p, unsigned rank, int line = __builtin_LINE()) {
  using namespace cuda_on_cpu;
  if (rank == entered) return p;
  const auto fibers = block.fibers.begin() + rank * block.threads;
  const auto ended = [](const Fiber& fiber) { return fiber.state == State::ended; };
  if (!started[rank] || std::all_of(fibers, fibers + block.threads, ended))
    leave(State::failed, "memory of a block that has not begun, or has ended,", line);
  const SharedMemory own = dynamics.size ? dynamics[entered] : shared;
  const Memories& others = dynamics.size ? dynamics : copies;
  return others.size ? others[rank].begin + (static_cast<char*>(p) - own.begin) : p;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  using namespace cuda_on_cpu;
  *value = attribute == cudaDevAttrClusterLaunch         ? has_clusters
           : attribute == cudaDevAttrMultiProcessorCount ? 132
                                                         : most_shared_bytes;
  return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  using namespace cuda_on_cpu;
  if (bytes > most_shared_bytes) return cudaErrorInvalidValue;
  return asked_for[reinterpret_cast<const void*>(kernel)] = bytes, cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}

namespace cuda_on_cpu {
// A kernel translated from PTX (ptx.py), which runs in place of the compiled source.
struct Translated {
  void (*run)(const std::uint64_t* parameters);  // their addresses
  std::vector<std::size_t> sizes;                // of the parameters
  std::size_t shared_bytes;
  unsigned most_threads;
};
inline std::map<std::string, Translated> by_name;  // empty: the source runs
inline std::map<const void*, const Translated*> by_kernel;

// Runs all blocks of a launch.
inline cudaError_t run_blocks(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const unsigned cluster = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  block.enter = enter_block;
  std::vector<unsigned> order(gridDim.x / cluster);
  std::iota(order.begin(), order.end(), 0u);
  if (block_order == 1) std::reverse(order.begin(), order.end());
  if (block_order > 1) std::shuffle(order.begin(), order.end(), std::mt19937(block_order));
  for (unsigned i : order) {
    started.assign(cluster, false);
    first_block = i * cluster;
    entered = 0;
    if (!run_cluster(cluster, blockDim.x, body)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

// A kernel has variables in shared memory or memory whose size the launch says, not both: copies take long.
inline cudaError_t run_source(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const unsigned cluster = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
  shared = find_shared_memory();
  translated = false;
  if (!config.dynamicSmemBytes) {
    copies.allocate(cluster, cluster > 1 ? shared.size : 0);
    dynamics.allocate(0, 0);
    return run_blocks(config, body);
  }
  const SharedMemory variables = shared;
  if (variables.size) spoil(variables);
  shared = {nullptr, 0};
  copies.allocate(0, 0);
  dynamics.allocate(cluster, config.dynamicSmemBytes);
  const cudaError_t error = run_blocks(config, body);
  for (std::size_t i = 0; i < variables.size; ++i)
    if (variables.begin[i] != static_cast<char>(0xa5)) {
      block.error = "variables in shared memory beside memory whose size the launch says";
      return cudaErrorInvalidValue;
    }
  return error;
}

inline cudaError_t run_translated(const cudaLaunchConfig_t& config, const Translated& kernel,
                                  const std::uint64_t* parameters) {
  const unsigned cluster = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
  if (kernel.shared_bytes > kSharedBytes || config.blockDim.x > kernel.most_threads) {
    block.error = "more shared memory than a block may have, or more threads than the kernel's launch bounds";
    return cudaErrorInvalidValue;
  }
  translated = true;
  copies.allocate(0, 0);
  dynamics.allocate(cluster, kernel.shared_bytes + config.dynamicSmemBytes);
  shared = {nullptr, dynamics.size};
  return run_blocks(config, [&] { kernel.run(parameters); });
}
}  // namespace cuda_on_cpu

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  if (!config->gridDim.x || !config->blockDim.x || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  if (config->blockDim.x % 32) return cudaErrorInvalidConfiguration;
  if (cluster > (has_clusters ? 8 : 1) || config->gridDim.x % cluster) return cudaErrorInvalidConfiguration;
  const auto* address = reinterpret_cast<const void*>(kernel);
  if (config->dynamicSmemBytes > kSharedBytes && static_cast<int>(config->dynamicSmemBytes) > asked_for[address])
    return cudaErrorInvalidValue;
  if (by_name.empty()) return run_source(*config, [&] { kernel(arguments...); });
  const auto found = by_kernel.find(address);
  if (found == by_kernel.end() || found->second->sizes != std::vector<std::size_t>{sizeof(Parameters)...}) {
    block.error = "no PTX of this kernel and these parameters";
    return cudaErrorInvalidDeviceFunction;
  }
  std::tuple<Parameters...> values{arguments...};
  const auto parameters =
      std::apply([](auto&... value) { return std::array{reinterpret_cast<std::uint64_t>(&value)...}; }, values);
  return run_translated(*config, *found->second, parameters.data());
}
