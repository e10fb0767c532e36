#include "../common/log_sum_exp.cuh"
#include "row_lse.h"

namespace raddpo::cuda {
namespace {

constexpr int kMaxThreads = 1024;

// One block a row, of as many threads as have 16-byte loads to do; the row is read once, nothing else but its result is
// written.
template <typename D>
__global__ void __launch_bounds__(kMaxThreads) row_lse_kernel(const RowLseArgs a) {
  __shared__ LogSumExp sums[kMaxThreads / 32];
  const auto* row = static_cast<const typename D::T*>(a.logits) + blockIdx.x * a.cols;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const LogSumExp s = warp_merge(share_of_range<D>(row, a.cols, thread, threads));
  if (lane_id() == 0) sums[warp_id()] = s;
  __syncthreads();
  if (warp_id() > 0) return;
  const LogSumExp all = warp_merge(thread < threads / 32 ? sums[lane_id()] : LogSumExp{-INFINITY, 0.f});
  if (thread == 0) a.out[blockIdx.x] = value_of(all);
}

template <typename D>
int run(const RowLseArgs& a, CUstream_st* stream) {
  int threads = 128;
  while (threads < kMaxThreads && threads * kLoads * kPack<D> < a.cols) threads *= 2;
  return launch(row_lse_kernel<D>, a.rows, threads, stream, a);
}

}  // namespace

int row_lse(const RowLseArgs& a, CUstream_st* stream) {
  if (!a.rows) return cudaSuccess;
  if (a.logit_type == LogitType::float32) return run<Float32>(a, stream);
  if (a.logit_type == LogitType::bfloat16) return run<BFloat16>(a, stream);
  return run<Float16>(a, stream);
}

}  // namespace raddpo::cuda
