#pragma once
// Launches, and the memory of their blocks: the rest of cuda_runtime.h.
#include <link.h>

#include <array>
#include <cstdlib>
#include <map>
#include <tuple>
#include <utility>

#include "cuda_runtime.h"

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
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  return attributes->ptxVersion = cuda_on_cpu::has_clusters ? 90 : 80, cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  using namespace cuda_on_cpu;
  if (bytes > most_shared_bytes) return cudaErrorInvalidValue;
  return asked_for[reinterpret_cast<const void*>(kernel)] = bytes, cudaSuccess;
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

inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  return 1;
}

inline bool is_early(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
      return config.attrs[i].val.programmaticStreamSerializationAllowed;
  return false;
}

// Launches run as late as they may: the last one that was made when the next one is made or the call ends, and where
// the next one is early, when a thread of it waits for that.
using Launch = std::function<cudaError_t()>;
inline Launch last_launch, launch_before;  // that was made; that the running one has not waited for

inline cudaError_t run_once(Launch& launch) {
  const Launch one = std::move(launch);
  launch = nullptr;
  return one ? one() : cudaSuccess;
}

// Runs the launch before, from a thread of another launch.
inline void wait_for_launch(int line) {
  if (!launch_before) return;
  Block running = std::move(block);
  block = Block{};
  block.order = running.order;
  block.random = running.random;
  const auto indices = std::make_tuple(thread_index, blockIdx, blockDim, gridDim, first_block, entered, translated);
  const SharedMemory own = shared, variables = find_shared_memory();
  const std::vector<char> values(variables.begin, variables.begin + variables.size);
  std::vector<bool> begun = std::move(started);
  Memories copied = std::move(copies), sized = std::move(dynamics);
  const cudaError_t error = run_once(launch_before);
  running.error = block.error;
  block = std::move(running);
  std::tie(thread_index, blockIdx, blockDim, gridDim, first_block, entered, translated) = indices;
  if (variables.size) std::memcpy(variables.begin, values.data(), variables.size);
  shared = own;
  started = std::move(begun);
  copies = std::move(copied);
  dynamics = std::move(sized);
  if (error) leave(State::failed, "wait for a launch that failed", line);
}

// Runs all blocks of a launch.
inline cudaError_t run_blocks(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const unsigned cluster = cluster_of(config);
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
  const unsigned cluster = cluster_of(config);
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
  const unsigned cluster = cluster_of(config);
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

inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t) {
  const cudaError_t error = cuda_on_cpu::run_once(cuda_on_cpu::last_launch);
  return std::memset(p, value, bytes), error;
}
inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize(int line = __builtin_LINE()) { cuda_on_cpu::wait_for_launch(line); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  const unsigned cluster = cluster_of(*config);
  if (!config->gridDim.x || !config->blockDim.x || config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  if (config->blockDim.x % 32) return cudaErrorInvalidConfiguration;
  if (cluster > (has_clusters ? 8 : 1) || config->gridDim.x % cluster) return cudaErrorInvalidConfiguration;
  if (is_early(*config) && !has_clusters) return cudaErrorInvalidValue;
  const auto* address = reinterpret_cast<const void*>(kernel);
  if (config->dynamicSmemBytes > kSharedBytes && static_cast<int>(config->dynamicSmemBytes) > asked_for[address])
    return cudaErrorInvalidValue;
  const auto found = by_kernel.find(address);
  if (!by_name.empty() &&
      (found == by_kernel.end() || found->second->sizes != std::vector<std::size_t>{sizeof(Parameters)...})) {
    block.error = "no PTX of this kernel and these parameters";
    return cudaErrorInvalidDeviceFunction;
  }
  const Translated* translation = by_name.empty() ? nullptr : found->second;
  if (!is_early(*config))
    if (const cudaError_t error = run_once(last_launch)) return error;
  last_launch = [before = std::move(last_launch), config = *config, translation, kernel,
                 attributes = std::vector<cudaLaunchAttribute>(config->attrs, config->attrs + config->numAttrs),
                 values = std::tuple<Parameters...>{arguments...}]() mutable {
    config.attrs = attributes.data();
    launch_before = std::move(before);
    const cudaError_t error = translation
                                  ? std::apply(
                                        [&](auto&... value) {
                                          const std::array parameters{reinterpret_cast<std::uint64_t>(&value)...};
                                          return run_translated(config, *translation, parameters.data());
                                        },
                                        values)
                                  : run_source(config, [&] { std::apply(kernel, values); });
    if (!launch_before) return error;
    launch_before = nullptr;
    block.error = "a launch that began early has not waited for the one before";
    return cudaErrorLaunchFailure;
  };
  return cudaSuccess;
}
