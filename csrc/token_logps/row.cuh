#pragma once
// The transform of a row's logits, and the support of its softmax.
#include "../common/log_sum_exp.cuh"
#include "../common/rounded_lse.h"
#include "token_logps_math.h"

namespace raddpo::cuda {

// A transform takes a logit x to z; derivative(z) is dz / dx.
template <typename A>
struct Plain : Identity {
  __device__ __forceinline__ A derivative(A) const { return A(1); }
};

template <typename A>
struct Scaled {
  A scale;
  __device__ __forceinline__ A operator()(A x) const { return rounded_product(scale, x); }
  __device__ __forceinline__ A derivative(A) const { return scale; }
};

template <typename A>
struct Capped {
  A scale, bound, per_softcap, per_bound;  // bound = scale * softcap
  __device__ __forceinline__ A operator()(A x) const { return rounded_product(bound, fast_tanh(x * per_softcap)); }
  __device__ __forceinline__ A derivative(A z) const {
    const A t = z * per_bound;
    return scale * (A(1) - t * t);
  }
};

__device__ __forceinline__ double exp_or_zero(double x) { return fast_exp(x); }
__device__ __forceinline__ double unpack(Float64, const uint4& v, int i) {
  const std::uint64_t bits = static_cast<std::uint64_t>(word(v, 2 * i + 1)) << 32 | word(v, 2 * i);
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

// Packs results into 16 bytes; two-byte types are rounded to nearest, ties to even.
__device__ __forceinline__ uint4 pack(Float32, const float (&x)[4]) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
__device__ __forceinline__ uint4 pack(Float64, const double (&x)[2]) {
  std::uint64_t bits[2];
  std::memcpy(bits, x, 16);
  return make_uint4(static_cast<unsigned>(bits[0]), static_cast<unsigned>(bits[0] >> 32),
                    static_cast<unsigned>(bits[1]), static_cast<unsigned>(bits[1] >> 32));
}
template <typename D>
__device__ __forceinline__ unsigned pair(D, float low, float high) {
#if defined(__CUDA_ARCH__)
  unsigned both;
  if constexpr (std::is_same_v<D, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  typename D::T x, y;
  D::store(&x, low);
  D::store(&y, high);
  return x | static_cast<unsigned>(y) << 16;
#endif
}
template <typename D>
__device__ __forceinline__ uint4 pack(D, const float (&x)[8]) {
  return make_uint4(pair(D{}, x[0], x[1]), pair(D{}, x[2], x[3]), pair(D{}, x[4], x[5]), pair(D{}, x[6], x[7]));
}

// The first element of a row of logits, or of its gradient.
template <typename T>
__device__ __forceinline__ T* row_at(T* first, const RowStrides& s, std::int64_t inner, unsigned row) {
  const auto n = static_cast<unsigned>(inner);
  return first + (row / n * s.outer + row % n * s.inner);
}

// For each key, the place in the ascending list[0, count) of the first column that is at least the key. The whole warp
// searches together: each round leaves a 33rd of the range. The reads for all keys are in flight together.
template <int n>
__device__ __forceinline__ void warp_lower_bounds(const std::int32_t* list, int count, const std::int64_t (&keys)[n],
                                                  int (&places)[n]) {
  int high[n];
#pragma unroll
  for (int k = 0; k < n; ++k) {
    places[k] = 0;
    high[k] = count;
  }
  for (bool more = count > 0; more;) {
    std::int32_t probe[n];
    int step[n], at[n];
    more = false;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      step[k] = (high[k] - places[k] + 31) / 32;
      at[k] = high[k] - places[k] > lane_id() * step[k] ? places[k] + (lane_id() + 1) * step[k] - 1 : high[k];
      probe[k] = at[k] < high[k] ? list[at[k]] : 0x7fffffff;
    }
#pragma unroll
    for (int k = 0; k < n; ++k) {
      places[k] += step[k] * __popc(__ballot_sync(kAllLanes, at[k] < high[k] && probe[k] < keys[k]));
      if (places[k] + step[k] - 1 < high[k]) high[k] = places[k] + step[k] - 1;
      more |= places[k] < high[k];
    }
  }
}

// The columns that a row's softmax runs over: list[0, count) or, without a list, `count` columns from `first` on.
struct Support {
  std::int64_t target;  // a column, kIgnored, kOutside or kElsewhere
  const std::int32_t* list;
  std::int64_t first, count;

  __device__ __forceinline__ std::int64_t at(std::int64_t i) const { return list ? list[i] : first + i; }
  __device__ __forceinline__ bool counts() const { return target != kIgnored && target != kOutside; }
};

// Called by the whole warp. A list with columns beyond the logits counts as empty.
__device__ __forceinline__ Support support_of(const TokenLogpsArgs& a, unsigned row) {
  if (!a.columns) return {target_column(a, row), nullptr, 0, a.cols};
  const std::int64_t token = a.targets[row], column = token - a.first_column;
  const std::int64_t begin = a.begin[row], count = a.count[row];
  if (token == a.ignore_index) return {kIgnored, nullptr, 0, 0};
  Support s{kOutside, nullptr, 0, 0};
  if (token < 0 || token >= a.vocab_size || begin < 0 || count <= 0) return s;
  const std::int32_t* list = a.columns + begin;
  const std::int64_t first = list[0], last = list[count - 1];
  if (first < 0 || last >= a.cols || last - first < count - 1) return s;
  s.first = first;
  s.count = count;
  if (last - first == count - 1) {
    if (column >= first && column <= last) s.target = column;
    return s;
  }
  s.list = list;
  const std::int64_t keys[1] = {column};
  int places[1];
  warp_lower_bounds(list, static_cast<int>(count), keys, places);
  if (places[0] < count && list[places[0]] == column) s.target = column;
  return s;
}

}  // namespace raddpo::cuda
