// row_lse for torch: checks, threads and streams.
#include "row_lse.h"

#include "../common/isa.h"
#include "../common/tensor.h"

namespace raddpo {
namespace {

RowLseArgs prepare(const Tensor& logits, const Tensor& out) {
  check_device("row_lse", {{"logits", logits}, {"out", out}});
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(),
                  "row_lse: logits must be contiguous, of shape (rows, cols)");
  check_tensor("row_lse", "out", out, ScalarType::Float, logits.size(0));
  return {logits.const_data_ptr(), logit_type_of(logits, "row_lse"), logits.size(0), logits.size(1),
          out.mutable_data_ptr<float>()};
}

void row_lse_cpu(const Tensor& logits, const Tensor& out) {
  const RowLseArgs a = prepare(logits, out);
  parallel_for(a.rows, 1 + 32768 / (a.cols + 1),
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(row_lse, a, begin, end); });
}

#ifdef RADDPO_WITH_CUDA
void row_lse_cuda(const Tensor& logits, const Tensor& out) {
  const RowLseArgs a = prepare(logits, out);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(cuda::row_lse(a, current_cuda_stream(logits.get_device_index())), "row_lse");
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) { m.impl("row_lse", TORCH_BOX(&row_lse_cpu)); }
#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) { m.impl("row_lse", TORCH_BOX(&row_lse_cuda)); }
#endif

}  // namespace raddpo
