#pragma once
// Reading logits on the GPU, and their log-sum-exp.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda_block.cuh"
#include "logit_type.h"

namespace raddpo::cuda {

constexpr int kLoads = 8;  // 16-byte loads that a thread has in flight

template <typename D>
constexpr int kPack = 16 / static_cast<int>(sizeof(typename D::T));  // logits in 16 bytes

template <typename D>
__device__ __forceinline__ float load_logit(const typename D::T* p) {
  return D::load(p);
}
template <>
__device__ __forceinline__ float load_logit<Float16>(const std::uint16_t* p) {
  return __half2float(__ushort_as_half(*p));
}

__device__ __forceinline__ unsigned word(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Logit number i of 16 bytes, and 16 bytes of -inf; i is known at compile time once loops are unrolled.
__device__ __forceinline__ float unpack(Float32, const uint4& v, int i) { return __uint_as_float(word(v, i)); }
__device__ __forceinline__ float unpack(BFloat16, const uint4& v, int i) {
  return __uint_as_float(i % 2 ? word(v, i / 2) & 0xffff0000u : word(v, i / 2) << 16);
}
__device__ __forceinline__ float unpack(Float16, const uint4& v, int i) {
  const unsigned pair = word(v, i / 2);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? pair >> 16 : pair & 0xffffu)));
}
__device__ __forceinline__ unsigned minus_infinity(Float32) { return 0xff800000u; }
__device__ __forceinline__ unsigned minus_infinity(BFloat16) { return 0xff80ff80u; }
__device__ __forceinline__ unsigned minus_infinity(Float16) { return 0xfc00fc00u; }

// fast_exp with results below 2^-126 flushed to 0, which saves two instructions.
__device__ __forceinline__ float exp_or_zero(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * kLog2E));
  return result;
#else
  return fast_exp(x) - 0x1p-126f;
#endif
}

// Moves s to a maximum that is at least its own, and returns by how much exponents are shifted: never inf - inf but for
// logits of +inf, whose NaN is wanted.
__device__ __forceinline__ float raise(LogSumExp& s, float most) {
  const float shift = most == -INFINITY ? 0.f : most;
  s.sum *= exp_or_zero(s.max - shift);
  s.max = most;
  return shift;
}

template <int n>
__device__ __forceinline__ void add(LogSumExp& s, const float (&x)[n]) {
  float most = s.max;
#pragma unroll
  for (int i = 0; i < n; ++i) most = fmaxf(most, x[i]);
  const float shift = raise(s, most);
#pragma unroll
  for (int i = 0; i < n; ++i) s.sum += exp_or_zero(x[i] - shift);
}

// Rounded before anything is subtracted: with a fused multiply-add, z - max(z) would be the rounding error of the
// maximum, which is in the millions for large logits.
__device__ __forceinline__ float rounded_product(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}
__device__ __forceinline__ double rounded_product(double x, double y) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

struct Identity {
  template <typename A>
  __device__ __forceinline__ A operator()(A x) const {
    return x;
  }
};

// This thread's share of the log-sum-exp of transform(x[0, n)), read by `threads` threads. Loads are coalesced and of
// 16 bytes, except for the few elements before the first and after the last multiple of 16 bytes.
template <typename D, typename Transform = Identity>
__device__ __forceinline__ LogSumExp share_of_range(const typename D::T* x, std::int64_t n, int thread, int threads,
                                                    const Transform& transform = {}) {
  LogSumExp s{-INFINITY, 0.f};
  const int past = static_cast<int>(reinterpret_cast<std::uintptr_t>(x) % 16 / sizeof(typename D::T));
  std::int64_t head = past ? kPack<D> - past : 0;
  if (head > n) head = n;
  const int packs = static_cast<int>((n - head) / kPack<D>);  // of rows below 2^33 logits
  const std::int64_t tail = head + static_cast<std::int64_t>(packs) * kPack<D> + thread;
  const float ends[2] = {thread < head ? transform(load_logit<D>(x + thread)) : -INFINITY,
                         tail < n ? transform(load_logit<D>(x + tail)) : -INFINITY};
  const auto* pack = reinterpret_cast<const uint4*>(x + head) + thread;
  for (int left = packs; left > 0; left -= kLoads * threads, pack += kLoads * threads) {
    const unsigned none = minus_infinity(D{});
    uint4 v[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      v[k] = k * threads + thread < left ? __ldg(pack + k * threads) : make_uint4(none, none, none, none);
    if constexpr (!std::is_base_of_v<Identity, Transform>) {
#pragma unroll
      for (int k = 0; k < kLoads; ++k)
        if (k * threads + thread < left) {
          float z[kPack<D>];
#pragma unroll
          for (int i = 0; i < kPack<D>; ++i) z[i] = transform(unpack(D{}, v[k], i));
          add(s, z);  // one maximum per pack, so that no value is transformed twice or kept
        }
      continue;
    }
    float most = s.max;
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      if (k * threads < left) {  // else no thread has a pack here
#pragma unroll
        for (int i = 0; i < kPack<D>; ++i) most = fmaxf(most, unpack(D{}, v[k], i));
      }
    const float shift = raise(s, most);
#pragma unroll
    for (int k = 0; k < kLoads; ++k)
      if (k * threads < left) {
#pragma unroll
        for (int i = 0; i < kPack<D>; ++i) s.sum += exp_or_zero(unpack(D{}, v[k], i) - shift);
      }
  }
  add(s, ends);
  return s;
}

// The same of the logits at token_at(i), i in [begin, end).
template <typename D, typename TokenAt, typename Transform = Identity>
__device__ __forceinline__ LogSumExp share_of_tokens(const typename D::T* row, unsigned begin, unsigned end, int thread,
                                                     int threads, TokenAt token_at, const Transform& transform = {}) {
  LogSumExp s{-INFINITY, 0.f};
  for (unsigned i = begin + thread; i < end; i += 4 * threads) {
    float x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      x[k] = i + k * threads < end ? transform(load_logit<D>(row + token_at(i + k * threads))) : -INFINITY;
    add(s, x);
  }
  return s;
}

// -inf for no logits or all -inf; NaN for a NaN or +inf among them.
__device__ __forceinline__ float value_of(LogSumExp s) { return s.max + logf(s.sum); }

}  // namespace raddpo::cuda
