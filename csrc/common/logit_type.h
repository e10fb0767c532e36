#pragma once
// Element types of logits and their conversion to and from what is computed with (A) on the CPU. Loops go by words of
// kLanes elements: the two bfloat16 of a 32-bit word are spread and joined by shifts, without moving between lanes.
#include <cstdint>
#include <cstring>

#include "math.h"

namespace raddpo {

enum class LogitType : int { float32, bfloat16, float16, float64 };

// Of the types whose word is one element.
template <typename D, typename Value>
struct SingleWord {
  static constexpr int kLanes = 1;
  using Word = Value;
  static RADDPO_HD Word load_word(const Value* p) { return *p; }
  static RADDPO_HD auto lane(const Word& word, int) { return D::load(&word); }
  template <typename A>
  static RADDPO_HD void store_word(Value* p, const A (&lanes)[1]) {
    D::store(p, lanes[0]);
  }
};

struct Float32 : SingleWord<Float32, float> {
  using T = float;
  using A = float;
  static RADDPO_HD float load(const T* p) { return *p; }
  static RADDPO_HD void store(T* p, float value) { *p = value; }
};

struct Float64 : SingleWord<Float64, double> {
  using T = double;
  using A = double;
  static RADDPO_HD double load(const T* p) { return *p; }
  static RADDPO_HD void store(T* p, double value) { *p = value; }
};

// Stores round to nearest, ties to even.
struct BFloat16 {
  using T = std::uint16_t;
  using A = float;
  static constexpr int kLanes = 2;
  using Word = std::uint32_t;
  static RADDPO_HD Word load_word(const T* p) {
    Word word;
    std::memcpy(&word, p, 4);
    return word;
  }
  static RADDPO_HD float lane(Word word, int k) {
    const std::uint32_t bits = k ? word & 0xffff0000u : word << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  // The bits of a float, rounded in their upper half.
  static RADDPO_HD std::uint32_t rounded(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return value == value ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fc00000u;
  }
  static RADDPO_HD void store_word(T* p, const float (&lanes)[2]) {
    const Word word = rounded(lanes[0]) >> 16 | (rounded(lanes[1]) & 0xffff0000u);
    std::memcpy(p, &word, 4);
  }
  static RADDPO_HD void store(T* p, float value) { *p = static_cast<T>(rounded(value) >> 16); }
  static RADDPO_HD float load(const T* p) {
    const std::uint32_t bits = std::uint32_t(*p) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

struct Float16 : SingleWord<Float16, std::uint16_t> {
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
