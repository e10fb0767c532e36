#pragma once
// Kernel interface of legal_mass: the log of the probability that a row's softmax gives to a list of columns, and the
// gradient of the logits.
#include <cstdint>

#include "../common/logit_type.h"

struct CUstream_st;

namespace raddpo {

struct LegalMassArgs {
  const void* logits;  // [rows, cols], contiguous
  LogitType type;
  std::int64_t rows, cols;
  const std::int32_t* columns;        // row r lists columns[begin[r] .. begin[r] + count[r]), ascending
  const std::int64_t *begin, *count;  // [rows]
  void* mass;                         // [rows] float, or double for double logits
  double* lse;                        // [2, rows]: of whole rows, of their lists; read backward
  const void* grad;                   // [rows] of the type of mass
  void* grad_logits;                  // [rows, cols]
};

#define RADDPO_DECLARE(isa)                                                               \
  namespace isa {                                                                         \
  void legal_mass(const LegalMassArgs& a, std::int64_t begin, std::int64_t end);          \
  void legal_mass_backward(const LegalMassArgs& a, std::int64_t begin, std::int64_t end); \
  }
RADDPO_DECLARE(scalar)
RADDPO_DECLARE(avx2)
RADDPO_DECLARE(avx512)
#undef RADDPO_DECLARE

namespace cuda {
int legal_mass(const LegalMassArgs& a, CUstream_st* stream);  // returns cudaError_t; not for double logits
int legal_mass_backward(const LegalMassArgs& a, CUstream_st* stream);
}  // namespace cuda

}  // namespace raddpo
