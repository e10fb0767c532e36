#pragma once
// The CPU kernels of session_loss, one variant per instruction set.
#include "session_loss.h"

namespace raddpo {

// A thread's scratch memory, reused from session to session. Arrays of [negatives] are padded to multiples of 8.
template <typename T>
struct SessionLossScratch {
  std::int32_t* lengths;   // [candidates], clamped to [0, levels]
  std::int32_t* prefixes;  // [negatives] leading tokens that are detached; -1: the pair is dropped
  std::int32_t* guarded;   // [negatives] longest prefix in common with any positive
  T* rewards;              // [negatives]
  T* weights;              // [negatives]
  T* softmax;              // [negatives] exponents of the log-sum-exp, then their softmax weights times the sum
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
