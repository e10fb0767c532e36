// One warp per group, whose lanes share the rows, forward and backward, in one launch each. The last block to finish
// adds up the sums of the groups in a fixed order, so that the result is bitwise reproducible.
#include <cmath>

#include "../common/cuda_block.cuh"
#include "policy_loss_math.h"

namespace raddpo::cuda {
namespace {

constexpr int kPolicyThreads = 32;  // a group has some 16 rows
constexpr std::int64_t kMaxPolicyBlocks = 8192;

struct PolicyWorkspace {
  PolicySums* sums;  // [sessions]
  unsigned* done;    // [1] blocks that have finished; 0 at the launch
};

// The sums over a warp's lanes, given to every lane.
__device__ __forceinline__ PolicySums warp_total(PolicySums sums) {
#pragma unroll
  for (int i = 0; i < kPolicySums; ++i) sums.of[i] = warp_reduce(sums.of[i], [](double x, double y) { return x + y; });
  return sums;
}

template <typename T>
__device__ __forceinline__ bool group_counts(const PolicyLossArgs<T>& a, const Session& v) {
  int found = a.count_all;
  for (std::int64_t i = threadIdx.x; i < v.positives + v.negatives; i += kPolicyThreads)
    found |= has_advantage(a, v, i);
  return warp_reduce(found, [](int x, int y) { return x | y; });
}

template <typename T>
__global__ void __launch_bounds__(kPolicyThreads)
    policy_loss_kernel(const __grid_constant__ PolicyLossArgs<T> a, const __grid_constant__ PolicyWorkspace w) {
  __shared__ bool last;
  for (std::int64_t s = blockIdx.x; s < a.batch.sessions; s += gridDim.x) {
    const Session v = session_of(a.batch, s);
    const bool counts = group_counts(a, v);
    PolicySums mine{};
    for (std::int64_t i = threadIdx.x; i < v.positives + v.negatives; i += kPolicyThreads)
      add_row(a, v, i, counts, mine);
    const PolicySums sums = warp_total(mine);
    if (threadIdx.x > 0) continue;
    w.sums[s] = sums;
    write_group(a, s, counts, sums);
  }
  if (!is_last_block(w.done, gridDim.x, &last)) return;
  PolicySums mine{};
  for (std::int64_t s = threadIdx.x; s < a.batch.sessions; s += kPolicyThreads) add(mine, w.sums[s]);
  const PolicySums sums = warp_total(mine);
  if (threadIdx.x == 0) write_batch(a, sums);
}

template <typename T>
__global__ void __launch_bounds__(kPolicyThreads)
    policy_loss_backward_kernel(const __grid_constant__ PolicyLossBackwardArgs<T> a) {
  for (std::int64_t s = blockIdx.x; s < a.batch.sessions; s += gridDim.x) {
    const Session v = session_of(a.batch, s);
    const std::int64_t size = (v.positives + v.negatives) * a.levels;
    for (std::int64_t at = threadIdx.x; at < size; at += kPolicyThreads)
      a.grad_logps[v.first * a.levels + at] = gradient_of(a, v, s, at / a.levels, at % a.levels);
  }
}

std::int64_t policy_blocks(std::int64_t sessions) { return sessions < kMaxPolicyBlocks ? sessions : kMaxPolicyBlocks; }

}  // namespace

template <typename T>
std::int64_t policy_loss_workspace(const PolicyLossArgs<T>& a) {
  return a.batch.sessions * static_cast<std::int64_t>(sizeof(PolicySums)) + sizeof(unsigned);
}

template <typename T>
int policy_loss(const PolicyLossArgs<T>& a, void* workspace, CUstream_st* stream) {
  auto* const sums = static_cast<PolicySums*>(workspace);
  const PolicyWorkspace w{sums, reinterpret_cast<unsigned*>(sums + a.batch.sessions)};
  if (const int error = cudaMemsetAsync(w.done, 0, sizeof(*w.done), stream)) return error;
  const std::int64_t blocks = a.batch.sessions ? policy_blocks(a.batch.sessions) : 1;  // no groups: losses of 0
  return launch(policy_loss_kernel<T>, blocks, kPolicyThreads, stream, a, w);
}

template <typename T>
int policy_loss_backward(const PolicyLossBackwardArgs<T>& a, CUstream_st* stream) {
  if (!a.batch.sessions) return cudaSuccess;
  return launch(policy_loss_backward_kernel<T>, policy_blocks(a.batch.sessions), kPolicyThreads, stream, a);
}

#define RADDPO_INSTANTIATE(T)                                                 \
  template std::int64_t policy_loss_workspace<T>(const PolicyLossArgs<T>&);   \
  template int policy_loss<T>(const PolicyLossArgs<T>&, void*, CUstream_st*); \
  template int policy_loss_backward<T>(const PolicyLossBackwardArgs<T>&, CUstream_st*);
RADDPO_INSTANTIATE(float)
RADDPO_INSTANTIATE(double)
#undef RADDPO_INSTANTIATE

}  // namespace raddpo::cuda
