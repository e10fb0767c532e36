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
constexpr int kFewKeys = 128;              // that are faster sorted by counting

struct TopKeysShared {
  unsigned count;  // keys held
  unsigned histogram[kSliceThreads];
  // Aligned: otherwise its wide reads begin in the histogram, which racecheck takes for a race.
  alignas(16) unsigned scratch[kSliceThreads / 32];
  Key key_scratch[2 * kSliceThreads / 32];
  unsigned bin, before, inside;
};

// Members are the same in every thread; every function is called by the whole block.
struct TopKeys {
  Key* keys;  // [capacity], capacity >= limit + kRound and >= 2 limit
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
    append(x, bound);
    used += n * kSliceThreads;
  }

  // Brings the keys down to `limit`, and makes them visible to the block.
  __device__ __forceinline__ void settle() {
    __syncthreads();
    used = static_cast<int>(shared->count);
    __syncthreads();  // read by all before the next key is pushed
    if (used > limit) shrink();
  }

  // A bound that at least k of the keys held reach, and few more; 0 where fewer are held. After settle().
  __device__ __forceinline__ Key reached_by(int k) {
    return used < k ? 0 : used == k ? bound : select(k, k + k / 4 + 32).low;
  }

  // After settle(): the keys held, largest first.
  __device__ __forceinline__ const Key* sorted() {
    if (used <= kFewKeys)
      sort_few();
    else
      sort_by_bins();
    return keys;
  }

 private:
  struct Selected {
    Key low;
    int count;  // of the keys held that reach it
  };

  // Puts those of a warp's keys that reach `least` behind the keys held.
  template <int n>
  __device__ __forceinline__ void append(const Key (&x)[n], Key least) {
    unsigned votes[n], count = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      votes[i] = __ballot_sync(kAllLanes, x[i] >= least);
      count += __popc(votes[i]);
    }
    unsigned at = 0;
    if (lane_id() == 0 && count) at = atomicAdd(&shared->count, count);
    at = __shfl_sync(kAllLanes, at, 0);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (x[i] >= least) keys[at + __popc(votes[i] & ((1u << lane_id()) - 1))] = x[i];
      at += __popc(votes[i]);
    }
  }

  __device__ __forceinline__ void shrink() {
    const Selected best = select(want, limit);
    keep(best.low, best.count);
  }

  // A warp counts the keys above each of its own.
  __device__ __forceinline__ void sort_few() {
    Key* moved = keys + limit;
    for (int i = warp_id(); i < used; i += kSliceThreads / 32) {
      const Key key = keys[i];
      int rank = 0;
      for (int first = 0; first < used; first += 32) {
        const int j = first + lane_id();
        rank += __popc(__ballot_sync(kAllLanes, j < used && keys[j] > key));
      }
      if (lane_id() == 0) moved[rank] = key;
    }
    __syncthreads();
    keys = moved;
  }

  // Each key is counted into its bin, moved there, and then ranked among the bin's few.
  __device__ __forceinline__ void sort_by_bins() {
    const Bins bins = bins_of(span());
    Key* moved = keys + limit;
    count_into(bins);
    const int bin = kSliceThreads - 1 - static_cast<int>(threadIdx.x);  // largest keys first
    unsigned total;
    shared->histogram[bin] = block_scan<kSliceThreads>(shared->histogram[bin], shared->scratch, &total);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < used; i += kSliceThreads)
      moved[atomicAdd(&shared->histogram[bins.of(keys[i])], 1u)] = keys[i];
    __syncthreads();  // each bin's number is now its end, and the next one's beginning
    for (int i = static_cast<int>(threadIdx.x); i < used; i += kSliceThreads) {
      const Key key = moved[i];
      const int mine = bins.of(key), end = static_cast<int>(shared->histogram[mine]);
      int rank = mine == kSliceThreads - 1 ? 0 : static_cast<int>(shared->histogram[mine + 1]);
      for (int j = rank; j < end; ++j) rank += moved[j] > key;
      keys[rank] = key;
    }
    __syncthreads();
  }

  struct Span {
    Key low, high;
  };

  // The smallest and the largest key held.
  __device__ __forceinline__ Span span() const {
    const auto smaller = [](Key a, Key b) { return a < b ? a : b; };
    const auto larger = [](Key a, Key b) { return a > b ? a : b; };
    Span s{~Key(0), 0};
    for (int i = static_cast<int>(threadIdx.x); i < used; i += kSliceThreads)
      s = {smaller(s.low, keys[i]), larger(s.high, keys[i])};
    s = {warp_reduce(s.low, smaller), warp_reduce(s.high, larger)};
    constexpr int kWarps = kSliceThreads / 32;
    if (lane_id() == 0) {
      shared->key_scratch[warp_id()] = s.low;
      shared->key_scratch[kWarps + warp_id()] = s.high;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w)
      s = {smaller(s.low, shared->key_scratch[w]), larger(s.high, shared->key_scratch[kWarps + w])};
    return s;
  }

  // As many bins of equal size as threads, over a span of keys.
  struct Bins {
    Span span;
    int shift;
    __device__ __forceinline__ bool hold(Key key) const { return key - span.low <= span.high - span.low; }
    __device__ __forceinline__ int of(Key key) const { return static_cast<int>((key - span.low) >> shift); }
  };

  __device__ __forceinline__ static Bins bins_of(Span span) {
    const int bits = 64 - __clzll(static_cast<long long>(span.high - span.low));
    return {span, bits > kBinBits ? bits - kBinBits : 0};
  }

  // The histogram of the keys held.
  __device__ __forceinline__ void count_into(Bins bins) {
    shared->histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < used; i += kSliceThreads)
      if (bins.hold(keys[i])) atomicAdd(&shared->histogram[bins.of(keys[i])], 1u);
    __syncthreads();
  }

  // A bound that at least `least` and at most `most` of the keys held reach.
  __device__ __forceinline__ Selected select(int least, int most) {
    Span s = span();
    int above = 0, inside;
    do {  // s holds the key number `least`; `above` keys are larger
      const Bins bins = bins_of(s);
      count_into(bins);
      const int bin = kSliceThreads - 1 - static_cast<int>(threadIdx.x);  // largest keys first
      const unsigned mine = shared->histogram[bin];
      unsigned total;
      const unsigned before = above + block_scan<kSliceThreads>(mine, shared->scratch, &total);
      if (before < static_cast<unsigned>(least) && before + mine >= static_cast<unsigned>(least)) {
        shared->bin = static_cast<unsigned>(bin);
        shared->before = before;
        shared->inside = mine;
      }
      __syncthreads();
      s.low += static_cast<Key>(shared->bin) << bins.shift;
      s.high = s.low + ((Key(1) << bins.shift) - 1);
      above = static_cast<int>(shared->before);
      inside = static_cast<int>(shared->inside);
    } while (above + inside > most);
    return {s.low, above + inside};
  }

  // Moves the keys from `least` on, `count` of them, to the front: what a round writes over was read before its
  // barrier.
  __device__ __forceinline__ void keep(Key least, int count) {
    constexpr int n = kRound / kSliceThreads;
    if (threadIdx.x == 0) shared->count = 0;
    for (int first = 0; first < used; first += kRound) {
      Key key[n];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const int at = first + i * kSliceThreads + static_cast<int>(threadIdx.x);
        key[i] = at < used ? keys[at] : 0;
      }
      __syncthreads();
      append(key, least);
    }
    __syncthreads();
    bound = least;
    used = count;
  }
};

}  // namespace raddpo::cuda
