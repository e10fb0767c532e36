#pragma once
#include "math.h"

namespace raddpo {

// A log-sum-exp rounded to the kernel's type, for e^(x - exact) = factor * e^(x - value). At 1000 the rounding of a
// float alone would change every e^x by 3e-5.
template <typename A>
struct RoundedLse {
  A value, factor;
  RADDPO_HD explicit RoundedLse(double exact)
      : value(static_cast<A>(exact)), factor(fast_exp(static_cast<A>(value - exact))) {}
};

}  // namespace raddpo
