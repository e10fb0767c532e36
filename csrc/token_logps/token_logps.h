#pragma once
// Kernel interface of token_logps: target log-probs from logits, and the gradient of the logits.
//
// A row's support is all its columns, or columns[begin[row] .. begin[row] + count[row]), token ids in ascending order.
// `logits` may be columns first_column .. first_column + cols of a wider row, whose other columns another call handles.
// A target among the other columns has log-prob -inf here; its row's gradient consists of the softmax alone.
#include <cstdint>

#include "../common/logit_type.h"

struct CUstream_st;

namespace raddpo {

// Row r of a tensor [outer, inner, cols] begins at (r / inner) * outer_stride + (r % inner) * inner_stride.
struct RowStrides {
  std::int64_t outer, inner;
};

struct TokenLogpsArgs {
  const void* logits;
  LogitType type;
  std::int64_t rows, inner, cols;
  RowStrides strides;
  std::int64_t first_column, vocab_size;
  const std::int64_t* targets;  // [rows], column numbers of the wider row
  std::int64_t ignore_index;
  const std::int32_t* columns;        // null: every column
  const std::int64_t *begin, *count;  // [rows]
  double scale, softcap;              // a logit x becomes softcap * tanh(x / softcap) * scale; softcap 0: x * scale
  void* logps;                        // [rows] float, or double for double logits; written forward
  double* lse;                        // [rows]; written forward, read backward
  const void* grad;                   // [rows] of that type
  void* grad_logits;                  // may be the logits themselves
  RowStrides grad_strides;
  // Null, or the rows of [rows, cols] that need a gradient, ascending: the gradient of row live[k] is written to row k.
  const std::int64_t* live;
  std::int64_t num_live;
};

#define RADDPO_DECLARE(isa)                                                                              \
  namespace isa {                                                                                        \
  void token_logps(const TokenLogpsArgs& a, std::int64_t row_begin, std::int64_t row_end);               \
  void token_logps_backward(const TokenLogpsArgs& a, std::int64_t row_begin, std::int64_t row_end);      \
  void token_logps_backward_live(const TokenLogpsArgs& a, std::int64_t col_begin, std::int64_t col_end); \
  }
RADDPO_DECLARE(scalar)
RADDPO_DECLARE(avx2)
RADDPO_DECLARE(avx512)
#undef RADDPO_DECLARE

namespace cuda {
int token_logps(const TokenLogpsArgs& a, CUstream_st* stream);  // returns cudaError_t
int token_logps_backward(const TokenLogpsArgs& a, CUstream_st* stream);
}  // namespace cuda

}  // namespace raddpo
