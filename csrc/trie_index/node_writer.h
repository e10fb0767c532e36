#pragma once
// Writes sorted SIDs' nodes and items into a block, each depth from front to back. Host only.
#include <algorithm>
#include <array>
#include <cstdint>

#include "packing.h"
#include "sid_rows.h"
#include "trie_block.h"

namespace raddpo {

// Numbers of nodes and items per depth.
struct Counts {
  Depths nodes{}, items{};
};

constexpr std::uint8_t kRepeat = 255;  // instead of a common prefix's length: the SID of the row before, again

// Sets bits in ascending order; neighbours may share a word across threads and depths.
struct BitWriter {
  std::uint64_t* bits = nullptr;
  std::int64_t word = 0;
  std::uint64_t value = 0;
  void set(std::int64_t position) {
    if (position >> 6 != word) {
      flush();
      word = position >> 6;
    }
    value |= std::uint64_t(1) << (position & 63);
  }
  void flush() {
    if (value) __atomic_fetch_or(bits + word, value, __ATOMIC_RELAXED);
    value = 0;
  }
};

// Of one thread, which has a share of the rows.
template <typename Symbol, typename Item>
class NodeWriter {
 public:
  static constexpr int kStretch = 2048;  // rows that stay in cache while their depths are written one by one

  // `before`: what the shares before this one have.
  NodeWriter(const TrieBlock& out, const Depths& first_node, const Depths& first_item, const Counts& before)
      : symbols_(out.section<Symbol>(kSymbols)), items_(out.section<Item>(kItems)) {
    for (int d = 0; d <= kMaxLevels; ++d) {
      node_[d] = first_node[d] + before.nodes[d];
      item_[d] = first_item[d] + before.items[d];
      child_bits_[d].bits = out.section<std::uint64_t>(kChildBits);
      item_bits_[d].bits = out.section<std::uint64_t>(kItemBits);
    }
    node_[0] = 1;
  }

  // The next rows, up to kStretch. `prefixes`: what each shares with the row before it.
  template <typename T, typename Row>
  void write(const SidRows<T>& sids, const Packing& p, const Row* rows, const std::uint8_t* prefixes, int count,
             int levels) {
    for (int k = 0; k < count; ++k) {
      const std::int64_t row = p.row_of(rows[k]);
      lengths_[k] = static_cast<std::uint8_t>(sids.length_of(row));
      sids.prefetch(row, p.words > 1);
    }
    for (int d = levels; d > 0; --d)  // upwards, because a depth needs its parents' number before these rows
      write_depth(d, sids, p, rows, prefixes, count);
  }

  // After the last rows.
  void flush() {
    for (BitWriter& writer : child_bits_) writer.flush();
    for (BitWriter& writer : item_bits_) writer.flush();
  }

 private:
  // The nodes of a depth that the rows open, and the items of those that end there.
  template <typename T, typename Row>
  void write_depth(int depth, const SidRows<T>& sids, const Packing& p, const Row* rows, const std::uint8_t* prefixes,
                   int count) {
    const int level = depth - 1;
    int opened = 0;
    std::int64_t node = node_[depth], item = item_[depth], parent = node_[depth - 1] - 1;
    BitWriter child_bits = child_bits_[depth], item_bits = item_bits_[depth];
    for (int k = 0; k < count; ++k) {
      parent += prefixes[k] < depth - 1 && lengths_[k] >= depth - 1;
      if (prefixes[k] < depth && lengths_[k] >= depth) {
        opened_[opened++] = static_cast<Symbol>(p.word[level] ? sids.symbol(p.row_of(rows[k]), level)
                                                              : p.value_of(rows[k], level) - sids.absent());
        child_bits.set(node++ - 1 + parent);
      }
      if (lengths_[k] == depth) {
        items_[item] = static_cast<Item>(sids.item_id(p.row_of(rows[k])));
        item_bits.set(item++ + node - 1);
      }
    }
    std::copy_n(opened_.begin(), opened, symbols_ + node_[depth]);
    node_[depth] = node;
    item_[depth] = item;
    child_bits_[depth] = child_bits;
    item_bits_[depth] = item_bits;
  }

  Symbol* symbols_;
  Item* items_;
  Depths node_{}, item_{};  // the next of each depth
  std::array<BitWriter, kMaxLevels + 1> child_bits_{}, item_bits_{};
  std::array<std::uint8_t, kStretch> lengths_;
  std::array<Symbol, kStretch> opened_;
};

}  // namespace raddpo
