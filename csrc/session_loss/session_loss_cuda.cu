// One block per session, forward and backward; its threads share the candidates. Tokens, lengths and log-probs are read
// from memory once, then from the caches. The last block to finish adds up the sums of the sessions in their order, so
// that the result is bitwise reproducible.
#include <cmath>

#include "../common/cuda_block.cuh"
#include "session_loss_math.h"

namespace raddpo::cuda {
namespace {

constexpr int kLossThreads = 128, kLossWarps = kLossThreads / 32;
constexpr std::int64_t kMaxLossBlocks = 4096;  // fill any GPU

template <typename T>
struct LossWorkspace {
  SessionSums* sums;           // [sessions]
  unsigned long long* ticket;  // [1]
  T* weights;                  // [candidates] minimum weights of negatives against a pool
  std::int32_t* prefixes;      // [candidates] detached tokens of negatives; -1: dropped
};

template <typename T>
std::int64_t workspace_bytes(const Sessions& b) {
  const std::int64_t sums = sizeof(SessionSums), ticket = sizeof(unsigned long long);
  return b.sessions * sums + ticket + b.candidates * static_cast<std::int64_t>(sizeof(T) + sizeof(std::int32_t));
}

// Lays the arrays out one after another, largest alignment first.
template <typename T>
LossWorkspace<T> lay_out(const Sessions& b, void* memory) {
  LossWorkspace<T> w{};
  w.sums = static_cast<SessionSums*>(memory);
  w.ticket = reinterpret_cast<unsigned long long*>(w.sums + b.sessions);
  w.weights = reinterpret_cast<T*>(w.ticket + 1);
  w.prefixes = reinterpret_cast<std::int32_t*>(w.weights + b.candidates);
  return w;
}

// Whether this block is the last to finish. The ticket is 0 at the launch and counts the finished blocks.
__device__ __forceinline__ bool ends_last(unsigned long long* ticket, unsigned blocks) {
  return atomicAdd(ticket, 1ull) + 1 == blocks;
}

template <typename T>
struct LossShared {
  T values[kLossWarps];
  std::int64_t counts[kLossWarps];
  Sum sums[kTotals][kLossWarps];
  bool last;
};

template <typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  return block_reduce<kLossThreads>(value, scratch, [](T x, T y) { return x + y; });
}
template <typename T>
__device__ __forceinline__ T block_max(T value, T* scratch) {
  return block_reduce<kLossThreads>(value, scratch, [](T x, T y) { return y > x ? y : x; });
}

// The sums over a block's threads, complete in thread 0 only.
__device__ __forceinline__ SessionSums block_total(const SessionSums& mine, Sum (*scratch)[kLossWarps]) {
  const auto plus = [](double x, double y) { return x + y; };
  __syncthreads();  // earlier uses of the scratch memory are complete
#pragma unroll
  for (int i = 0; i < kTotals; ++i) {
    const Sum sum{warp_reduce(mine.of[i].value, plus), warp_reduce(mine.of[i].count, plus)};
    if (lane_id() == 0) scratch[i][warp_id()] = sum;
  }
  __syncthreads();
  SessionSums total{};
  if (threadIdx.x > 0) return total;
#pragma unroll
  for (int i = 0; i < kTotals; ++i)
    for (int w = 0; w < kLossWarps; ++w) add(total.of[i], scratch[i][w].value, scratch[i][w].count);
  return total;
}

// A block's work on one session. Each thread keeps its own part of the sums. Negative j always belongs to thread
// j % kLossThreads.
template <typename T>
struct SessionWorker {
  const SessionLossArgs<T>& a;
  const Session& v;
  LossShared<T>& shared;
  std::int32_t* prefixes;  // [negatives] detached tokens; -1: dropped
  T* pool_weights;         // [negatives]

  template <typename Body>
  __device__ __forceinline__ void for_each(std::int64_t size, const Body& body) const {
    for (std::int64_t i = threadIdx.x; i < size; i += kLossThreads) body(i);
  }
  __device__ __forceinline__ std::int64_t row_of(std::int64_t negative) const {
    return v.first + v.positives + negative;
  }
  __device__ __forceinline__ std::int64_t pair_of(std::int64_t p, std::int64_t negative) const {
    return v.first_pair + p * v.negatives + negative;
  }
  __device__ __forceinline__ T exponent(std::int64_t negative, const T* weights) const {
    const T x = sign_of(a) * a.rewards[row_of(negative)];
    if (!weights) return x;
    return a.weighting == Weighting::reward ? x * weights[negative] : x + fast_log(weights[negative]);
  }

  // Writes a pair's margin and whether the loss keeps it. Adds a pair of the loss to the sums.
  __device__ __forceinline__ void write_pair(std::int64_t p, std::int64_t negative, bool kept, bool of_loss,
                                             std::int32_t detached, SessionSums& sums) const {
    const std::int64_t pair = pair_of(p, negative);
    const T margin = kept ? margin_of(a.rewards[v.first + p], a.rewards[row_of(negative)]) : T(0);
    a.margins[pair] = margin;
    a.kept[pair] = kept && of_loss;
    if (!kept || !of_loss) return;
    add(sums.of[kMargins], margin, 1);
    add(sums.of[kWins], margin > 0, 1);
    add(sums.of[kWeights], a.pair_weights ? a.pair_weights[pair] : T(1), 1);
    add(sums.of[kDetached], detached, sid_of(a, row_of(negative)).length);
  }

  // The longest prefix that a negative has in common with any positive.
  __device__ __forceinline__ std::int32_t longest_prefix(std::int64_t negative) const {
    const Sid sid = sid_of(a, row_of(negative));
    std::int32_t most = 0;
    for (std::int64_t p = 0; p < v.positives; ++p) {
      const std::int32_t k = common_prefix(sid_of(a, v.first + p), sid);
      most = k > most ? k : most;
    }
    return most;
  }

  // The number of detached tokens of a negative that has `prefix` tokens in common with its winner.
  __device__ __forceinline__ std::int32_t detached_tokens(std::int64_t negative, std::int32_t prefix) const {
    if (a.detach) return detached_of(a, row_of(negative));
    if (a.protect == Protect::none) return 0;
    const bool longest = a.positives == Positives::pooled || a.protect == Protect::positives;
    return longest ? longest_prefix(negative) : prefix;
  }

  // The term of the kept negatives against a winner's reward; `most` is their maximum exponent. Adds their gradient.
  __device__ __forceinline__ Term<T> add_term(T most, T winner, const T* weights) const {
    T sum = 0;
    for_each(v.negatives, [&](std::int64_t j) {
      if (prefixes[j] >= 0) sum += softmax_weight(exponent(j, weights), most);
    });
    sum = block_sum(sum, shared.values);
    const Term<T> term = term_of(loss_argument(a, most + std::log(sum), winner), a.label_smoothing);
    if (!a.gradient) return term;
    for_each(v.negatives, [&](std::int64_t j) {
      if (prefixes[j] < 0) return;
      const T weight = softmax_weight(exponent(j, weights), most);
      const std::int32_t begin = a.detach ? 0 : prefixes[j];
      add_gradient(a, row_of(j), begin,
                   term.derivative / sum * argument_derivative(a, weight, weights ? weights[j] : T(1)));
    });
    return term;
  }

  __device__ __forceinline__ void add_positive_gradient(std::int64_t p, T factor) const {
    if (a.gradient) add_gradient(a, v.first + p, 0, factor);
  }

  __device__ __forceinline__ void add_winners(SessionSums& sums) const {
    std::int64_t terms = 0;
    double total = 0;
    for (std::int64_t p = 0; p < v.positives; ++p) {
      const T* weights = a.pair_weights ? a.pair_weights + pair_of(p, 0) : nullptr;
      const Sid positive = sid_of(a, v.first + p);
      const bool in_loss = p == 0 || a.positives == Positives::each;
      std::int64_t pairs = 0;
      T most = -INFINITY;
      for_each(v.negatives, [&](std::int64_t j) {
        const Sid negative = sid_of(a, row_of(j));
        const std::int32_t k = common_prefix(positive, negative);
        const bool dropped = no_pair(k, positive.length, negative.length);
        const bool kept = !dropped && !(weights && !(weights[j] > 0));
        if (in_loss) prefixes[j] = kept ? detached_tokens(j, k) : -1;
        write_pair(p, j, kept, in_loss, prefixes[j], sums);
        add(sums.of[kDropped], dropped, 1);
        if (!kept || !in_loss) return;
        ++pairs;
        const T x = exponent(j, weights);
        most = x > most ? x : most;
      });
      if (!in_loss || !block_sum(pairs, shared.counts)) continue;
      most = block_max(most, shared.values);
      const Term<T> term = add_term(most, a.rewards[v.first + p], weights);
      if (threadIdx.x == 0) add_positive_gradient(p, -term.derivative);
      total += term.value;
      ++terms;
    }
    if (!terms) return;
    if (threadIdx.x == 0) sums.of[kPreference] = {total / static_cast<double>(terms), 1};
    if (terms == 1 || !a.gradient) return;
    __syncthreads();  // the gradient is complete
    T* gradient = a.gradient + v.first * a.columns;
    for_each((v.positives + v.negatives) * a.columns, [&](std::int64_t i) { gradient[i] /= static_cast<T>(terms); });
  }

  __device__ __forceinline__ void add_pool(SessionSums& sums) const {
    const T* weights = a.pair_weights ? pool_weights : nullptr;
    const std::int64_t* lengths = a.batch.lengths + v.first;
    std::int64_t pairs = 0;
    T most = -INFINITY, most_positive = -INFINITY, sum = 0;
    for_each(v.negatives, [&](std::int64_t j) {
      const Sid negative = sid_of(a, row_of(j));
      bool kept = negative.length > 0;
      T least = INFINITY;
      for (std::int64_t p = 0; p < v.positives; ++p) {
        const Sid positive = sid_of(a, v.first + p);
        const bool dropped = no_pair(common_prefix(positive, negative), positive.length, negative.length);
        add(sums.of[kDropped], dropped, 1);
        if (!positive.length) continue;
        kept = kept && !dropped;
        if (weights) least = a.pair_weights[pair_of(p, j)] < least ? a.pair_weights[pair_of(p, j)] : least;
      }
      kept = kept && least > 0;
      prefixes[j] = kept ? detached_tokens(j, 0) : -1;
      pool_weights[j] = least;
      for (std::int64_t p = 0; p < v.positives; ++p) {
        write_pair(p, j, kept && lengths[p] > 0, true, prefixes[j], sums);
        pairs += kept && lengths[p] > 0;
      }
      if (!kept) return;
      const T x = exponent(j, weights);
      most = x > most ? x : most;
    });
    if (!block_sum(pairs, shared.counts)) return;
    for_each(v.positives, [&](std::int64_t p) {
      const T reward = a.rewards[v.first + p];
      if (lengths[p] > 0 && reward > most_positive) most_positive = reward;
    });
    most_positive = block_max(most_positive, shared.values);
    for_each(v.positives, [&](std::int64_t p) {
      if (lengths[p] > 0) sum += softmax_weight(a.rewards[v.first + p], most_positive);
    });
    sum = block_sum(sum, shared.values);
    most = block_max(most, shared.values);
    const Term<T> term = add_term(most, most_positive + std::log(sum), weights);
    for_each(v.positives, [&](std::int64_t p) {
      if (lengths[p] > 0)
        add_positive_gradient(p, -term.derivative * softmax_weight(a.rewards[v.first + p], most_positive) / sum);
    });
    if (threadIdx.x == 0) sums.of[kPreference] = {static_cast<double>(term.value), 1};
  }

  __device__ __forceinline__ SessionSums run() const {
    SessionSums sums{};
    const std::int64_t size = v.positives + v.negatives;
    T* gradient = a.gradient ? a.gradient + v.first * a.columns : nullptr;
    const bool* detach = a.detach ? a.detach + v.first * a.columns : nullptr;
    for_each(size, [&](std::int64_t i) {
      const T reward = reward_of(a, v.first + i);
      a.rewards[v.first + i] = reward;
      const bool counts = a.batch.lengths[v.first + i] > 0;
      if (i < v.positives)  // a constant index keeps the sums in registers
        add(sums.of[kChosen], reward, counts);
      else
        add(sums.of[kRejected], reward, counts);
    });
    if (gradient) for_each(size * a.columns, [&](std::int64_t i) { gradient[i] = 0; });
    for_each(v.positives, [&](std::int64_t p) { add_sft(a, v.first + p, sums); });
    __syncthreads();  // all threads see the rewards and the zeros
    if (a.positives == Positives::pooled)
      add_pool(sums);
    else
      add_winners(sums);
    if (!gradient || !detach) return sums;
    __syncthreads();  // the gradient is complete
    for_each(size * a.columns, [&](std::int64_t i) { gradient[i] = detach[i] ? T(0) : gradient[i]; });
    return sums;
  }
};

template <typename T>
__global__ void __launch_bounds__(kLossThreads)
    session_loss_kernel(const __grid_constant__ SessionLossArgs<T> a, const __grid_constant__ LossWorkspace<T> w) {
  __shared__ LossShared<T> shared;
  for (std::int64_t s = blockIdx.x; s < a.batch.sessions; s += gridDim.x) {
    const Session v = session_of(a, s);
    const std::int64_t first_negative = v.first + v.positives;
    const SessionSums sums =
        SessionWorker<T>{a, v, shared, w.prefixes + first_negative, w.weights + first_negative}.run();
    const SessionSums total = block_total(sums, shared.sums);
    if (threadIdx.x > 0) continue;
    w.sums[s] = total;
    write_session(a, s, total);
  }
  // Thread 0's writes of the block's sums reach memory before the block counts as finished. The sums are read only
  // after all blocks have finished.
  if (threadIdx.x == 0) {
    __threadfence();
    shared.last = ends_last(w.ticket, gridDim.x);
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  SessionSums sums{};
  for (std::int64_t s = threadIdx.x; s < a.batch.sessions; s += kLossThreads) add(sums, w.sums[s]);
  const SessionSums total = block_total(sums, shared.sums);
  if (threadIdx.x == 0) write_batch(a, total);
}

// One block per session, whose rows are one contiguous range, read and written in order.
template <typename T>
__global__ void __launch_bounds__(kLossThreads)
    session_loss_backward_kernel(const __grid_constant__ SessionLossBackwardArgs<T> a) {
  for (std::int64_t s = blockIdx.x; s < a.batch.sessions; s += gridDim.x) {
    const Session v = session_of(a.batch, s);
    const T preference = preference_factor(a, s), sft = sft_factor(a, s);
    const std::int64_t first = v.first * a.columns, positive = v.positives * a.columns;
    const std::int64_t size = positive + v.negatives * a.columns;
    for (std::int64_t i = threadIdx.x; i < size; i += kLossThreads) {
      T value = preference * a.gradient[first + i];
      if (i < positive) {
        const std::int64_t p = i / a.columns, column = i - p * a.columns;
        if (column < a.batch.lengths[v.first + p]) value -= sft * (a.level_weights ? a.level_weights[column] : T(1));
      }
      a.grad_logps[first + i] = value;
    }
  }
}

std::int64_t loss_blocks(std::int64_t sessions) { return sessions < kMaxLossBlocks ? sessions : kMaxLossBlocks; }

}  // namespace

template <typename T>
std::int64_t session_loss_workspace(const SessionLossArgs<T>& a) {
  return workspace_bytes<T>(a.batch);
}

template <typename T>
int session_loss(const SessionLossArgs<T>& a, void* workspace, CUstream_st* stream) {
  const std::int64_t blocks = a.batch.sessions ? loss_blocks(a.batch.sessions) : 1;  // no sessions: totals of 0
  const LossWorkspace<T> w = lay_out<T>(a.batch, workspace);
  if (const int error = cudaMemsetAsync(w.ticket, 0, sizeof(*w.ticket), stream)) return error;
  return launch(session_loss_kernel<T>, blocks, kLossThreads, stream, a, w);
}

template <typename T>
int session_loss_backward(const SessionLossBackwardArgs<T>& a, CUstream_st* stream) {
  if (!a.batch.sessions) return cudaSuccess;
  return launch(session_loss_backward_kernel<T>, loss_blocks(a.batch.sessions), kLossThreads, stream, a);
}

#define RADDPO_INSTANTIATE(T)                                                   \
  template std::int64_t session_loss_workspace<T>(const SessionLossArgs<T>&);   \
  template int session_loss<T>(const SessionLossArgs<T>&, void*, CUstream_st*); \
  template int session_loss_backward<T>(const SessionLossBackwardArgs<T>&, CUstream_st*);
RADDPO_INSTANTIATE(float)
RADDPO_INSTANTIATE(double)
#undef RADDPO_INSTANTIATE

}  // namespace raddpo::cuda
