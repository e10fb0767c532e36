#pragma once
// Kernel interface of group_advantages, the advantages of ragged groups of rewards: raw pointers, no torch and no CUDA
// headers. T is float or double, the type of rewards and results; the arithmetic is in double.
#include <cstdint>

#include "../common/sessions.h"

struct CUstream_st;

namespace raddpo {

enum class Credit : int { sequence, siblings, marginal };
enum class Scale : int { group, batch, none };
enum class Baseline : int { mean, others };

template <typename T>
struct GroupAdvantagesArgs {
  Sessions batch;              // the groups: experts first, then rollouts
  const std::int64_t* tokens;  // [candidates, levels]
  std::int64_t levels;
  const T* rewards;    // [candidates]; NaN: does not count
  const T* weights;    // [candidates], or null: 1
  const T* baselines;  // [sessions], or null: `baseline`
  // The ground truth of each group; without offsets its experts.
  const std::int64_t* target_tokens;   // [targets, target_levels]
  const std::int64_t* target_lengths;  // [targets]
  const std::int64_t* target_offsets;  // [sessions + 1]
  std::int64_t targets, target_levels;
  const T* level_weights;  // [levels], or null: 1
  double blend, eps;
  Credit credit;
  Scale scale;
  Baseline baseline;
  bool count_experts;  // among the rewards that are compared
  bool contiguous;     // matches end with the common prefix
  T* values;           // [candidates], or [candidates, levels] unless the credit is `sequence`
  bool* active;        // [sessions]
  T* gates;            // [candidates, levels] if the credit is `marginal`
};

namespace cuda {
// Bytes of device workspace for group_advantages.
template <typename T>
std::int64_t group_advantages_workspace(const GroupAdvantagesArgs<T>& a);
template <typename T>
int group_advantages(const GroupAdvantagesArgs<T>& a, void* workspace, CUstream_st* stream);  // returns cudaError_t
}  // namespace cuda

}  // namespace raddpo
