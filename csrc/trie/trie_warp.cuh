#pragma once
// children_of (trie_math.h) by a whole warp, for a single lookup that all other work waits for: 32 probes per step of
// the search instead of one. Every lane gets the result.
#include "../common/cuda_block.cuh"
#include "../trie_index/trie_math.h"

namespace raddpo::cuda {

__device__ __forceinline__ std::int64_t warp_select_zero(const DegreeSequence& s, std::int64_t i) {
  std::int64_t low = s.hints[i / kHintZeros], high = s.hints[i / kHintZeros + 1];
  while (low < high) {  // the last block with at most i zeros before it
    const std::int64_t step = (high - low + 31) / 32, probe = low + (lane_id() + 1) * step;
    const bool reached = probe <= high && s.ranks[probe] <= i;
    low += __popc(__ballot_sync(kAllLanes, reached)) * step;
    if (low + step - 1 < high) high = low + step - 1;
  }
  // A block is 8 words, one per lane of 8: finds the word with the zero.
  constexpr int kWords = kBlockBits / 64;
  const int lane = lane_id() % kWords;
  const std::uint64_t zeros = ~s.bits[low * kWords + lane];
  const int mine = popcount(zeros);
  int through = mine;
#pragma unroll
  for (int d = 1; d < kWords; d *= 2) {
    const int other = __shfl_up_sync(kAllLanes, through, d, kWords);
    if (lane >= d) through += other;
  }
  const int rest = static_cast<int>(i - s.ranks[low]);
  const int word = __popc(__ballot_sync(kAllLanes, through <= rest) & ((1u << kWords) - 1));
  const int in_word = rest - __shfl_sync(kAllLanes, through - mine, word);
  const std::uint64_t bits = __shfl_sync(kAllLanes, zeros, word);
  return (low * kWords + word) * 64 + select_bit(bits, in_word);
}

__device__ __forceinline__ Range warp_children_of(const TrieView& t, std::int64_t node) {
  const DegreeSequence& s = t.children;
  const std::int64_t begin = node ? warp_select_zero(s, node - 1) + 1 : 0;
  const std::uint64_t rest = ~s.bits[begin / 64] >> (begin % 64);
  const std::int64_t end = rest ? begin + count_trailing_zeros(rest) : warp_select_zero(s, node);
  return {begin - node + 1, end - begin};
}

}  // namespace raddpo::cuda
