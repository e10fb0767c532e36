#pragma once
// The CPU kernels of policy_loss, one variant per instruction set.
#include "policy_loss.h"

namespace raddpo {

// Rows of small groups that are taken together: 512 tokens.
RADDPO_HD std::int64_t stretch_rows(std::int64_t levels) { return 512 / (levels > 1 ? levels : 1); }

// A thread's scratch memory: of as many rows as the largest group has, and at least of stretch_rows.
struct PolicyLossScratch {
  std::int32_t *lengths, *members;                                                      // [rows]
  double *row_weights, *row_advantages, *row_logps, *row_gaps, *row_ratios, *row_sums;  // [rows]
  double *logps, *gaps, *ratios, *advantages, *weights, *values, *slopes;               // [rows, levels]
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
