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

// Adds the terms of a row of the policy term to the sums of its group, and to its gradient, which is 0 before.
template <typename T>
__device__ __forceinline__ void add_policy(const PolicyLossArgs<T>& a, const Session& v, std::int64_t i,
                                           PolicySums& sums) {
  const std::int64_t row = v.first + i, begin = row * a.levels;
  const std::int32_t length = sid_of(a, row).length;
  const double weight = weight_of(a, row, length);
  const Move whole = a.ratio == Ratio::token ? Move{} : move_of_row(a, row, length);
  double value = 0, slopes = 0;
  bool pulls = false, finite = weight >= 0 && weight < INFINITY;
  for (std::int32_t l = 0; l < length; ++l) {
    const Move token = move_of_token(a, begin + l);
    const double advantage = advantage_of(a, row, l);
    const bool of_token = a.ratio == Ratio::token;  // member by member: a choice of structs is one of addresses
    const Move move{of_token ? token.logp : whole.logp, of_token ? token.gap : whole.gap,
                    of_token ? token.ratio : whole.ratio};
    const PolicyTerm term = term_of(a, a.objective, move, advantage);
    value += term.value;
    slopes += term.slope;
    if (a.gradient) a.gradient[begin + l] = static_cast<T>(weight * term.slope);
    sums.of[kBelow] += term.below;
    sums.of[kAbove] += term.above;
    sums.of[kDrift] += token.ratio - 1 - token.gap;
    pulls |= advantage < 0;
    finite &= std::fabs(advantage) < INFINITY;
  }
  sums.of[kPolicy] += weight * value;
  sums.of[kPolicyRows] += 1;
  sums.of[kPolicyTokens] += length;
  sums.of[kInvalid] += !finite;
  if (a.gradient && a.ratio == Ratio::item)  // each token moves the ratio of the whole row
    for (std::int32_t l = 0; l < length; ++l) a.gradient[begin + l] = static_cast<T>(weight * slopes);
  if (a.gradient && a.protect && pulls) protect_row(a, v, i, [&](std::int64_t j) { return is_in_policy(a, v, j); });
  for (std::int32_t l = 0; a.ref_logps && weight != 0 && l < length; ++l) {
    const KlTerm kl = kl_of(a, begin + l);
    sums.of[kKl] += weight * kl.value;
    if (a.gradient && a.kl_weight > 0) a.gradient[begin + l] += static_cast<T>(a.kl_weight * weight * kl.slope);
  }
}

// A row's ratio: of its tokens the mean; 1 without any.
template <typename T>
__device__ __forceinline__ double mean_ratio(const PolicyLossArgs<T>& a, std::int64_t row) {
  const std::int32_t length = sid_of(a, row).length;
  if (!length || !a.old_logps) return 1;
  if (a.ratio != Ratio::token) return move_of_row(a, row, length).ratio;
  double sum = 0;
  for (std::int32_t l = 0; l < length; ++l) sum += move_of_token(a, row * a.levels + l).ratio;
  return sum / length;
}

// What row i adds to a group; `counts`: whether the group does.
template <typename T>
__device__ __forceinline__ void add_row(const PolicyLossArgs<T>& a, const Session& v, std::int64_t i, bool counts,
                                        PolicySums& sums) {
  const std::int64_t row = v.first + i;
  a.ratios[row] = static_cast<T>(mean_ratio(a, row));
  for (std::int64_t l = 0; a.gradient && l < a.levels; ++l) a.gradient[row * a.levels + l] = 0;
  if (!counts) return;
  if (is_in_policy(a, v, i)) add_policy(a, v, i, sums);
  if (i < v.positives) add_nll(a, row, sums);
}

template <typename T>
__device__ __forceinline__ bool group_counts(const PolicyLossArgs<T>& a, const Session& v) {
  int found = a.count_all;
  for (std::int64_t i = threadIdx.x; i < v.positives + v.negatives; i += kPolicyThreads)
    found |= is_in_policy(a, v, i) && has_advantage(a, v.first + i);
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
