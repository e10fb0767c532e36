#pragma once
// The CPU kernels of policy_loss, one variant per instruction set.
#include "policy_loss.h"

namespace raddpo {

// A thread's scratch memory, reused from group to group.
struct PolicyLossScratch {
  std::int32_t *lengths, *members;                                         // [rows of a group]
  double *logps, *gaps, *ratios, *advantages, *weights, *values, *slopes;  // [rows of a group, levels]
};

#define RADDPO_DECLARE(T)                                                                                        \
  void policy_loss(const PolicyLossArgs<T>& a, const PolicyLossScratch& m, std::int64_t begin, std::int64_t end, \
                   PolicySums* sums);                                                                            \
  void policy_loss_backward(const PolicyLossBackwardArgs<T>& a, std::int64_t begin, std::int64_t end);
#define RADDPO_POLICY_LOSS(isa) \
  namespace isa {               \
  RADDPO_DECLARE(float)         \
  RADDPO_DECLARE(double)        \
  }
RADDPO_POLICY_LOSS(scalar)
RADDPO_POLICY_LOSS(avx2)
RADDPO_POLICY_LOSS(avx512)
#undef RADDPO_POLICY_LOSS
#undef RADDPO_DECLARE

}  // namespace raddpo
