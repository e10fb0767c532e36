#pragma once
// Element types of logits and their conversion to float on the CPU.
#include <cstdint>
#include <cstring>

#include "math.h"

namespace raddpo {

enum class LogitType : int { float32, bfloat16, float16 };

struct Float32 {
  using T = float;
  static RADDPO_HD float load(const T* p) { return *p; }
};

struct BFloat16 {
  using T = std::uint16_t;
  static RADDPO_HD float load(const T* p) {
    const std::uint32_t bits = std::uint32_t(*p) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

struct Float16 {
  using T = std::uint16_t;
  static RADDPO_HD float load(const T* p) {
    // Exponent and mantissa moved into place are the value times 2^-112, subnormals included.
    const std::uint32_t magnitude = std::uint32_t(*p & 0x7fff) << 13, sign = std::uint32_t(*p & 0x8000) << 16;
    float value;
    std::memcpy(&value, &magnitude, 4);
    value *= 0x1p112f;
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = (magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits) | sign;  // infinities and NaN
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

}  // namespace raddpo
