#pragma once
// What every op's torch side needs: tensors, devices, threads. Includes torch; kernels never do.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "logit_type.h"
#ifdef RADDPO_WITH_CUDA
#include "cuda_stream.h"
#endif

namespace raddpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline LogitType logit_type_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return LogitType::float32;
    case ScalarType::BFloat16:
      return LogitType::bfloat16;
    case ScalarType::Half:
      return LogitType::float16;
    default:
      STD_TORCH_CHECK(false, op, ": logits must be float32, bfloat16 or float16");
  }
}

// Runs body(begin, end) over [0, size) on torch's threads; pieces of at least `grain`.
template <typename Body>
void parallel_for(std::int64_t size, std::int64_t grain, const Body& body) {
  if (size <= grain)
    body(std::int64_t(0), size);
  else
    torch::stable::parallel_for(0, size, grain, body);
}

#ifdef RADDPO_WITH_CUDA
inline void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, " at the kernel's launch");
}
#endif

}  // namespace raddpo
