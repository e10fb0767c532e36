#pragma once
// Scalar building blocks shared by the CPU kernels (vectorised by the compiler) and the CUDA kernels.
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define RADDPO_HD __host__ __device__ __forceinline__
#else
// Never emitted out of line: a shared out-of-line copy compiled for AVX-512 could be the one that an older CPU runs.
#define RADDPO_HD inline __attribute__((always_inline))
#endif

namespace raddpo {

// -126, which the compiler does not know, from any finite number.
RADDPO_HD float least_exponent(float x) { return 0.f * x - 126.f; }

// 2^x to 2e-7 relative; 2^-126 below its range, where the sums it goes into do not notice. NaN stays NaN. `least` is
// -126: from a variable it is one maximum, where a constant has the compiler find what becomes of it and blend that in.
RADDPO_HD float fast_exp2(float x, float least = -126.f) {
#if defined(__CUDA_ARCH__)
  return exp2f(x);
#else
  x = x < least ? least : x;
  const float shifted = x + 12583039.f;  // 1.5 * 2^23 + 127: the biased exponent of 2^x lands in the low bits
  const float r = x - (shifted - 12583039.f);
  float p = 1.326472731e-3f;  // minimax of 2^r on [-1/2, 1/2] among polynomials with p(0) = 1
  p = p * r + 9.671512991e-3f;
  p = p * r + 5.550733581e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits <<= 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
#endif
}

constexpr float kLog2E = 1.44269504f;

RADDPO_HD float fast_exp(float x, float least = -126.f) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  return fast_exp2(x * kLog2E, least);
#endif
}

RADDPO_HD double fast_exp(double x) { return exp(x); }

// x, or 0 unless `keep`. On the CPU without a branch: the compiler would follow both of its ways through what comes
// after, and a vectorised loop would compute both.
RADDPO_HD double zero_unless(bool keep, double x) {
#if defined(__CUDA_ARCH__)
  return keep ? x : 0.;
#else
  std::uint64_t bits;
  std::memcpy(&bits, &x, 8);
  bits &= -static_cast<std::uint64_t>(keep);
  std::memcpy(&x, &bits, 8);
  return x;
#endif
}

// e^x = scale * (1 + rest), for |x| <= 700.
struct SplitExp {
  double scale, rest;
};
RADDPO_HD SplitExp split_exp(double x) {
  const double shifted = x * 1.4426950408889634 + 6755399441056767.;  // 1.5 * 2^52 + 1023, as in fast_exp2
  const double n = shifted - 6755399441056767.;
  const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;  // log(2) in two parts
  double p = 1. / 6227020800;                                              // Taylor's of (e^r - 1) / r
  p = p * r + 1. / 479001600;
  p = p * r + 1. / 39916800;
  p = p * r + 1. / 3628800;
  p = p * r + 1. / 362880;
  p = p * r + 1. / 40320;
  p = p * r + 1. / 5040;
  p = p * r + 1. / 720;
  p = p * r + 1. / 120;
  p = p * r + 1. / 24;
  p = p * r + 1. / 6;
  p = p * r + 1. / 2;
  p = p * r + 1.;
  std::uint64_t bits;
  std::memcpy(&bits, &shifted, 8);
  bits <<= 52;
  double scale;
  std::memcpy(&scale, &bits, 8);
  return {scale, p * r};
}

// e^x and e^x - 1 for |x| <= 700, to 4e-16 relative; loops of them are vectorised. NaN stays NaN.
RADDPO_HD double bounded_exp(double x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  const SplitExp e = split_exp(x);
  return e.scale + e.scale * e.rest;
#endif
}
RADDPO_HD double bounded_expm1(double x) {
#if defined(__CUDA_ARCH__)
  return expm1(x);
#else
  const SplitExp e = split_exp(x);
  return (e.scale - 1.) + e.scale * e.rest;
#endif
}

// To 3e-7 relative; +-1 for infinities, NaN for NaN.
RADDPO_HD float fast_tanh(float x) {
#if defined(__CUDA_ARCH__)
  return tanhf(x);
#else
  const float size = x < 0.f ? -x : x, square = x * x;
  float p = 2.18694885e-2f;  // Taylor's, where 1 - 2 / (e^2x + 1) would cancel
  p = p * -square + 5.39682540e-2f;
  p = p * -square + 1.33333333e-1f;
  p = p * -square + 3.33333333e-1f;
  const float small = x - x * square * p;
  const float large = 1.f - 2.f / (fast_exp2(2.f * kLog2E * (size < 20.f ? size : 20.f)) + 1.f);
  const float value = size < 0.3f ? small : x < 0.f ? -large : large;
  return x == x ? value : x;
#endif
}
RADDPO_HD double fast_tanh(double x) { return tanh(x); }

// A log-sum-exp in progress: log(sum) + max.
struct LogSumExp {
  float max, sum;
};

RADDPO_HD LogSumExp merge(LogSumExp a, LogSumExp b) {
  const float m = a.max > b.max ? a.max : b.max;
  if (m == -INFINITY) return {m, a.sum + b.sum};  // nothing yet, or NaN
  return {m, a.sum * fast_exp(a.max - m) + b.sum * fast_exp(b.max - m)};
}

RADDPO_HD int popcount(std::uint64_t x) {
#if defined(__CUDA_ARCH__)
  return __popcll(x);
#else
  return __builtin_popcountll(x);
#endif
}

RADDPO_HD int count_trailing_zeros(std::uint64_t x) {  // x != 0
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(x)) - 1;
#else
  return __builtin_ctzll(x);
#endif
}

// Position of the set bit number k of x, counted from the lowest; x has more than k set bits.
RADDPO_HD int select_bit(std::uint64_t x, int k) {
  int position = 0;
  for (int half = 32; half; half >>= 1) {
    const int low = popcount(x & ((std::uint64_t(1) << half) - 1));
    if (k >= low) {
      k -= low;
      x >>= half;
      position += half;
    }
  }
  return position;
}

}  // namespace raddpo
