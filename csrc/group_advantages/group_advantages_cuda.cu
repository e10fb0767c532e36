// One block per group, in one launch. Rows of a group are read from memory once, then from the caches: siblings are
// found by comparing each row with all others of its group, which needs no order. Under Scale::batch every block works
// the batch's standard deviation out by itself, rather than waiting for the others: blocks are few.
#include <cmath>

#include "../common/cuda_block.cuh"
#include "group_advantages_math.h"

namespace raddpo::cuda {
namespace {

constexpr int kGroupThreads = 128, kGroupWarps = kGroupThreads / 32;
constexpr std::int64_t kMaxGroupBlocks = 512;

// [candidates, levels] each.
struct GroupWorkspace {
  double* scores;  // of children, or what the levels of rows add to their match
  bool* first;     // whether a row is the first one of the group with its token after its prefix
};

struct GroupShared {
  Moments moments[kGroupWarps];
  Deviations deviations[kGroupWarps];
};

__device__ __forceinline__ double other_lane(double x, int d) { return __shfl_xor_sync(kAllLanes, x, d); }
__device__ __forceinline__ TwoSum other_lane(const TwoSum& s, int d) {
  return {other_lane(s.high, d), other_lane(s.low, d)};
}
__device__ __forceinline__ Moments other_lane(const Moments& m, int d) {
  return {m.unit,
          __shfl_xor_sync(kAllLanes, m.count, d),
          other_lane(m.least, d),
          other_lane(m.most, d),
          other_lane(m.weight, d),
          other_lane(m.weighted, d)};
}
__device__ __forceinline__ Deviations other_lane(const Deviations& v, int d) {
  return {other_lane(v.squares, d), other_lane(v.freedom, d)};
}

// The sum of what the threads of a block have, given to every thread.
template <typename Part>
__device__ __forceinline__ Part block_total(Part mine, Part* scratch) {
#pragma unroll 1
  for (int d = 16; d; d /= 2) add(mine, other_lane(mine, d));  // rolled up, as it occurs often and runs rarely
  __syncthreads();                                             // earlier uses of the scratch memory are complete
  if (lane_id() == 0) scratch[warp_id()] = mine;
  __syncthreads();
  Part total = scratch[0];
#pragma unroll 1
  for (int w = 1; w < kGroupWarps; ++w) add(total, scratch[w]);
  return total;
}

// Moments and deviations of a set that the threads of a block share; `visit` calls its argument with each value and
// weight of this thread.
struct Statistics {
  Moments moments;
  Deviations deviations;
};
template <typename Visit>
__device__ __forceinline__ Statistics block_statistics(GroupShared& shared, bool unit, const Visit& visit) {
  Moments m = no_moments(unit);
  visit([&](double x, double weight) { add(m, x, weight); });
  m = block_total(m, shared.moments);
  const double mean = mean_of(m);
  Deviations d{};
  visit([&](double x, double weight) { add(d, m, mean, x, weight); });
  return {m, block_total(d, shared.deviations)};
}

template <typename T>
struct GroupWorker {
  const GroupAdvantagesArgs<T>& a;
  const GroupWorkspace& w;
  GroupShared& shared;
  const Session v;
  std::int64_t s, size;

  __device__ __forceinline__ Sid sid(std::int64_t i) const { return sid_of(a, v.first + i); }
  __device__ __forceinline__ std::int64_t place(std::int64_t i, std::int64_t level) const {
    return (v.first + i) * a.levels + level;
  }
  template <typename Body>
  __device__ __forceinline__ void for_each(std::int64_t end, const Body& body) const {
    for (std::int64_t i = threadIdx.x; i < end; i += kGroupThreads) body(i);
  }
  // Calls body(row, level) for each token of the rows that count.
  template <typename Body>
  __device__ __forceinline__ void for_tokens(const Body& body) const {
    for_each(size * a.levels, [&](std::int64_t at) {
      const std::int64_t i = at / a.levels, l = at % a.levels;
      if (read_row(a, v, i).weight > 0 && l < sid(i).length) body(i, static_cast<std::int32_t>(l));
    });
  }
  // Whether two rows have their first `depth` tokens in common.
  __device__ __forceinline__ bool share(std::int64_t i, std::int64_t j, std::int32_t depth) const {
    const Sid x = sid(i), y = sid(j);
    if (x.length < depth || y.length < depth) return false;
    for (std::int32_t l = 0; l < depth; ++l)
      if (x.tokens[l] != y.tokens[l]) return false;
    return true;
  }

  __device__ __forceinline__ Statistics reward_statistics() const {
    return block_statistics(shared, !a.weights, [&](const auto& found) {
      for_each(size, [&](std::int64_t i) {
        const Weighted row = read_row(a, v, i);
        if (row.weight > 0) found(row.reward, row.weight);
      });
    });
  }

  // Writes the score of the child that each token stands for, and whether the row is that child's first.
  __device__ __forceinline__ void find_scores() const {
    for_tokens([&](std::int64_t i, std::int32_t l) {
      Moments rows = no_moments(!a.weights);
      bool first = true;
      for (std::int64_t j = 0; j < size; ++j) {
        const Weighted row = read_row(a, v, j);
        if (!(row.weight > 0) || !share(i, j, l + 1)) continue;
        first &= j >= i;
        add(rows, row.reward, row.weight);
      }
      w.scores[place(i, l)] = mean_of(rows);
      w.first[place(i, l)] = first;
    });
  }

  // Calls body(score) for each child of the prefix of `depth` tokens of row i.
  template <typename Body>
  __device__ __forceinline__ void for_siblings(std::int64_t i, std::int32_t depth, const Body& body) const {
    for (std::int64_t j = 0; j < size; ++j)
      if (read_row(a, v, j).weight > 0 && share(i, j, depth) && sid(j).length > depth && w.first[place(j, depth)])
        body(w.scores[place(j, depth)]);
  }

  __device__ __forceinline__ void write_siblings(const Moments& sums, double divisor) const {
    find_scores();
    __syncthreads();  // the scores are complete
    for_tokens([&](std::int64_t i, std::int32_t l) {
      Moments scores = no_moments(true);
      for_siblings(i, l, [&](double score) { add(scores, score, 1); });
      double sibling = 0;
      if (differ(scores)) {
        const double mean = mean_of(scores);
        Deviations d{};
        for_siblings(i, l, [&](double score) { add(d, scores, mean, score, 1); });
        sibling = (w.scores[place(i, l)] - mean) / (biased(scores, d) + a.eps);
      }
      a.values[place(i, l)] = blended(a, sibling, centred(a, s, sums, mean_of(sums), read_row(a, v, i)) / divisor);
    });
  }

  __device__ __forceinline__ void find_matches() const {
    const Targets targets = targets_of(a, v, s);
    for_each(size,
             [&](std::int64_t i) { write_matches(a, sid(i), targets, w.scores + place(i, 0), a.gates + place(i, 0)); });
  }

  __device__ __forceinline__ void write_marginal() const {
    __syncthreads();  // the matches are complete
    for (std::int32_t l = 0; l < a.levels; ++l) {
      const auto for_level = [&](const auto& body) {
        for_each(size, [&](std::int64_t i) {
          const double weight = read_row(a, v, i).weight;
          if (weight > 0 && l < sid(i).length) body(i, weight);
        });
      };
      const Statistics found = block_statistics(shared, !a.weights, [&](const auto& add_value) {
        for_level([&](std::int64_t i, double weight) { add_value(w.scores[place(i, l)], weight); });
      });
      if (!differ(found.moments)) continue;
      const double mean = mean_of(found.moments), divisor = unbiased(found.moments, found.deviations) + a.eps;
      for_level([&](std::int64_t i, double) {
        a.values[place(i, l)] = static_cast<T>((w.scores[place(i, l)] - mean) / divisor);
      });
    }
  }

  __device__ __forceinline__ void run(double batch_std) const {
    const Statistics found = reward_statistics();
    const bool active = differ(found.moments);
    if (threadIdx.x == 0) a.active[s] = active;
    const std::int64_t columns = a.credit == Credit::sequence ? 1 : a.levels;
    for_each(size * columns, [&](std::int64_t i) { a.values[v.first * columns + i] = 0; });
    if (a.credit == Credit::marginal) find_matches();
    if (!active) return;
    __syncthreads();  // the zeros come before the values
    double divisor = 1;
    if (a.scale == Scale::group) divisor = unbiased(found.moments, found.deviations) + a.eps;
    if (a.scale == Scale::batch) divisor = batch_std + a.eps;
    if (a.credit == Credit::marginal) return write_marginal();
    if (a.credit == Credit::siblings) return write_siblings(found.moments, divisor);
    const double mean = mean_of(found.moments);
    for_each(size, [&](std::int64_t i) {
      const Weighted row = read_row(a, v, i);
      if (row.weight > 0) a.values[v.first + i] = static_cast<T>(centred(a, s, found.moments, mean, row) / divisor);
    });
  }
};

// The standard deviation of all rewards that count.
template <typename T>
__device__ __forceinline__ double batch_std_of(const GroupAdvantagesArgs<T>& a, GroupShared& shared) {
  const Statistics found = block_statistics(shared, !a.weights, [&](const auto& add_value) {
    for (std::int64_t s = threadIdx.x; s < a.batch.sessions; s += kGroupThreads) {
      const Session v = session_of(a.batch, s);
      for (std::int64_t i = 0; i < v.positives + v.negatives; ++i) {
        const Weighted row = read_row(a, v, i);
        if (row.weight > 0) add_value(row.reward, row.weight);
      }
    }
  });
  return unbiased(found.moments, found.deviations);
}

template <typename T>
__global__ void __launch_bounds__(kGroupThreads)
    group_advantages_kernel(const __grid_constant__ GroupAdvantagesArgs<T> a,
                            const __grid_constant__ GroupWorkspace w) {
  __shared__ GroupShared shared;
  const double batch_std = a.scale == Scale::batch ? batch_std_of(a, shared) : 0;
  for (std::int64_t s = blockIdx.x; s < a.batch.sessions; s += gridDim.x) {
    const Session v = session_of(a.batch, s);
    GroupWorker<T>{a, w, shared, v, s, v.positives + v.negatives}.run(batch_std);
  }
}

}  // namespace

template <typename T>
std::int64_t group_advantages_workspace(const GroupAdvantagesArgs<T>& a) {
  return a.credit == Credit::sequence ? 0 : a.batch.candidates * a.levels * (sizeof(double) + sizeof(bool));
}

template <typename T>
int group_advantages(const GroupAdvantagesArgs<T>& a, void* workspace, CUstream_st* stream) {
  if (!a.batch.sessions) return cudaSuccess;
  const std::int64_t blocks = a.batch.sessions < kMaxGroupBlocks ? a.batch.sessions : kMaxGroupBlocks;
  auto* const scores = static_cast<double*>(workspace);
  bool* const first = workspace ? reinterpret_cast<bool*>(scores + a.batch.candidates * a.levels) : nullptr;
  return launch(group_advantages_kernel<T>, blocks, kGroupThreads, stream, a, GroupWorkspace{scores, first});
}

#define RADDPO_INSTANTIATE(T)                                                         \
  template std::int64_t group_advantages_workspace<T>(const GroupAdvantagesArgs<T>&); \
  template int group_advantages<T>(const GroupAdvantagesArgs<T>&, void*, CUstream_st*);
RADDPO_INSTANTIATE(float)
RADDPO_INSTANTIATE(double)
#undef RADDPO_INSTANTIATE

}  // namespace raddpo::cuda
