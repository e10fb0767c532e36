#pragma once
// What the operators over sessions need on torch's side, beside tensor.h.
#include <algorithm>

#include "sessions.h"
#include "tensor.h"

namespace raddpo {

inline Sessions sessions_of(const char* op, std::int64_t candidates, const Tensor& lengths, const Tensor& offsets,
                            const Tensor& num_positives) {
  const std::int64_t sessions = num_positives.numel();
  return {data_of<std::int64_t>(op, "lengths", lengths, candidates),
          data_of<std::int64_t>(op, "offsets", offsets, sessions + 1),
          data_of<std::int64_t>(op, "num_positives", num_positives, sessions), sessions, candidates};
}

// Sessions per piece of work: `elements` of them all, so that a piece of `least` takes longer than waking a thread.
inline std::int64_t grain_of(const Sessions& b, std::int64_t elements, std::int64_t least) {
  return 1 + least * b.sessions / (elements + 1);
}

// The candidates of the largest of the sessions [begin, end).
inline std::int64_t most_candidates(const Sessions& b, std::int64_t begin, std::int64_t end) {
  std::int64_t most = 0;
  for (std::int64_t s = begin; s < end; ++s) most = std::max(most, b.offsets[s + 1] - b.offsets[s]);
  return std::min(most, b.candidates);
}

// The gradient of a loss: one element, or one per session at this stride.
template <typename T>
struct LossGradient {
  const T* data;
  std::int64_t stride;
};

template <typename T>
LossGradient<T> loss_gradient(const char* op, const char* name, const Tensor& given, const Sessions& b) {
  STD_TORCH_CHECK(given.scalar_type() == type_of<T>() && (!given.dim() || given.numel() == b.sessions), op, ": ", name,
                  " must be of the type of logps and have one element, or one per session");
  return {given.const_data_ptr<T>(), given.dim() ? given.stride(0) : 0};
}

}  // namespace raddpo
