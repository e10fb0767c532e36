#pragma once
// Kernel interface of policy_loss, the policy gradient losses over ragged groups of rollouts: raw pointers, no torch
// and no CUDA headers. T is float or double, the type of log-probs and results; the arithmetic is in double.
#include <cstdint>

#include "../common/sessions.h"

struct CUstream_st;

namespace raddpo {

enum class Objective : int { reinforce, clip, cispo, sapo, ecpo, gbpo };
enum class Ratio : int { token, sequence, item };
enum class Divergence : int { k1, k2, k3 };
enum class Aggregate : int { sequence, token, constant };

template <typename T>
struct PolicyLossArgs {
  Sessions batch;              // the groups: experts first, then rollouts
  const std::int64_t* tokens;  // [candidates, levels]
  std::int64_t levels;
  const T* logps;                      // [candidates, levels], read within the lengths only, as all of this shape
  const T* old_logps;                  // the same, or null: the log-probs as constants
  const T* ref_logps;                  // the same, or null: no KL
  const T* advantages;                 // [candidates], or [candidates, levels] if `by_token`
  const T* weights;                    // [candidates], or null: 1
  const T* gates;                      // [candidates, levels], or null: 1
  const T* level_weights;              // [levels], or null: 1; of the NLL
  const double* divisors;              // [2] of policy and kl, and of nll, or null: use `divisor`
  double divisor[2];                   // 0: the count
  double low, high, dual_clip, delta;  // dual_clip 0: none
  double kl_weight, nll_weight, max_length;
  Objective objective;
  Ratio ratio;
  Divergence divergence;
  Aggregate aggregate;
  Reduction reduction;
  bool by_token;
  bool use_experts;  // in the policy term
  bool protect;
  bool count_all;               // groups without advantages too
  T *loss, *policy, *kl, *nll;  // [1], or [sessions] under Reduction::none
  T* ratios;                    // [candidates]
  T* clipped;                   // [2] shares of tokens: below, above
  T* approx_kl;                 // [1]
  double* counts;               // [2] which divide the sums of policy and kl, and of nll, for a mean; 0 too
  bool* counted;                // [sessions]
  T* gradient;                  // [candidates, levels] of the sums of policy + kl_weight * kl, or null
  T* scales;                    // [2] factors on the sums of policy and kl, and of nll
};

enum PolicySum : int {
  kPolicy,
  kKl,
  kNll,
  kPolicyRows,    // in the policy term
  kPolicyTokens,  // of these rows
  kExpertTokens,  // in the NLL
  kBelow,         // tokens whose ratio the clip holds from below
  kAbove,
  kDrift,    // of the estimate of KL(old || new)
  kInvalid,  // above 0: an advantage or a weight is not finite; found on the CPU only
  kPolicySums
};

// What a group adds to the results.
struct PolicySums {
  double of[kPolicySums];
};

// grad_logps = upstream gradient of the loss * (gradient - nll_weight * level_weights), each part by its scale.
template <typename T>
struct PolicyLossBackwardArgs {
  Sessions batch;
  std::int64_t levels;
  const T* grad_loss;  // one element, or one per group at this stride
  std::int64_t stride;
  const T* gradient;       // [candidates, levels]
  const T* scales;         // [2]
  const bool* counted;     // [sessions]
  const T* level_weights;  // [levels], or null: 1
  double nll_weight;
  T* grad_logps;  // [candidates, levels]
};

namespace cuda {
// Bytes of device workspace for policy_loss.
template <typename T>
std::int64_t policy_loss_workspace(const PolicyLossArgs<T>& a);
template <typename T>
int policy_loss(const PolicyLossArgs<T>& a, void* workspace, CUstream_st* stream);  // these return cudaError_t
template <typename T>
int policy_loss_backward(const PolicyLossBackwardArgs<T>& a, CUstream_st* stream);
}  // namespace cuda

}  // namespace raddpo
