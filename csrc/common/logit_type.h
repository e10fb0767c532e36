#pragma once
// Element types of logits and their conversion to and from what is computed with (A) on the CPU.
#include <cstdint>
#include <cstring>

#include "math.h"

namespace raddpo {

enum class LogitType : int { float32, bfloat16, float16, float64 };

struct Float32 {
  using T = float;
  using A = float;
  static RADDPO_HD float load(const T* p) { return *p; }
  static RADDPO_HD void store(T* p, float value) { *p = value; }
};

struct Float64 {
  using T = double;
  using A = double;
  static RADDPO_HD double load(const T* p) { return *p; }
  static RADDPO_HD void store(T* p, double value) { *p = value; }
};

// Stores round to nearest, ties to even.
struct BFloat16 {
  using T = std::uint16_t;
  using A = float;
  static RADDPO_HD void store(T* p, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    *p = static_cast<T>(value == value ? rounded : 0x7fc0);
  }
  static RADDPO_HD float load(const T* p) {
    const std::uint32_t bits = std::uint32_t(*p) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

struct Float16 {
  using T = std::uint16_t;
  using A = float;
  static RADDPO_HD void store(T* p, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const std::uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    // Normal halves: the exponent rebiased, the mantissa rounded by a carry. Below 2^-14 the unit is 2^-24, as it is in
    // the sum with one half.
    const std::uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    float size;
    std::memcpy(&size, &magnitude, 4);
    const float with_half = size + 0.5f;
    std::uint32_t subnormal;
    std::memcpy(&subnormal, &with_half, 4);
    std::uint32_t half = magnitude < (113u << 23) ? subnormal - 0x3f000000u : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above
    half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
    *p = static_cast<T>(sign | half);
  }
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
