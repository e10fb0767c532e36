#pragma once
// The largest of a stream of distinct 64-bit keys, found by one block: keys are gathered in a buffer, and when it is
// full a histogram of the range they span finds a bound that at least `want` and at most `limit` of them reach. `limit`
// leaves slack above `want`, so that one histogram nearly always does; keys being distinct, it always ends.
#include "../common/cuda_block.cuh"

namespace raddpo::cuda {

using Key = std::uint64_t;  // 0: none

constexpr int kSliceThreads = 512;  // of a block, and bins of a histogram
constexpr int kBinBits = 9;
static_assert(kSliceThreads == 1 << kBinBits);
constexpr int kRound = 4 * kSliceThreads;  // keys taken in at a time

struct TopKeysShared {
  unsigned count;  // keys held
  unsigned histogram[kSliceThreads];
  unsigned scratch[kSliceThreads / 32];
  Key key_scratch[kSliceThreads / 32];
  unsigned bin, before, inside;
};

// Members are the same in every thread; every function is called by the whole block.
struct TopKeys {
  Key* keys;  // [capacity], capacity >= limit + kRound and >= 2 kSliceThreads
  int capacity, want, limit;
  TopKeysShared* shared;
  Key bound;  // smaller keys are not wanted
  int used;   // at least the number of keys held, exact after settle()

  __device__ __forceinline__ void clear(Key least) {
    __syncthreads();
    if (threadIdx.x == 0) shared->count = 0;
    __syncthreads();
    bound = least > 1 ? least : 1;
    used = 0;
  }

  template <int n>
  __device__ __forceinline__ void push(const Key (&x)[n]) {
    static_assert(n * kSliceThreads <= kRound);
    if (used + n * kSliceThreads > capacity) settle();
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (x[i] >= bound) keys[atomicAdd(&shared->count, 1u)] = x[i];
    used += n * kSliceThreads;
  }

  // Brings the keys down to `limit`, and makes them visible to the block.
  __device__ __forceinline__ void settle() {
    __syncthreads();
    used = static_cast<int>(shared->count);
    __syncthreads();  // read by all before the next key is pushed
    if (used > limit) shrink();
  }

  __device__ __forceinline__ void shrink() {
    const int thread = static_cast<int>(threadIdx.x);
    Key low = ~Key(0), high = 0;
    for (int i = thread; i < used; i += kSliceThreads) {
      low = keys[i] < low ? keys[i] : low;
      high = keys[i] > high ? keys[i] : high;
    }
    low = block_reduce<kSliceThreads>(low, shared->key_scratch, [](Key a, Key b) { return a < b ? a : b; });
    high = block_reduce<kSliceThreads>(high, shared->key_scratch, [](Key a, Key b) { return a > b ? a : b; });
    int above = 0, inside;
    do {  // [low, high] holds the key number `want`; `above` keys are larger than high
      const int bits = 64 - __clzll(static_cast<long long>(high - low)), shift = bits > kBinBits ? bits - kBinBits : 0;
      shared->histogram[thread] = 0;
      __syncthreads();
      for (int i = thread; i < used; i += kSliceThreads)
        if (keys[i] - low <= high - low) atomicAdd(&shared->histogram[(keys[i] - low) >> shift], 1u);
      __syncthreads();
      const int bin = kSliceThreads - 1 - thread;  // largest keys first
      const unsigned mine = shared->histogram[bin];
      unsigned total;
      const unsigned before = above + block_scan<kSliceThreads>(mine, shared->scratch, &total);
      if (before < static_cast<unsigned>(want) && before + mine >= static_cast<unsigned>(want)) {
        shared->bin = static_cast<unsigned>(bin);
        shared->before = before;
        shared->inside = mine;
      }
      __syncthreads();
      low += static_cast<Key>(shared->bin) << shift;
      high = low + ((Key(1) << shift) - 1);
      above = static_cast<int>(shared->before);
      inside = static_cast<int>(shared->inside);
    } while (above + inside > limit);
    keep(low, above + inside);
  }

  // Moves the keys from `least` on, `count` of them, to the front: what a round writes over was read before its
  // barrier.
  __device__ __forceinline__ void keep(Key least, int count) {
    if (threadIdx.x == 0) shared->count = 0;
    for (int first = 0; first < used; first += kSliceThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      const Key key = i < used ? keys[i] : 0;
      __syncthreads();
      if (key >= least) keys[atomicAdd(&shared->count, 1u)] = key;
    }
    __syncthreads();
    bound = least;
    used = count;
  }

  // After settle(): the keys held, largest first.
  __device__ __forceinline__ const Key* sorted() {
    if (used > kSliceThreads) return sorted_in_place();
    Key* out = keys + capacity - kSliceThreads;
    for (int i = warp_id(); i < used; i += kSliceThreads / 32) {  // a warp counts the keys above each of its own
      const Key key = keys[i];
      int rank = 0;
      for (int first = 0; first < used; first += 32) {
        const int j = first + lane_id();
        rank += __popc(__ballot_sync(kAllLanes, j < used && keys[j] > key));
      }
      if (lane_id() == 0) out[rank] = key;
    }
    __syncthreads();
    return out;
  }

  __device__ __forceinline__ const Key* sorted_in_place() {  // bitonic; the buffer has room for a power of two
    int size = 1;
    while (size < used) size *= 2;
    for (int i = used + static_cast<int>(threadIdx.x); i < size; i += kSliceThreads) keys[i] = 0;
    __syncthreads();
    for (int run = 2; run <= size; run *= 2)
      for (int distance = run / 2; distance; distance /= 2) {
        for (int i = static_cast<int>(threadIdx.x); i < size; i += kSliceThreads) {
          const int j = i ^ distance;
          const Key a = keys[i];
          if (j > i) {
            const Key b = keys[j];
            if ((a < b) == ((i & run) == 0)) {
              keys[i] = b;
              keys[j] = a;
            }
          }
        }
        __syncthreads();
      }
    return keys;
  }
};

}  // namespace raddpo::cuda
