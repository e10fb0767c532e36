#pragma once
// Which nodes and items of a trie are left when some items are removed: the live block of trie_view.h. Host only.
#include "trie_block.h"
#include "trie_math.h"
#include "trie_view.h"

namespace raddpo {

struct TrieLiveInput {
  const std::uint8_t* trie;  // the whole block
  const std::uint8_t* live;  // what was left before, or null: all
  const std::int64_t* ids;   // [count], or null
  std::int64_t count;
  const bool* mask;  // [mask_size] by item id, or null; exactly one of `ids` and `mask` is given
  std::int64_t mask_size;
  bool keep;  // `ids`: those that stay (unknown ones are ignored) or those that go (unknown ones are refused)
  int threads;
};

struct TrieLive {
  TrieBytes bytes;
  std::int64_t items, sids, nodes, deepest;  // numbers left; `deepest`: nodes of the last level
};

// Throws std::invalid_argument that names the value.
TrieLive trie_live(const TrieLiveInput& input);

// The first of `ids` that the trie has, or -1 (all >= 0).
std::int64_t first_known(const std::uint8_t* trie, const std::int64_t* ids, std::int64_t count, int threads);

// A plain block of what is left (at least one item, of `sids` SIDs), the same as if it had been built.
TrieBytes trie_compact(const std::uint8_t* trie, const std::uint8_t* live, std::int64_t sids, int threads);

// The declarations below are compiled once per instruction set.

// A set of item ids: one bit per id from 0 to `limit`, whose own bit is 0; or, where ids are sparse, an open hash table
// and one bit per hash.
struct IdSet {
  const std::uint32_t* bits;
  std::int64_t limit;         // unused with a table
  const std::int64_t* slots;  // -1: empty; null: no table
  std::uint64_t mask, slot_mask;
};
RADDPO_HD std::uint64_t slot_of(std::int64_t id) {
  const std::uint64_t x = static_cast<std::uint64_t>(id) * 0x9e3779b97f4a7c15;
  return x ^ x >> 32;
}

// Writes out[w], w in [begin, end): one bit per item, whether the set has it. Of the items with a bit in `live` (null:
// all), returns how many the set has, and an id beyond the set's bits, or -1.
struct Matched {
  std::int64_t count, beyond;
};

#define RADDPO_DECLARE(isa)                                                                                         \
  namespace isa {                                                                                                   \
  Matched match_items(const void* items, bool wide, std::int64_t size, const std::uint64_t* live, const IdSet& set, \
                      std::int64_t begin, std::int64_t end, std::uint64_t* out);                                    \
  /* Whether any of the items [begin, end) is in [least, most]. */                                                  \
  bool any_between(const void* items, bool wide, std::int64_t begin, std::int64_t end, std::int64_t least,          \
                   std::int64_t most);                                                                              \
  void pack_mask(const bool* mask, std::int64_t size, std::uint64_t* bits);                                         \
  void fill_ranks(const std::uint64_t* bits, std::int64_t blocks, std::uint32_t* ranks);                            \
  std::int64_t mark_nodes(const TrieView& t, const std::uint64_t* items, std::int64_t num_items,                    \
                          std::uint64_t* nodes);                                                                    \
  void compact_children(const TrieView& t, std::uint64_t* children);                                                \
  void compact_items(const TrieView& t, std::int64_t num_items, std::uint64_t* items);                              \
  void compact_values(const LiveBits& live, std::int64_t begin, std::int64_t end, const void* from, int bytes,      \
                      void* to, int to_bytes);                                                                      \
  }
RADDPO_DECLARE(scalar)
RADDPO_DECLARE(avx2)
RADDPO_DECLARE(avx512)
#undef RADDPO_DECLARE

}  // namespace raddpo
