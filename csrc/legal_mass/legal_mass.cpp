// legal_mass for torch: checks, allocation, threads and streams.
#include "legal_mass.h"

#include <tuple>

#include "../common/huge_pages.h"
#include "../common/isa.h"
#include "../common/tensor.h"

namespace raddpo {
namespace {

ScalarType result_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

LegalMassArgs prepare(const Tensor& logits, const Tensor& columns, const Tensor& begin, const Tensor& count) {
  check_device("legal_mass", {{"logits", logits}, {"columns", columns}, {"begin", begin}, {"count", count}});
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(),
                  "legal_mass: logits must be contiguous, of shape (rows, cols)");
  LegalMassArgs a{};
  a.logits = logits.const_data_ptr();
  a.type = logits.scalar_type() == ScalarType::Double && logits.is_cpu() ? LogitType::float64
                                                                         : logit_type_of(logits, "legal_mass");
  a.rows = logits.size(0);
  a.cols = logits.size(1);
  check_tensor("legal_mass", "columns", columns, ScalarType::Int, columns.numel());
  a.columns = columns.const_data_ptr<std::int32_t>();
  a.begin = data_of<std::int64_t>("legal_mass", "begin", begin, a.rows);
  a.count = data_of<std::int64_t>("legal_mass", "count", count, a.rows);
  if (!logits.is_cpu()) return a;
  for (std::int64_t row = 0; row < a.rows; ++row) {
    const std::int64_t first = a.begin[row], size = a.count[row];
    STD_TORCH_CHECK(first >= 0 && size >= 0 && size <= columns.numel() - first,
                    "legal_mass: begin and count must lie within columns");
    STD_TORCH_CHECK(!size || (a.columns[first] >= 0 && a.columns[first + size - 1] < a.cols),
                    "legal_mass: columns must lie within the columns of logits");
  }
  return a;
}

std::int64_t rows_per_piece(const LegalMassArgs& a) { return 1 + 32768 / (a.cols + 1); }

void run(const LegalMassArgs& a, const Tensor& logits) {
#ifdef RADDPO_WITH_CUDA
  if (logits.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
    CUstream_st* const stream = current_cuda_stream(logits.get_device_index());
    check_launch(a.grad ? cuda::legal_mass_backward(a, stream) : cuda::legal_mass(a, stream), "legal_mass");
    return;
  }
#endif
  parallel_for(a.rows, rows_per_piece(a), [&](std::int64_t begin, std::int64_t end) {
    if (a.grad)
      RADDPO_CALL_ISA(legal_mass_backward, a, begin, end);
    else
      RADDPO_CALL_ISA(legal_mass, a, begin, end);
  });
}

std::tuple<Tensor, Tensor> legal_mass(const Tensor& logits, const Tensor& columns, const Tensor& begin,
                                      const Tensor& count) {
  LegalMassArgs a = prepare(logits, columns, begin, count);
  Tensor mass = new_empty(logits, {a.rows}, result_type(logits));
  Tensor lse = new_empty(logits, {2, a.rows}, ScalarType::Double);
  a.mass = mass.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr<double>();
  run(a, logits);
  return {mass, lse};
}

Tensor legal_mass_backward(const Tensor& grad, const Tensor& logits, const Tensor& lse, const Tensor& columns,
                           const Tensor& begin, const Tensor& count) {
  check_device("legal_mass_backward", {{"logits", logits}, {"grad", grad}, {"lse", lse}});
  LegalMassArgs a = prepare(logits, columns, begin, count);
  check_tensor("legal_mass", "grad", grad, result_type(logits), a.rows);
  check_tensor("legal_mass", "lse", lse, ScalarType::Double, 2 * a.rows);
  Tensor out = new_empty(logits, {a.rows, a.cols}, logits.scalar_type());
  if (!a.rows) return out;  // without rows there is no address of `grad`
  a.grad = grad.const_data_ptr();
  a.lse = const_cast<double*>(lse.const_data_ptr<double>());
  a.grad_logits = out.mutable_data_ptr();
  if (logits.is_cpu()) advise_huge_pages(a.grad_logits, out.numel() * out.element_size());
  run(a, logits);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) {
  m.impl("legal_mass", TORCH_BOX(&legal_mass));
  m.impl("legal_mass_backward", TORCH_BOX(&legal_mass_backward));
}
#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) {
  m.impl("legal_mass", TORCH_BOX(&legal_mass));
  m.impl("legal_mass_backward", TORCH_BOX(&legal_mass_backward));
}
#endif

}  // namespace raddpo
