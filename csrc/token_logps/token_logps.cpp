// token_logps for torch: checks, allocation, threads and streams.
#include "token_logps.h"

#include <cmath>

#include "../common/huge_pages.h"
#include "../common/isa.h"
#include "../common/tensor.h"

namespace raddpo {
namespace {

// The arguments that forward and backward have in common.
struct Call {
  const Tensor& logits;
  const Tensor& targets;
  const OptionalTensor &columns, &begin, &count;
  double scale, softcap;
  std::int64_t ignore_index, first_column, vocab_size;
};

ScalarType result_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_vector(const Tensor& t, ScalarType type, std::int64_t rows, const char* argument) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == rows, "token_logps: ", argument,
                  " must be contiguous, of the documented type, with one entry per row");
}

RowStrides row_strides(const Tensor& t) {
  const std::int64_t dims = t.dim();
  STD_TORCH_CHECK((dims == 2 || dims == 3) && (t.size(dims - 1) <= 1 || t.stride(dims - 1) == 1),
                  "token_logps: logits must have shape (rows, cols) or (outer, inner, cols), the last contiguous");
  return {dims == 3 ? t.stride(0) : 0, t.stride(dims - 2)};
}

// A tensor with one value per row.
Tensor new_rows(const Tensor& logits, ScalarType type) {
  if (logits.dim() == 2) return new_empty(logits, {logits.size(0)}, type);
  return new_empty(logits, {logits.size(0), logits.size(1)}, type);
}

void check_columns_cpu(const TokenLogpsArgs& a, std::int64_t listed) {
  for (std::int64_t row = 0; row < a.rows; ++row) {
    const std::int64_t begin = a.begin[row], count = a.count[row];
    STD_TORCH_CHECK(begin >= 0 && count >= 0 && begin + count <= listed,
                    "token_logps: begin and count must lie within columns");
    STD_TORCH_CHECK(!count || (a.columns[begin] >= 0 && a.columns[begin + count - 1] < a.cols),
                    "token_logps: columns must lie within the columns of logits");
  }
}

TokenLogpsArgs prepare(const Call& c) {
  check_device(
      "token_logps",
      {{"logits", c.logits}, {"targets", c.targets}, {"columns", c.columns}, {"begin", c.begin}, {"count", c.count}});
  TokenLogpsArgs a{};
  a.strides = row_strides(c.logits);
  a.logits = c.logits.const_data_ptr();
  a.type = c.logits.scalar_type() == ScalarType::Double ? LogitType::float64 : logit_type_of(c.logits, "token_logps");
  const std::int64_t dims = c.logits.dim();
  a.inner = c.logits.size(dims - 2);
  a.rows = dims == 3 ? c.logits.size(0) * a.inner : a.inner;
  a.cols = c.logits.size(dims - 1);
  a.first_column = c.first_column;
  a.vocab_size = c.vocab_size;
  check_vector(c.targets, ScalarType::Long, a.rows, "targets");
  a.targets = c.targets.const_data_ptr<std::int64_t>();
  a.ignore_index = c.ignore_index;
  if (c.columns) {
    STD_TORCH_CHECK(c.begin && c.count && c.columns->scalar_type() == ScalarType::Int && c.columns->is_contiguous(),
                    "token_logps: columns must be contiguous int32, with begin and count");
    check_vector(*c.begin, ScalarType::Long, a.rows, "begin");
    check_vector(*c.count, ScalarType::Long, a.rows, "count");
    a.columns = c.columns->const_data_ptr<std::int32_t>();
    a.begin = c.begin->const_data_ptr<std::int64_t>();
    a.count = c.count->const_data_ptr<std::int64_t>();
    if (c.logits.is_cpu()) check_columns_cpu(a, c.columns->numel());
  }
  a.scale = c.scale;
  a.softcap = c.softcap;
  return a;
}

void set_grad(TokenLogpsArgs& a, const Call& c, const Tensor& grad, const Tensor& lse) {
  check_device("token_logps_backward", {{"logits", c.logits}, {"grad", grad}, {"lse", lse}});
  check_vector(grad, result_type(c.logits), a.rows, "grad");
  check_vector(lse, ScalarType::Double, a.rows, "lse");
  a.grad = grad.const_data_ptr();
  a.lse = const_cast<double*>(lse.const_data_ptr<double>());
}

std::int64_t rows_per_piece(const TokenLogpsArgs& a) { return 1 + 32768 / (a.cols + 1); }

void forward_cpu(const TokenLogpsArgs& a, const Tensor&) {
  for (std::int64_t row = 0; row < a.rows; ++row)
    STD_TORCH_CHECK(a.targets[row] == a.ignore_index || (a.targets[row] >= 0 && a.targets[row] < a.vocab_size),
                    "token_logps: targets hold ", a.targets[row], ", outside [0, ", a.vocab_size, ")");
  parallel_for(a.rows, rows_per_piece(a),
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(token_logps, a, begin, end); });
}

void backward_cpu(const TokenLogpsArgs& a, const Tensor&) {
  if (a.live)
    parallel_for(a.cols, 8192, [&](std::int64_t begin, std::int64_t end) {
      RADDPO_CALL_ISA(token_logps_backward_live, a, begin, end);
    });
  else
    parallel_for(a.rows, rows_per_piece(a),
                 [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(token_logps_backward, a, begin, end); });
}

#ifdef RADDPO_WITH_CUDA
void forward_cuda(const TokenLogpsArgs& a, const Tensor& logits) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(cuda::token_logps(a, current_cuda_stream(logits.get_device_index())), "token_logps");
}

void backward_cuda(const TokenLogpsArgs& a, const Tensor& logits) {
  STD_TORCH_CHECK(!a.live, "token_logps_backward_: live is supported on the CPU only");
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  check_launch(cuda::token_logps_backward(a, current_cuda_stream(logits.get_device_index())), "token_logps_backward");
}
#endif

using Run = void (*)(const TokenLogpsArgs&, const Tensor&);

template <Run run>
std::tuple<Tensor, Tensor> token_logps_op(const Tensor& logits, const Tensor& targets, const OptionalTensor& columns,
                                          const OptionalTensor& begin, const OptionalTensor& count, double scale,
                                          double softcap, std::int64_t ignore_index, std::int64_t first_column,
                                          std::int64_t vocab_size) {
  TokenLogpsArgs a =
      prepare({logits, targets, columns, begin, count, scale, softcap, ignore_index, first_column, vocab_size});
  Tensor logps = new_rows(logits, result_type(logits)), lse = new_rows(logits, ScalarType::Double);
  a.logps = logps.mutable_data_ptr();
  a.lse = lse.mutable_data_ptr<double>();
  run(a, logits);
  return {logps, lse};
}

template <Run run>
Tensor backward_op(const Tensor& grad, const Tensor& logits, const Tensor& targets, const Tensor& lse,
                   const OptionalTensor& columns, const OptionalTensor& begin, const OptionalTensor& count,
                   double scale, double softcap, std::int64_t ignore_index, std::int64_t first_column,
                   std::int64_t vocab_size) {
  const Call c{logits, targets, columns, begin, count, scale, softcap, ignore_index, first_column, vocab_size};
  TokenLogpsArgs a = prepare(c);
  set_grad(a, c, grad, lse);
  Tensor out = logits.dim() == 2 ? new_empty(logits, {a.rows, a.cols}, logits.scalar_type())
                                 : new_empty(logits, {logits.size(0), a.inner, a.cols}, logits.scalar_type());
  a.grad_logits = out.mutable_data_ptr();
  a.grad_strides = row_strides(out);
  if (logits.is_cpu()) advise_huge_pages(a.grad_logits, out.numel() * out.element_size());
  run(a, logits);
  return out;
}

template <Run run>
void backward_inplace_op(const Tensor& grad, Tensor logits, const Tensor& targets, const Tensor& lse,
                         const OptionalTensor& columns, const OptionalTensor& begin, const OptionalTensor& count,
                         const OptionalTensor& live, double scale, double softcap, std::int64_t ignore_index,
                         std::int64_t first_column, std::int64_t vocab_size) {
  const Call c{logits, targets, columns, begin, count, scale, softcap, ignore_index, first_column, vocab_size};
  TokenLogpsArgs a = prepare(c);
  set_grad(a, c, grad, lse);
  a.grad_logits = logits.mutable_data_ptr();
  a.grad_strides = a.strides;
  if (live) {
    check_device("token_logps_backward_", {{"logits", logits}, {"live", live}});
    STD_TORCH_CHECK(logits.dim() == 2 && !columns && logits.is_cpu(),
                    "token_logps_backward_: live requires [rows, cols] logits on the CPU and no columns");
    check_vector(*live, ScalarType::Long, live->numel(), "live");
    a.live = live->const_data_ptr<std::int64_t>();
    a.num_live = live->numel();
    for (std::int64_t k = 0; k < a.num_live; ++k)
      STD_TORCH_CHECK(a.live[k] < a.rows && a.live[k] > (k ? a.live[k - 1] : -1),
                      "token_logps_backward_: live must be increasing rows of logits");
  }
  run(a, logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) {
  m.impl("token_logps", TORCH_BOX(&token_logps_op<forward_cpu>));
  m.impl("token_logps_backward", TORCH_BOX(&backward_op<backward_cpu>));
  m.impl("token_logps_backward_", TORCH_BOX(&backward_inplace_op<backward_cpu>));
}

#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) {
  m.impl("token_logps", TORCH_BOX(&token_logps_op<forward_cuda>));
  m.impl("token_logps_backward", TORCH_BOX(&backward_op<backward_cuda>));
  m.impl("token_logps_backward_", TORCH_BOX(&backward_inplace_op<backward_cuda>));
}
#endif

}  // namespace raddpo
