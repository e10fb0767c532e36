#pragma once
// The children of a node that are left, in chunks, on the host. Always inline: part of every instruction set.
#include "trie_math.h"

namespace raddpo {

template <typename Symbol, int kSize>
struct LiveChunks {
  const LiveBits& live;
  Range children;         // all of them, left or not
  const Symbol* all;      // their symbols
  std::int64_t at = 0;    // children before this one are done
  const Symbol* symbols;  // of this chunk
  int size;               // number of symbols in this chunk, at most kSize
  std::int64_t first;     // node of symbols[0]; with `live`, node of all[0], to which `places` are added
  std::int32_t places[kSize];
  Symbol kept[kSize];

  RADDPO_HD LiveChunks(const TrieView& t, Range range)
      : live(t.live_nodes), children(range), all(static_cast<const Symbol*>(t.symbols) + range.first) {}

  RADDPO_HD std::int64_t node(int i) const { return first + (live.bits ? places[i] : i); }

  // Returns false if there are no more.
  RADDPO_HD bool next() {
    if (!live.bits) {
      symbols = all + at;
      first = children.first + at;
      size = static_cast<int>(children.count - at < kSize ? children.count - at : kSize);
      at += size;
      return size > 0;
    }
    symbols = kept;
    first = children.first;
    size = 0;
    while (at < children.count && size < kSize) {
      const std::int64_t bit = children.first + at;
      std::int64_t n = 64 - bit % 64;
      if (n > children.count - at) n = children.count - at;
      if (n > kSize - size) n = kSize - size;
      std::uint64_t bits = live.bits[bit / 64] >> (bit % 64);
      if (n < 64) bits &= (std::uint64_t(1) << n) - 1;
      if (popcount(bits) == n) {
#pragma omp simd
        for (int i = 0; i < n; ++i) {
          kept[size + i] = all[at + i];
          places[size + i] = static_cast<std::int32_t>(at + i);
        }
        size += static_cast<int>(n);
      } else {
        for (; bits; bits &= bits - 1, ++size) {
          places[size] = static_cast<std::int32_t>(at + count_trailing_zeros(bits));
          kept[size] = all[places[size]];
        }
      }
      at += n;
    }
    return size > 0;
  }
};

}  // namespace raddpo
