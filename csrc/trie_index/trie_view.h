#pragma once
// The view that lookups take: a block of bytes, and the live block that says what is left of it.
#include <cstdint>

#include "trie.h"

namespace raddpo {

// Where a live block's sections begin, in bytes. All but the ranks begin at a multiple of 64.
struct LiveLayout {
  std::int64_t node_ranks, item_bits, item_ranks, bytes;

  LiveLayout(std::int64_t nodes, std::int64_t items) {
    node_ranks = blocks_of(nodes) * (kBlockBits / 8);
    item_bits = node_ranks + (blocks_of(nodes) * 4 + 63) / 64 * 64;
    item_ranks = item_bits + blocks_of(items) * (kBlockBits / 8);
    bytes = item_ranks + blocks_of(items) * 4;
  }
  static std::int64_t blocks_of(std::int64_t count) { return count / kBlockBits + 1; }  // bit number `count` has a rank
};

// `data`: the block, in any memory; `h`: its header words, on the host; `live`: in the memory of `data`, or null.
inline TrieView view_of(const std::uint8_t* data, const std::int64_t* h, const std::uint8_t* live) {
  const auto sequence = [&](int word) {
    return DegreeSequence{reinterpret_cast<const std::uint64_t*>(data + h[word]),
                          reinterpret_cast<const std::uint32_t*>(data + h[word + 1]),
                          reinterpret_cast<const std::uint32_t*>(data + h[word + 2])};
  };
  TrieView t{};
  t.children = sequence(kChildBits);
  t.items = sequence(kItemBits);
  t.symbols = data + h[kSymbols];
  t.tokens = reinterpret_cast<const std::int32_t*>(data + h[kTokens]);
  t.codes = reinterpret_cast<const std::int32_t*>(data + h[kCodes]);
  for (int d = 0; d < kMaxLevels + 2; ++d) t.first_node[d] = h[kFirstNode + d];
  for (int l = 0; l < kMaxLevels; ++l) {
    t.num_symbols[l] = static_cast<std::int32_t>(h[kNumSymbols + l]);
    t.table[l] = static_cast<std::int32_t>(h[kTable + l]);
    t.first_token[l] = static_cast<std::int32_t>(h[kFirstToken + l]);
  }
  t.levels = static_cast<std::int32_t>(h[kLevels]);
  t.sid_levels = static_cast<std::int32_t>(h[kSidLevels]);
  t.wide = static_cast<std::int32_t>(h[kWide]);
  if (live) {
    const LiveLayout at(h[kNumNodes], h[kNumItems]);
    t.live_nodes = {reinterpret_cast<const std::uint64_t*>(live),
                    reinterpret_cast<const std::uint32_t*>(live + at.node_ranks)};
    t.live_items = {reinterpret_cast<const std::uint64_t*>(live + at.item_bits),
                    reinterpret_cast<const std::uint32_t*>(live + at.item_ranks)};
  }
  return t;
}

}  // namespace raddpo
