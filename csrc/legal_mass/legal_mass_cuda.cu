// One block per row, forward and backward. Forward reads the row once and its list again, backward reads and writes the
// row once and corrects the list.
#include "../common/log_sum_exp.cuh"
#include "../common/rounded_lse.h"
#include "legal_mass.h"

namespace raddpo::cuda {
namespace {

constexpr int kMassThreads = 256, kMassWarps = kMassThreads / 32;

__device__ __forceinline__ double block_value(LogSumExp mine, LogSumExp* scratch) {
  mine = warp_merge(mine);
  __syncthreads();  // earlier uses of the scratch memory are complete
  if (lane_id() == 0) scratch[warp_id()] = mine;
  __syncthreads();
  LogSumExp all = scratch[0];
  for (int w = 1; w < kMassWarps; ++w) all = merge(all, scratch[w]);
  return static_cast<double>(all.max) + logf(all.sum);
}

template <typename D>
__global__ void __launch_bounds__(kMassThreads) legal_mass_kernel(const LegalMassArgs a) {
  __shared__ LogSumExp scratch[kMassWarps];
  const std::int64_t row = blockIdx.x;
  const auto* x = static_cast<const typename D::T*>(a.logits) + row * a.cols;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int32_t* columns = a.columns + a.begin[row];
  const double all = block_value(share_of_range<D>(x, a.cols, thread, kMassThreads), scratch);
  const double listed = block_value(share_of_tokens<D>(x, 0, static_cast<unsigned>(a.count[row]), thread, kMassThreads,
                                                       [&](unsigned i) { return columns[i]; }),
                                    scratch);
  if (thread > 0) return;
  const double mass = listed == -INFINITY && all == all ? listed : listed - all;
  static_cast<float*>(a.mass)[row] = mass > 0 ? 0.f : static_cast<float>(mass);
  a.lse[row] = all;
  a.lse[a.rows + row] = listed;
}

template <typename D>
__global__ void __launch_bounds__(kMassThreads) legal_mass_backward_kernel(const LegalMassArgs a) {
  const std::int64_t row = blockIdx.x;
  const auto* x = static_cast<const typename D::T*>(a.logits) + row * a.cols;
  auto* y = static_cast<typename D::T*>(a.grad_logits) + row * a.cols;
  const float g = static_cast<const float*>(a.grad)[row];
  const RoundedLse<float> all(a.lse[row]), listed(a.lse[a.rows + row]);
  const bool none = g == 0 || listed.value == -INFINITY;
  for (std::int64_t j = threadIdx.x; j < a.cols; j += kMassThreads)
    D::store(y + j, none ? 0.f : -g * all.factor * expf(load_logit<D>(x + j) - all.value));
  if (none) return;
  __syncthreads();  // the whole row is written
  for (std::int64_t i = threadIdx.x; i < a.count[row]; i += kMassThreads) {
    const std::int32_t column = a.columns[a.begin[row] + i];
    const float z = load_logit<D>(x + column);
    D::store(y + column, g * (listed.factor * expf(z - listed.value) - all.factor * expf(z - all.value)));
  }
}

template <typename D>
int run(const LegalMassArgs& a, CUstream_st* stream) {
  return a.grad ? launch(legal_mass_backward_kernel<D>, a.rows, kMassThreads, stream, a)
                : launch(legal_mass_kernel<D>, a.rows, kMassThreads, stream, a);
}

int dispatch(const LegalMassArgs& a, CUstream_st* stream) {
  if (!a.rows) return cudaSuccess;
  if (a.type == LogitType::float32) return run<Float32>(a, stream);
  if (a.type == LogitType::bfloat16) return run<BFloat16>(a, stream);
  return run<Float16>(a, stream);
}

}  // namespace

int legal_mass(const LegalMassArgs& a, CUstream_st* stream) { return dispatch(a, stream); }
int legal_mass_backward(const LegalMassArgs& a, CUstream_st* stream) { return dispatch(a, stream); }

}  // namespace raddpo::cuda
