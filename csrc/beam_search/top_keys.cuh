#pragma once
// The largest of a stream of distinct 64-bit keys, found by a team: one block, or the blocks of a cluster, each of
// which takes in a part of the keys. A block gathers keys in a buffer, and when it is full a histogram of the range
// they span finds a bound that at least `want` and at most `limit` of them reach. `limit` leaves slack above `want`, so
// that one histogram nearly always does; keys being distinct, it always ends. In the end a histogram of all the team's
// keys finds such a bound, and tells where each bin's keys belong among the largest: each block gets a range of them,
// and sorts it.
#include "../common/cuda_block.cuh"

namespace raddpo::cuda {

using Key = std::uint64_t;  // 0: none

constexpr int kSliceThreads = 512;  // of a block, and bins of a histogram
constexpr int kBinBits = 9;
static_assert(kSliceThreads == 1 << kBinBits);
constexpr int kRound = 4 * kSliceThreads;  // keys taken in at a time
constexpr int kFewKeys = 128;              // that one block sorts faster by counting
constexpr int kCluster = 8;                // blocks that every GPU with clusters supports

// This block's team: itself, or its cluster, whose blocks all call the same functions of the team.
struct Team {
  int size, rank;  // size: 1 or kCluster
  __device__ __forceinline__ void sync() const {
    if (size > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
};

// Of keys: the smallest, the largest, and how many there are.
struct Extent {
  Key low, high;
  int count;
};

struct TopKeysShared {
  unsigned count;                        // keys held
  unsigned histogram[2][kSliceThreads];  // one is counted into, from 0, while the team may still read the other
  // Aligned: otherwise its wide reads begin in the histogram, which racecheck takes for a race.
  alignas(16) unsigned scratch[kSliceThreads / 32];
  Key key_scratch[2 * kSliceThreads / 32];
  unsigned bin, before, inside;
  Extent extent;                   // of the keys held, for the team
  unsigned cursor[kSliceThreads];  // place of this block's next key of each bin
  unsigned end[kSliceThreads];     // place behind each bin's keys
  unsigned begin[kCluster + 1];    // place of each block's first key, and their number
};

// Members are the same in every thread; every function is called by the whole block, and those of the team by all.
struct TopKeys {
  Key* keys;  // [capacity + limit], capacity >= limit + kRound
  int capacity, want, limit;
  TopKeysShared* shared;
  Team team;
  Key bound = 0;  // smaller keys are not wanted
  int used = 0;   // at least the number of keys held, exact after gather()
  int turn = 0;   // the team's next histogram

  // First of all, and again once a barrier of the team has followed everything else.
  __device__ __forceinline__ void clear(Key least) {
    if (threadIdx.x == 0) shared->count = 0;
    shared->histogram[0][threadIdx.x] = shared->histogram[1][threadIdx.x] = 0;
    __syncthreads();
    bound = least > 1 ? least : 1;
    used = 0;
  }

  template <int n>
  __device__ __forceinline__ void push(const Key (&x)[n]) {
    static_assert(n * kSliceThreads <= kRound);
    if (used + n * kSliceThreads > capacity) {
      gather();
      if (used > limit) keep(select(Team{1, 0}, extent_of_block(), 0, want, limit).low);
      __syncthreads();  // their number was read by all before the next key is pushed
    }
    append(x, bound);
    used += n * kSliceThreads;
  }

  // Makes the keys held visible to the block.
  __device__ __forceinline__ void gather() {
    __syncthreads();
    used = static_cast<int>(shared->count);
  }

  // After gather(), of the team: leaves it at most `limit` keys, of which at least `want`, unless there were fewer.
  // Returns a bound that at least k <= `want` of them reach, and few more; 0 if there are fewer, or if k is 0.
  __device__ __forceinline__ Key shrink(int k) {
    const Extent all = extent();
    if (all.count > limit) keep(select(team, all, 0, want, limit).low);
    return k == 0 || all.count < k ? 0 : select(team, all, 0, k, k + k / 4 + 32).low;
  }

  struct Share {
    const Key* keys;
    int begin, end;  // this block has keys[begin, end) of the team's largest, in order
    int count;       // of the team's
  };

  // After gather(), of the team: its keys number 0 to `want`, largest first, of which each block has a part.
  __device__ __forceinline__ Share sorted() {
    if (team.size == 1 && used <= kFewKeys) {
      sort_few();
      const int count = used < want ? used : want;
      return {moved(), 0, count, count};
    }
    const Extent all = extent();
    if (!all.count) {
      team.sync();  // others may still read what this block has told them
      return {keys, 0, 0, 0};
    }
    Bins bins = bins_of(all);
    Tally t = tally(team, bins, 0, all.count < want ? all.count : want);
    if (t.count > limit) {
      const Selected best = select(team, t.chosen(bins), t.count - t.inside, want, limit);
      bins = bins_of({best.low, all.high, best.count});
      t = tally(team, bins, 0, best.count);
    }
    distribute(bins, t);
    sort_share(bins);
    const int begin = static_cast<int>(shared->begin[team.rank]), end = static_cast<int>(shared->begin[team.rank + 1]);
    return {keys, begin, end < want ? end : want, t.count < want ? t.count : want};
  }

 private:
  __device__ __forceinline__ Key* moved() const { return keys + capacity; }

  struct Selected {
    Key low;
    int count;  // of the keys held that reach it
  };

  // As many bins of equal size as threads, over a range of keys.
  struct Bins {
    Key low, high;
    int shift;
    __device__ __forceinline__ bool hold(Key key) const { return key - low <= high - low; }
    __device__ __forceinline__ int of(Key key) const { return static_cast<int>((key - low) >> shift); }
    __device__ __forceinline__ Key low_of(int bin) const { return low + (static_cast<Key>(bin) << shift); }
  };

  __device__ __forceinline__ static Bins bins_of(const Extent& e) {
    const int bits = 64 - __clzll(static_cast<long long>(e.high - e.low));
    return {e.low, e.high, bits > kBinBits ? bits - kBinBits : 0};
  }

  // The team's keys by bins, of which a thread has one, the first thread the largest: `mine` keys in it, `earlier` of
  // them in blocks before this one, and `before` in the bins above. The chosen bin has the key that was asked for,
  // `inside` keys are in it, and `count` in it and above.
  struct Tally {
    unsigned mine, earlier, before;
    int bin, inside, count;
    __device__ __forceinline__ Extent chosen(const Bins& bins) const {
      return {bins.low_of(bin), bins.low_of(bin) + ((Key(1) << bins.shift) - 1), inside};
    }
  };

  __device__ __forceinline__ static int my_bin() { return kSliceThreads - 1 - static_cast<int>(threadIdx.x); }

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

  // A warp counts the keys above each of its own.
  __device__ __forceinline__ void sort_few() {
    for (int i = warp_id(); i < used; i += kSliceThreads / 32) {
      const Key key = keys[i];
      int rank = 0;
      for (int first = 0; first < used; first += 32) {
        const int j = first + lane_id();
        rank += __popc(__ballot_sync(kAllLanes, j < used && keys[j] > key));
      }
      if (lane_id() == 0 && rank < limit) moved()[rank] = key;
    }
    __syncthreads();
  }

  // Moves the keys of the chosen bin and above to the blocks that have their places: bin after bin, and a bin's in any
  // order. A block has whole bins, those that begin in its even part of all places.
  __device__ __forceinline__ void distribute(const Bins& bins, const Tally& t) {
    const auto count = static_cast<std::uint64_t>(t.count), size = static_cast<std::uint64_t>(team.size);
    const std::uint64_t end = t.before + t.mine;
    shared->end[my_bin()] = static_cast<unsigned>(end);
    shared->cursor[my_bin()] = t.before + t.earlier;
    for (std::uint64_t block = 1; block < size; ++block)
      if (t.before * size < block * count && block * count <= end * size)
        shared->begin[block] = static_cast<unsigned>(end);
    if (threadIdx.x == 0) {
      shared->begin[0] = 0;
      shared->begin[team.size] = static_cast<unsigned>(t.count);
    }
    __syncthreads();
    const Key low = bins.low_of(t.bin);
    for (int i = static_cast<int>(threadIdx.x); i < used; i += kSliceThreads) {
      const Key key = keys[i];
      if (key < low) continue;
      const int bin = bins.of(key);
      const unsigned place = atomicAdd(&shared->cursor[bin], 1u);
      const int owner = static_cast<int>(begin_of(bin) * size / count);
      (owner == team.rank ? moved() : shared_of(moved(), owner))[place] = key;
    }
    team.sync();
  }

  __device__ __forceinline__ std::uint64_t begin_of(int bin) const {
    return bin == kSliceThreads - 1 ? 0 : shared->end[bin + 1];
  }

  // Ranks each of this block's keys among its bin's few.
  __device__ __forceinline__ void sort_share(const Bins& bins) {
    const int begin = static_cast<int>(shared->begin[team.rank]), end = static_cast<int>(shared->begin[team.rank + 1]);
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kSliceThreads) {
      const Key key = moved()[i];
      const int bin = bins.of(key), last = static_cast<int>(shared->end[bin]);
      int rank = static_cast<int>(begin_of(bin));
      for (int j = rank; j < last; ++j) rank += moved()[j] > key;
      keys[rank] = key;
    }
    __syncthreads();
  }

  __device__ __forceinline__ static Key smaller(Key a, Key b) { return a < b ? a : b; }
  __device__ __forceinline__ static Key larger(Key a, Key b) { return a > b ? a : b; }

  __device__ __forceinline__ Extent extent_of_block() const {
    Key low = ~Key(0), high = 0;
    for (int i = static_cast<int>(threadIdx.x); i < used; i += kSliceThreads) {
      low = smaller(low, keys[i]);
      high = larger(high, keys[i]);
    }
    low = warp_reduce(low, smaller);
    high = warp_reduce(high, larger);
    constexpr int kWarps = kSliceThreads / 32;
    if (lane_id() == 0) {
      shared->key_scratch[warp_id()] = low;
      shared->key_scratch[kWarps + warp_id()] = high;
    }
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      low = smaller(low, shared->key_scratch[w]);
      high = larger(high, shared->key_scratch[kWarps + w]);
    }
    return {low, high, used};
  }

  // Of the team's keys. A lane reads a block's.
  __device__ __forceinline__ Extent extent() const {
    Extent e = extent_of_block();
    if (team.size == 1) return e;
    if (threadIdx.x == 0) shared->extent = e;
    team.sync();
    e = *shared_of(&shared->extent, lane_id() % kCluster);
    const int count = lane_id() < kCluster ? e.count : 0;
    return {warp_reduce(e.low, smaller), warp_reduce(e.high, larger),
            warp_reduce(count, [](int a, int b) { return a + b; })};
  }

  // Of the keys of a team: this one, or the block alone. `above` keys are above the bins; the chosen one has the key
  // number `least`. Leaves the next histogram empty.
  __device__ __forceinline__ Tally tally(const Team& of, const Bins& bins, int above, int least) {
    unsigned* histogram = shared->histogram[turn];
    for (int i = static_cast<int>(threadIdx.x); i < used; i += kSliceThreads)
      if (bins.hold(keys[i])) atomicAdd(&histogram[bins.of(keys[i])], 1u);
    of.sync();
    Tally t{0, 0, 0, 0, 0, 0};
    if (of.size > 1) {
#pragma unroll
      for (int block = 0; block < kCluster; ++block) {
        const unsigned n = shared_of(histogram, block)[my_bin()];
        t.mine += n;
        t.earlier += block < of.rank ? n : 0;
      }
      turn ^= 1;
    } else {
      t.mine = histogram[my_bin()];
    }
    shared->histogram[turn][my_bin()] = 0;  // which the team has read before its last barrier
    unsigned total;
    t.before = above + block_scan<kSliceThreads>(t.mine, shared->scratch, &total);
    if (t.before < static_cast<unsigned>(least) && t.before + t.mine >= static_cast<unsigned>(least)) {
      shared->bin = static_cast<unsigned>(my_bin());
      shared->before = t.before;
      shared->inside = t.mine;
    }
    __syncthreads();
    t.bin = static_cast<int>(shared->bin);
    t.inside = static_cast<int>(shared->inside);
    t.count = static_cast<int>(shared->before) + t.inside;
    return t;
  }

  // A bound that at least `least` and at most `most` of a team's keys reach. `among`: those that have the key number
  // `least`; `above` keys are larger.
  __device__ __forceinline__ Selected select(const Team& of, Extent among, int above, int least, int most) {
    Tally t;
    do {
      const Bins bins = bins_of(among);
      t = tally(of, bins, above, least);
      among = t.chosen(bins);
      above = t.count - t.inside;
    } while (t.count > most);
    return {among.low, t.count};
  }

  // Moves the keys from `least` on to the front: what a round writes over was read before its barrier.
  __device__ __forceinline__ void keep(Key least) {
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
    if (least > bound) bound = least;
    gather();
  }
};

}  // namespace raddpo::cuda
