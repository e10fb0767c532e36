#pragma once
// What PTX instructions do, for the C++ that ptx.py writes. A register is an unsigned integer of its width; operands
// are taken out of it as the instruction's type and results put back, extended as that type is. Approximate
// instructions are rounded to nearest, which is within their allowed error, but for rcp.approx.ftz.f64, whose low half
// is cut off as on the GPU. There is no memory model, and no fusing of mul and add by ptxas.
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../../../csrc/common/logit_type.h"
#include "cuda_runtime.h"

namespace cuda_on_cpu::ptx {

using pred = bool;
using b8 = std::uint8_t;
using b16 = std::uint16_t;
using b32 = std::uint32_t;
using b64 = std::uint64_t;
using u8 = b8;
using u16 = b16;
using u32 = b32;
using u64 = b64;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;
using f32 = float;
using f64 = double;
struct f16 {
  b16 bits;
};
struct bf16 {
  b16 bits;
};

// Stops this thread for good, which ends the launch with an error.
[[noreturn]] inline void fail(const char* what, int line) {
  leave(State::failed, what, line);
  std::abort();
}

template <typename To, typename From>
To as(From x) {
  static_assert(sizeof(To) <= sizeof(From));
  if constexpr (sizeof(To) == sizeof(From)) {
    return __builtin_bit_cast(To, x);
  } else {
    static_assert(std::is_integral_v<To>);
    return static_cast<To>(x);
  }
}
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 8, u64, std::conditional_t<sizeof(T) == 4, u32, u16>>;
template <typename T>
constexpr bool is_float = std::is_floating_point_v<T>;

inline s64 mul_wide(s32 a, s32 b) { return static_cast<s64>(a) * b; }
inline u64 mul_wide(u32 a, u32 b) { return static_cast<u64>(a) * b; }
template <typename T>
T div(T a, T b) {
  if (b == 0) return static_cast<T>(-1);  // not defined; the GPU does not stop
  return std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(0 - static_cast<Bits<T>>(a)) : a / b;
}
template <typename T>
T rem(T a, T b) {
  return b == 0 ? a : std::is_signed_v<T> && b == static_cast<T>(-1) ? T(0) : a % b;
}
template <typename T>
T min(T a, T b) {
  if constexpr (is_float<T>)
    return a == b ? (std::signbit(a) ? a : b) : std::fmin(a, b);
  else
    return a < b ? a : b;
}
template <typename T>
T max(T a, T b) {
  if constexpr (is_float<T>)
    return a == b ? (std::signbit(a) ? b : a) : std::fmax(a, b);
  else
    return a < b ? b : a;
}
template <typename T, typename Op>
T rounded(int mode, Op op) {
  const int before = std::fegetround();
  std::fesetround(mode);
  volatile T result = op();
  std::fesetround(before);
  return result;
}
template <typename T>
T fma_rm(T a, T b, T c) {
  volatile T x = a;  // else it might be worked out elsewhere
  return rounded<T>(FE_DOWNWARD, [&] { return std::fma(x, b, c); });
}
template <typename T>
T add_rz(T a, T b) {
  volatile T x = a;
  return rounded<T>(FE_TOWARDZERO, [&] { return x + b; });
}
template <typename T>
T flushed(T x) {
  return std::fabs(x) < std::numeric_limits<T>::min() ? std::copysign(T(0), x) : x;
}
inline f32 rcp_approx_ftz(f32 a) { return flushed(1 / flushed(a)); }
inline f64 rcp_approx_ftz(f64 a) {
  constexpr u64 kHigh = 0xffffffff00000000u;
  a = flushed(__builtin_bit_cast(f64, __builtin_bit_cast(u64, a) & kHigh));
  const f64 result = flushed(1 / a);
  return result == result ? __builtin_bit_cast(f64, __builtin_bit_cast(u64, result) & kHigh) : result;
}
inline f32 ex2_approx_ftz(f32 a) { return flushed(std::exp2(flushed(a))); }

// Bits
template <typename T>
T not_(T a) {
  if constexpr (std::is_same_v<T, pred>)
    return !a;
  else
    return static_cast<T>(~a);
}
template <typename T>
T shl(T a, u32 by) {
  return by < 8 * sizeof(T) ? static_cast<T>(a << by) : T(0);
}
template <typename T>
T shr(T a, u32 by) {
  const u32 last = 8 * sizeof(T) - 1;
  if (by > last) return std::is_signed_v<T> ? static_cast<T>(a >> last) : T(0);
  return static_cast<T>(a >> by);
}
inline u32 clz(b32 a) { return a ? __builtin_clz(a) : 32; }
inline u32 clz(b64 a) { return a ? __builtin_clzll(a) : 64; }
// The low `count` bits of a, put into b from bit `first` on.
template <typename T>
T bfi(T a, T b, u32 first, u32 count) {
  first &= 0xff;
  count &= 0xff;
  const T ones = count < 8 * sizeof(T) ? static_cast<T>((T(1) << count) - 1) : static_cast<T>(~T(0));
  return static_cast<T>((b & ~shl(ones, first)) | shl(static_cast<T>(a & ones), first));
}
template <typename T>
bool nan(T a, T b) {
  return a != a || b != b;
}

// Conversions
template <typename To, typename From>
To cvt(From a) {
  if constexpr (std::is_same_v<From, f16>)
    return raddpo::Float16::load(&a.bits);
  else
    return static_cast<To>(a);
}
template <typename To>
To cvt_rni(To a) {
  return std::rint(a);
}
template <typename To>
To cvt_sat(To a) {
  return a > 0 ? (a < 1 ? a : To(1)) : To(0);
}
template <typename Half>
b32 pair(f32 high, f32 low) {
  b16 bits[2];
  Half::store(&bits[0], low);
  Half::store(&bits[1], high);
  return bits[0] | static_cast<b32>(bits[1]) << 16;
}

// Memory: addresses are the CPU's, but in the shared space, where they count from the block's first byte.
inline char* aligned(char* at, std::size_t bytes, const char* what, int line) {
  if (reinterpret_cast<std::uintptr_t>(at) % bytes) fail(what, line);
  return at;
}
inline char* global(u64 address, std::size_t bytes, const char* what, int line) {
  return aligned(reinterpret_cast<char*>(address), bytes, what, line);
}
inline char* in_shared(u64 address, std::size_t bytes, const char* what, int line) {
  if (address > shared.size || bytes > shared.size - address) fail(what, line);
  return aligned(shared.begin + address, bytes, what, line);
}
template <typename T>
T load(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}
template <typename T>
void store(char* at, T value) {
  std::memcpy(at, &value, sizeof value);
}
template <typename T>
T atom_add(char* at, T value) {
  return atomicAdd(reinterpret_cast<T*>(at), value);
}
template <typename T>
T atom_cas(char* at, T expected, T value) {
  const T before = load<T>(at);  // no other fiber runs in between
  if (before == expected) store(at, value);
  return before;
}
inline u64 from_shared(u64 address) { return reinterpret_cast<u64>(shared.begin + address); }
inline u64 mapa(u64 address, u32 rank) {
  return reinterpret_cast<u64>(__cluster_map_shared_rank(reinterpret_cast<void*>(address), rank));
}

// The warp
enum class Shuffle { up, down, bfly, idx };

inline void expect_all_lanes(u32 mask, const char* what, int line) {
  if (mask != ~0u) fail(what, line);
}
// Sets `inside` to whether the lane read from is one that `limits` allows.
template <Shuffle kind>
b32 shfl(b32 value, u32 b, u32 limits, bool& inside, const char* what, int line) {
  const auto source = [=, &inside](unsigned lane) {
    const u32 by = b & 31, segment = limits >> 8 & 31, first = lane & segment;
    const u32 last = first | (limits & 31 & ~segment);
    const int from = kind == Shuffle::up     ? static_cast<int>(lane) - static_cast<int>(by)
                     : kind == Shuffle::down ? static_cast<int>(lane + by)
                     : kind == Shuffle::bfly ? static_cast<int>(lane ^ by)
                                             : static_cast<int>(first | (by & ~segment));
    inside = kind == Shuffle::up ? from >= static_cast<int>(last) : from <= static_cast<int>(last);
    return inside ? static_cast<unsigned>(from) : lane;
  };
  return exchange(value, source, what, line);
}

}  // namespace cuda_on_cpu::ptx
