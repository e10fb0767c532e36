#pragma once
// Kernel interface of row_lse, the log-sum-exp of each row: the floor under every op that reads logits once.
#include <cstdint>

#include "../common/logit_type.h"

struct CUstream_st;

namespace raddpo {

struct RowLseArgs {
  const void* logits;  // [rows, cols], contiguous
  LogitType logit_type;
  std::int64_t rows, cols;
  float* out;  // [rows]
};

namespace scalar {
void row_lse(const RowLseArgs& a, std::int64_t begin, std::int64_t end);
}
namespace avx2 {
void row_lse(const RowLseArgs& a, std::int64_t begin, std::int64_t end);
}
namespace avx512 {
void row_lse(const RowLseArgs& a, std::int64_t begin, std::int64_t end);
}
namespace cuda {
int row_lse(const RowLseArgs& a, CUstream_st* stream);  // returns cudaError_t
}

}  // namespace raddpo
