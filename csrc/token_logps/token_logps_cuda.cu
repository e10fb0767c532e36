// token_logps in one launch forward and one backward. Forward: one block reads a row once; where rows are few and long,
// a cluster of blocks does, and its first block merges the sums. Backward: each block reads and writes a piece of a
// row.
#include "row.cuh"

namespace raddpo::cuda {
namespace {

constexpr int kRowThreads = 256;           // maximum threads per block
constexpr int kMaxCluster = 8;             // blocks per cluster that every GPU with clusters supports
constexpr int kResident = 4;               // forward blocks per multiprocessor: 128 KB of loads in flight
constexpr int kPieceLoads = 4;             // 16-byte loads that a thread has in flight backward
constexpr std::int64_t kPieceFill = 2048;  // pieces grow, which saves start-up work, while at least this many remain
constexpr std::int64_t kFill = 512;        // forward blocks that fill a GPU
constexpr double kLargest = 3.4e38;

// Backward blocks per multiprocessor: 80 KB of loads in flight, besides the stores. Fewer where 48 registers per thread
// are not enough.
template <typename A, typename Transform, bool listed>
constexpr int kPieceBlocks = sizeof(A) == 8                                   ? 2
                             : listed || std::is_same_v<Transform, Capped<A>> ? 4
                                                                              : 5;

template <typename A>
__device__ __forceinline__ void write_row(const TokenLogpsArgs& a, unsigned row, A logp, double lse) {
  static_cast<A*>(a.logps)[row] = logp > A(0) ? A(0) : logp;
  a.lse[row] = lse;
}

// The threads of a cluster read consecutive 16 bytes in turn. A row whose target is ignored or outside its support is
// not read.
template <typename D, typename Transform>
__global__ void __launch_bounds__(kRowThreads, kResident)
    forward_kernel(const __grid_constant__ TokenLogpsArgs a, const Transform transform, int cluster) {
  __shared__ LogSumExp parts[kMaxCluster * kRowThreads / 32];
  const unsigned row = blockIdx.x / cluster;
  const int rank = static_cast<int>(blockIdx.x % cluster);
  if (!kHasClusters) {
    if (rank > 0) return;
    cluster = 1;
  }
  const Support s = support_of(a, row);
  const bool writes = rank == 0 && threadIdx.x == 0;
  if (!s.counts()) {
    if (writes) write_row(a, row, s.target == kIgnored ? 0.f : -INFINITY, 0.);
    return;
  }
  if (cluster > 1) cluster_arrive_relaxed();  // all blocks must have started before shared memory of another is written
  const auto* x = row_at(static_cast<const typename D::T*>(a.logits), a.strides, a.inner, row);
  const float target = writes && s.target >= 0 ? transform(load_logit<D>(x + s.target)) : -INFINITY;
  const int threads = static_cast<int>(blockDim.x), warps = threads / 32;
  const int thread = rank * threads + static_cast<int>(threadIdx.x);
  const LogSumExp sum =
      warp_merge(s.list ? share_of_tokens<D>(
                              x, 0, static_cast<unsigned>(s.count), thread, cluster * threads,
                              [&](unsigned i) { return s.list[i]; }, transform)
                        : share_of_range<D>(x + s.first, s.count, thread, cluster * threads, transform));
  if (cluster > 1) {
    cluster_wait();
    if (lane_id() == 0) shared_of(parts, 0)[rank * warps + warp_id()] = sum;
    cluster_arrive();
    if (rank > 0) return;
    cluster_wait();
  } else {
    if (lane_id() == 0) parts[warp_id()] = sum;
    __syncthreads();
  }
  if (warp_id() > 0) return;
  LogSumExp all{-INFINITY, 0.f};
  for (int i = lane_id(); i < cluster * warps; i += 32) all = merge(all, parts[i]);
  all = warp_merge(all);
  const double lse = static_cast<double>(all.max) + logf(all.sum);
  if (writes) write_row(a, row, s.target >= 0 && lse != -INFINITY ? target - all.max - logf(all.sum) : -INFINITY, lse);
}

// The forward pass for float64: one block per row and two reads. It is exact but not optimised.
template <typename Transform>
__global__ void __launch_bounds__(kRowThreads)
    forward_double_kernel(const __grid_constant__ TokenLogpsArgs a, const Transform transform) {
  __shared__ double scratch[kRowThreads / 32];
  const unsigned row = blockIdx.x;
  const Support s = support_of(a, row);
  if (!s.counts()) {
    if (threadIdx.x == 0) write_row(a, row, s.target == kIgnored ? 0. : -INFINITY, 0.);
    return;
  }
  const double* x = row_at(static_cast<const double*>(a.logits), a.strides, a.inner, row);
  double most = -INFINITY, sum = 0.;
  for (std::int64_t i = threadIdx.x; i < s.count; i += kRowThreads) most = fmax(most, transform(x[s.at(i)]));
  most = block_reduce<kRowThreads>(most, scratch, [](double one, double other) { return fmax(one, other); });
  const double shift = most == -INFINITY ? 0. : most;  // all -inf or NaN
  for (std::int64_t i = threadIdx.x; i < s.count; i += kRowThreads) sum += fast_exp(transform(x[s.at(i)]) - shift);
  sum = block_reduce<kRowThreads>(sum, scratch, [](double one, double other) { return one + other; });
  if (threadIdx.x > 0) return;
  const double lse = sum == 0. ? -INFINITY : shift + log(sum);
  write_row(a, row, s.target >= 0 && lse != -INFINITY ? transform(x[s.target]) - lse : -INFINITY, lse);
}

__device__ __forceinline__ int limit(std::int64_t x, int least, int most) {
  return x < least ? least : x > most ? most : static_cast<int>(x);
}

// y = g * (onehot - softmax). One thread reads and then writes each element, so y may be x. Elements outside the
// support become 0 and are not read. Loads and stores are coalesced and of 16 bytes, except for the few elements before
// the first and after the last multiple of 16 bytes of y; x may be aligned differently. The gradient of a list is
// assembled in shared memory before it is written.
template <typename D, typename Transform, bool listed>
__global__ void __launch_bounds__(kRowThreads, kPieceBlocks<typename D::A, Transform, listed>)
    backward_kernel(const __grid_constant__ TokenLogpsArgs a, const Transform transform, int piece_packs,
                    unsigned pieces) {
  using T = typename D::T;
  using A = typename D::A;
  constexpr int n = kPack<D>;
  const unsigned row = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const A g = static_cast<const A*>(a.grad)[row];
  const RoundedLse<A> lse(a.lse[row]);
  const Support s = support_of(a, row);
  const bool needs_grad = g != A(0) && lse.value != -INFINITY && s.counts();

  // This block's piece of the row: packs of 16 bytes. The first piece also has the row's head, the last piece its tail.
  // Elements [from, to) belong to the piece, numbered from its first pack.
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  T* y = row_at(static_cast<T*>(a.grad_logits), a.grad_strides, a.inner, row);
  const int past = static_cast<int>(reinterpret_cast<std::uintptr_t>(y) % 16 / sizeof(T));
  const int head = past ? limit(a.cols, 0, n - past) : 0;
  const std::int64_t begin = head + static_cast<std::int64_t>(piece) * piece_packs * n;
  const int packs = limit((a.cols - begin) / n, 0, piece_packs);
  const int from = piece == 0 ? -head : 0;
  const int to = piece == pieces - 1 ? static_cast<int>(a.cols - begin) : packs * n;
  const T* x = row_at(static_cast<const T*>(a.logits), a.strides, a.inner, row) + begin;
  y += begin;
  const int edge = thread < -from ? from + thread : packs * n + thread + from;  // in head or tail, if below `to`

  // Rounded alike wherever an element is written, so that alignment changes no bit.
  const int target = limit(s.target - begin, from - 1, to);
  const A scale = g * lse.factor;
  const auto gradient = [&](int e, A z) {
    const A p = exp_or_zero(z - lse.value);
    return (e == target ? g * (A(1) - lse.factor * p) : -scale * p) * transform.derivative(z);
  };

  if constexpr (listed) {
    __shared__ uint4 image[kRowThreads * kPieceLoads + 2];
    if (needs_grad && s.list) {
      const int round = threads * kPieceLoads;
      for (int base = 0; base == 0 || base < packs; base += round) {
        T* spread = reinterpret_cast<T*>(image + 1);
        const int first = base == 0 ? from : base * n, end = base + round >= packs ? to : (base + round) * n;
        const std::int64_t ends[2] = {begin + first, begin + end};
        int places[2];
        warp_lower_bounds(s.list, static_cast<int>(s.count), ends, places);
        for (int i = thread; i < round + 2; i += threads) image[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
        for (int i = places[0] + thread; i < places[1]; i += threads) {
          const int e = static_cast<int>(s.list[i] - begin);
          D::store(spread + (e - base * n), gradient(e, transform(D::load(x + e))));
        }
        __syncthreads();
        if (edge >= first && edge < end) y[edge] = spread[edge - base * n];
        for (int i = base + thread; i < packs && i < base + round; i += threads)
          __stwb(reinterpret_cast<uint4*>(y) + i, image[1 + i - base]);
        __syncthreads();
      }
      return;
    }
  }

  // The elements and packs within the support, and the pack that holds the target.
  const int low = needs_grad ? limit(s.first - begin, from, to) : to;
  const int high = needs_grad ? limit(s.first + s.count - begin, from, to) : to;
  const int first_read = low / n, last_read = (high + n - 1) / n - 1;
  const int target_pack = needs_grad && target >= 0 ? target / n : -1;
  const bool together = reinterpret_cast<std::uintptr_t>(x) % 16 == 0;
  if (edge < to) D::store(y + edge, edge >= low && edge < high ? gradient(edge, transform(D::load(x + edge))) : A(0));
  for (int first = thread; first < packs; first += threads * kPieceLoads) {
    uint4 v[kPieceLoads];
    const auto reads = [&](int k) {
      const int p = first + k * threads;
      return (p < packs) & (p >= first_read) & (p <= last_read);
    };
    if (together) {
#pragma unroll
      for (int k = 0; k < kPieceLoads; ++k)
        if (reads(k)) v[k] = reinterpret_cast<const uint4*>(x)[first + k * threads];
    } else {
#pragma unroll
      for (int k = 0; k < kPieceLoads; ++k)
        if (reads(k)) {
          T part[n];
#pragma unroll
          for (int i = 0; i < n; ++i) part[i] = x[(first + k * threads) * n + i];
          std::memcpy(&v[k], part, 16);
        }
    }
#pragma unroll
    for (int k = 0; k < kPieceLoads; ++k) {
      const int p = first + k * threads;
      if (p >= packs) break;
      const A of_target = p == target_pack ? gradient(target, transform(D::load(x + target))) : A(0);
      A d[n] = {};
      if (reads(k)) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const A z = transform(unpack(D{}, v[k], i));
          d[i] = -scale * exp_or_zero(z - lse.value) * transform.derivative(z);
        }
        if (p * n < low || p * n + n > high) {
#pragma unroll
          for (int i = 0; i < n; ++i)
            if (p * n + i < low || p * n + i >= high) d[i] = A(0);
        }
      }
      __stwb(reinterpret_cast<uint4*>(y) + p, pack(D{}, d));
      if (p == target_pack) D::store(y + target, of_target);
    }
  }
}

int block_threads(std::int64_t packs, int loads) {
  int threads = 64;
  while (threads < kRowThreads && threads * loads < packs) threads *= 2;
  return threads;
}

template <typename D, typename Transform>
int run_forward(const TokenLogpsArgs& a, const Transform& transform, CUstream_st* stream) {
  if constexpr (sizeof(typename D::A) == 8) {
    return launch(forward_double_kernel<Transform>, a.rows, kRowThreads, stream, a, transform);
  } else {
    const std::int64_t packs = a.cols / kPack<D>;
    const int threads = block_threads(packs, kLoads);
    int cluster = 1;
    while (cluster < kMaxCluster && cluster * threads * kLoads < packs && a.rows * cluster < kFill) cluster *= 2;
    if (!device_has_clusters()) cluster = 1;
    return launch(forward_kernel<D, Transform>, Grid{a.rows * cluster, threads, cluster}, stream, a, transform,
                  cluster);
  }
}

template <typename D, typename Transform>
int run_backward(const TokenLogpsArgs& a, const Transform& transform, CUstream_st* stream) {
  const std::int64_t packs = a.cols / kPack<D>;
  const int threads = block_threads(packs, kPieceLoads);
  const auto pieces = [&](std::int64_t size) { return packs > size ? (packs + size - 1) / size : 1; };
  int size = threads * kPieceLoads;
  for (int i = 0; i < 3 && a.rows * pieces(2 * size) >= kPieceFill; ++i) size *= 2;
  return launch(a.columns ? backward_kernel<D, Transform, true> : backward_kernel<D, Transform, false>,
                a.rows * pieces(size), threads, stream, a, transform, size, static_cast<unsigned>(pieces(size)));
}

double inverse(double x) { return std::fabs(x) > 1. / kLargest ? 1. / x : std::copysign(kLargest, x); }

template <bool forward, typename D>
int with_transform(const TokenLogpsArgs& a, CUstream_st* stream) {
  using A = typename D::A;
  const auto run = [&](const auto& transform) {
    return forward ? run_forward<D>(a, transform, stream) : run_backward<D>(a, transform, stream);
  };
  if (a.softcap != 0.) {
    const double bound = a.scale * a.softcap;
    return run(Capped<A>{A(a.scale), A(bound), A(inverse(a.softcap)), A(inverse(bound))});
  }
  if (a.scale != 1.) return run(Scaled<A>{A(a.scale)});
  return run(Plain<A>{});
}

template <bool forward>
int with_type(const TokenLogpsArgs& a, CUstream_st* stream) {
  if (a.type == LogitType::float32) return with_transform<forward, Float32>(a, stream);
  if (a.type == LogitType::bfloat16) return with_transform<forward, BFloat16>(a, stream);
  if (a.type == LogitType::float16) return with_transform<forward, Float16>(a, stream);
  return with_transform<forward, Float64>(a, stream);
}

}  // namespace

int token_logps(const TokenLogpsArgs& a, CUstream_st* stream) {
  return a.rows ? with_type<true>(a, stream) : cudaSuccess;
}

int token_logps_backward(const TokenLogpsArgs& a, CUstream_st* stream) {
  return a.rows && a.cols ? with_type<false>(a, stream) : cudaSuccess;
}

}  // namespace raddpo::cuda
