#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace raddpo {
namespace {

Isa lowered_by_environment() {
  const Isa best = best_isa();
  const char* cap = std::getenv("RADDPO_ISA");
  for (Isa lower : {Isa::scalar, Isa::avx2})
    if (cap && !std::strcmp(cap, name(lower)) && lower < best) return lower;
  return best;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{lowered_by_environment()};
  return isa;
}

}  // namespace

const char* name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "scalar"; }

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c") ||
      !__builtin_cpu_supports("popcnt") || !__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2"))
    return Isa::scalar;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  return Isa::avx2;
#else
  return Isa::scalar;
#endif
}

Isa current_isa() { return current().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { current().store(isa, std::memory_order_relaxed); }

}  // namespace raddpo
