#pragma once
// The CPU's instruction set, chosen at run time.
namespace raddpo {

enum class Isa : int { scalar, avx2, avx512 };

// The best this CPU supports, lowered by the environment variable RADDPO_ISA or by set_isa.
Isa current_isa();
Isa best_isa();
const char* name(Isa isa);
void set_isa(Isa isa);  // at most best_isa(); for tests

}  // namespace raddpo

// Calls the variant of a kernel that was compiled for the current instruction set.
#define RADDPO_CALL_ISA(fn, ...)                                                        \
  (::raddpo::current_isa() == ::raddpo::Isa::avx512 ? ::raddpo::avx512::fn(__VA_ARGS__) \
   : ::raddpo::current_isa() == ::raddpo::Isa::avx2 ? ::raddpo::avx2::fn(__VA_ARGS__)   \
                                                    : ::raddpo::scalar::fn(__VA_ARGS__))
