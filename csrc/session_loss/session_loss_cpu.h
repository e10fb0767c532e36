#pragma once
// The CPU kernels of session_loss, one variant for each instruction set.
#include "session_loss.h"

namespace raddpo {

// Memory of a thread for one session after another; [negatives] are padded to multiples of 8.
template <typename T>
struct SessionLossScratch {
  std::int32_t* lengths;   // [candidates], within the tokens
  std::int32_t* prefixes;  // [negatives] leading tokens that are detached; -1: it is dropped
  std::int32_t* guarded;   // [negatives] most tokens in common with a positive
  T* rewards;              // [negatives]
  T* weights;              // [negatives]
  T* shares;               // [negatives] of the log-sum-exp; before, exponents
};

#define RADDPO_DECLARE(T)                                                                                              \
  void session_loss(const SessionLossArgs<T>& a, const SessionLossScratch<T>& m, std::int64_t begin, std::int64_t end, \
                    SessionSums* sums);                                                                                \
  void session_loss_backward(const SessionLossBackwardArgs<T>& a, std::int64_t begin, std::int64_t end);
#define RADDPO_SESSION_LOSS(isa) \
  namespace isa {                \
  RADDPO_DECLARE(float)          \
  RADDPO_DECLARE(double)         \
  }
RADDPO_SESSION_LOSS(scalar)
RADDPO_SESSION_LOSS(avx2)
RADDPO_SESSION_LOSS(avx512)
#undef RADDPO_SESSION_LOSS
#undef RADDPO_DECLARE

}  // namespace raddpo
