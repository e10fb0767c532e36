#pragma once
// Navigation in the trie, on host and device. Every function is O(log) in the trie's size, none allocates.
#include "../common/math.h"
#include "trie.h"

namespace raddpo {

struct Range {
  std::int64_t first, count;
};

// The block that holds zero number i.
RADDPO_HD std::int64_t block_of_zero(const DegreeSequence& s, std::int64_t i) {
  std::int64_t low = s.hints[i / kHintZeros], high = s.hints[i / kHintZeros + 1];
  while (low < high) {  // the last block with at most i zeros before it
    const std::int64_t middle = (low + high + 1) / 2;
    if (s.ranks[middle] <= i)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Position of zero number i, which `block` holds.
RADDPO_HD std::int64_t zero_in_block(const DegreeSequence& s, std::int64_t block, std::int64_t i) {
  int rest = static_cast<int>(i - s.ranks[block]);
  std::int64_t word = block * (kBlockBits / 64);
  for (int zeros; rest >= (zeros = popcount(~s.bits[word])); ++word) rest -= zeros;
  return word * 64 + select_bit(~s.bits[word], rest);
}

RADDPO_HD std::int64_t select_zero(const DegreeSequence& s, std::int64_t i) {
  return zero_in_block(s, block_of_zero(s, i), i);
}

template <typename Sequence>
RADDPO_HD std::int64_t ones_before(const Sequence& s, std::int64_t block) {
  return block * kBlockBits - s.ranks[block];
}

// The block that holds one number i, from `low` to `high`.
template <typename Sequence>
RADDPO_HD std::int64_t block_of_one(const Sequence& s, std::int64_t low, std::int64_t high, std::int64_t i) {
  while (low < high) {
    const std::int64_t middle = (low + high + 1) / 2;
    if (ones_before(s, middle) <= i)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Position of one number i, which `block` holds.
template <typename Sequence>
RADDPO_HD std::int64_t one_in_block(const Sequence& s, std::int64_t block, std::int64_t i) {
  int rest = static_cast<int>(i - ones_before(s, block));
  std::int64_t word = block * (kBlockBits / 64);
  for (int ones; rest >= (ones = popcount(s.bits[word])); ++word) rest -= ones;
  return word * 64 + select_bit(s.bits[word], rest);
}

template <typename Sequence>
RADDPO_HD std::int64_t select_one(const Sequence& s, std::int64_t low, std::int64_t high, std::int64_t i) {
  return one_in_block(s, block_of_one(s, low, high, i), i);
}

// block_of_one from a guess outwards, in steps that double: quick where the guess is good.
template <typename Sequence>
RADDPO_HD std::int64_t block_of_one_near(const Sequence& s, std::int64_t low, std::int64_t high, std::int64_t guess,
                                         std::int64_t i) {
  if (ones_before(s, guess) <= i) {
    low = guess;
    for (std::int64_t step = 1; low + step <= high; step *= 2) {
      if (ones_before(s, low + step) > i) {
        high = low + step - 1;
        break;
      }
      low += step;
    }
  } else {
    high = guess - 1;
    for (std::int64_t step = 1; high - step >= low; step *= 2) {
      if (ones_before(s, high - step) <= i) {
        low = high - step;
        break;
      }
      high -= step + 1;
    }
  }
  return block_of_one(s, low, high, i);
}

// The ones between a position and the next zero, which is zero number i: their numbers, counted from 0.
RADDPO_HD Range ones_from(const DegreeSequence& s, std::int64_t begin, std::int64_t i) {
  const std::uint64_t rest = ~s.bits[begin / 64] >> (begin % 64);
  const std::int64_t end = rest ? begin + count_trailing_zeros(rest) : select_zero(s, i);
  return {begin - i, end - begin};
}

// The ones of node i.
RADDPO_HD Range ones_of(const DegreeSequence& s, std::int64_t i) {
  return ones_from(s, i ? select_zero(s, i - 1) + 1 : 0, i);
}

// All children of a node, left or not.
RADDPO_HD Range children_of(const TrieView& t, std::int64_t node) {
  const Range ones = ones_of(t.children, node);
  return {ones.first + 1, ones.count};  // the root is not a child
}

// Positions in the item list.
RADDPO_HD Range items_of(const TrieView& t, std::int64_t node) { return ones_of(t.items, node); }

RADDPO_HD std::int64_t num_nodes_of(const TrieView& t) { return t.first_node[t.levels + 1]; }

RADDPO_HD bool is_live(const LiveBits& s, std::int64_t i) { return !s.bits || (s.bits[i / 64] >> (i % 64) & 1); }

// How many with a number below i are left.
RADDPO_HD std::int64_t live_before(const LiveBits& s, std::int64_t i) {
  if (!s.bits) return i;
  const std::int64_t block = i / kBlockBits, word = i / 64;
  std::int64_t ones = block * kBlockBits - s.ranks[block];
  for (std::int64_t w = block * (kBlockBits / 64); w < word; ++w) ones += popcount(s.bits[w]);
  return ones + popcount(s.bits[word] & ((std::uint64_t(1) << (i % 64)) - 1));
}

// What is left of a range, counted among all that are left.
RADDPO_HD Range live_of(const LiveBits& s, Range all) {
  if (!s.bits) return all;
  const std::int64_t first = live_before(s, all.first);
  return {first, live_before(s, all.first + all.count) - first};
}

// The number of the i-th that is left, out of `count` in all. The inverse of live_before.
RADDPO_HD std::int64_t nth_live(const LiveBits& s, std::int64_t count, std::int64_t i) {
  return s.bits ? select_one(s, 0, count / kBlockBits, i) : i;
}

// The node at a place among those that are left.
RADDPO_HD std::int64_t node_at(const TrieView& t, std::int64_t place) {
  return nth_live(t.live_nodes, num_nodes_of(t), place);
}

RADDPO_HD bool is_node(const TrieView& t, std::int64_t node) {
  return node >= 0 && node < num_nodes_of(t) && is_live(t.live_nodes, node);
}

RADDPO_HD int depth_of(const TrieView& t, std::int64_t node) {
  int depth = 0;
  while (node >= t.first_node[depth + 1]) ++depth;
  return depth;
}

// Where the one of the edge to a node is, which is number node - 1: before it are as many zeros as nodes before the
// parent, so that it is in a block from `low` to `high`. The guess: as far along the parents' level as the node is
// along its own.
struct ParentBlocks {
  std::int64_t low, high, guess;
};
RADDPO_HD ParentBlocks parent_blocks(const TrieView& t, std::int64_t node, int depth) {
  const std::int64_t one = node - 1, *first = t.first_node + depth;
  const std::int64_t low = (one + first[-1]) / kBlockBits, high = (one + first[0]) / kBlockBits;
  return {low, high, low + (high - low) * (node - first[0]) / (first[1] - first[0])};
}
RADDPO_HD std::int64_t parent_block(const TrieView& t, std::int64_t node, const ParentBlocks& b) {
  return block_of_one_near(t.children, b.low, b.high, b.guess, node - 1);
}
RADDPO_HD std::int64_t parent_in_block(const TrieView& t, std::int64_t node, std::int64_t block) {
  return one_in_block(t.children, block, node - 1) - (node - 1);
}

// The parent of a node other than the root, at its depth.
RADDPO_HD std::int64_t parent_of(const TrieView& t, std::int64_t node, int depth) {
  return parent_in_block(t, node, parent_block(t, node, parent_blocks(t, node, depth)));
}

RADDPO_HD std::int64_t symbol_of(const TrieView& t, std::int64_t node) {
  return t.wide ? static_cast<const std::uint32_t*>(t.symbols)[node]
                : static_cast<const std::uint16_t*>(t.symbols)[node];
}

RADDPO_HD std::int32_t token_of(const TrieView& t, int level, std::int64_t symbol) {
  return t.table[level] < 0 ? static_cast<std::int32_t>(t.first_token[level] + symbol)
                            : t.tokens[t.table[level] + symbol];
}

// The largest token id of a level.
RADDPO_HD std::int32_t last_token_of(const TrieView& t, int level) {
  return token_of(t, level, t.num_symbols[level] - 1);
}

RADDPO_HD std::int32_t code_of(const TrieView& t, int level, std::int64_t symbol) {
  return t.table[level] < 0 ? static_cast<std::int32_t>(symbol) : t.codes[t.table[level] + symbol];
}

// A token id's rank among those of its level, or -1.
RADDPO_HD std::int64_t symbol_of_token(const TrieView& t, int level, std::int64_t token) {
  std::int64_t symbol = token - t.first_token[level];
  if (t.table[level] >= 0) {
    const std::int32_t* tokens = t.tokens + t.table[level];
    std::int32_t low = 0, high = t.num_symbols[level];
    while (low < high) {
      const std::int32_t middle = (low + high) / 2;
      if (tokens[middle] < token)
        low = middle + 1;
      else
        high = middle;
    }
    symbol = low < t.num_symbols[level] && tokens[low] == token ? low : -1;
  }
  return symbol < 0 || symbol >= t.num_symbols[level] ? -1 : symbol;
}

// Where among a node's children, whose symbols ascend, a symbol's first place is: as many of the level's symbols as the
// node lacks may be missing before it.
RADDPO_HD Range places_of_symbol(const TrieView& t, int level, Range children, std::int64_t symbol) {
  const std::int64_t missing = t.num_symbols[level] - children.count;
  const std::int64_t low = symbol < missing ? 0 : symbol - missing,
                     high = symbol < children.count ? symbol : children.count;
  return {children.first + low, high - low};
}

// The child of `node` (at depth `level`) along token id `token`, or -1.
RADDPO_HD std::int64_t find_child(const TrieView& t, std::int64_t node, int level, std::int64_t token) {
  const std::int64_t symbol = symbol_of_token(t, level, token);
  if (symbol < 0) return -1;
  const Range children = children_of(t, node);
  const Range inside = places_of_symbol(t, level, children, symbol);
  std::int64_t low = inside.first, high = inside.first + inside.count;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (symbol_of(t, middle) < symbol)
      low = middle + 1;
    else
      high = middle;
  }
  const bool found = low < children.first + children.count && symbol_of(t, low) == symbol;
  return found && is_live(t.live_nodes, low) ? low : -1;
}

}  // namespace raddpo
