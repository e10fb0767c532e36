#pragma once
// float16 as its bits, converted by the CPU kernels' own function.
#include "../../../csrc/common/logit_type.h"

struct __half {
  unsigned short bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half x) { return raddpo::Float16::load(&x.bits); }
