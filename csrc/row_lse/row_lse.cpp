// row_lse for torch: checks, allocation, threads and streams.
#include "row_lse.h"

#include "../common/isa.h"
#include "../common/tensor.h"

namespace raddpo {
namespace {

struct Call {
  Tensor out;
  RowLseArgs args;
};

Call prepare(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(),
                  "row_lse: logits must be contiguous, of shape (rows, cols)");
  Tensor out = new_empty(logits, {logits.size(0)}, ScalarType::Float);
  return {out,
          {logits.const_data_ptr(), logit_type_of(logits, "row_lse"), logits.size(0), logits.size(1),
           out.mutable_data_ptr<float>()}};
}

Tensor row_lse_cpu(const Tensor& logits) {
  const Call c = prepare(logits);
  parallel_for(c.args.rows, 1 + 32768 / (c.args.cols + 1),
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(row_lse, c.args, begin, end); });
  return c.out;
}

#ifdef RADDPO_WITH_CUDA
Tensor row_lse_cuda(const Tensor& logits) {
  const Call c = prepare(logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(cuda::row_lse(c.args, current_cuda_stream(logits.get_device_index())), "row_lse");
  return c.out;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) { m.impl("row_lse", TORCH_BOX(&row_lse_cpu)); }
#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) { m.impl("row_lse", TORCH_BOX(&row_lse_cuda)); }
#endif

}  // namespace raddpo
