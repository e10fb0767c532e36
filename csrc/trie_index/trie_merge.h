#pragma once
// Merges two tries without a new build. Host only, no torch.
#include "trie_block.h"
#include "trie_math.h"

namespace raddpo {

// Merges `added` into `trie`: finished blocks of the same vocab and of distinct items. The result is that of a build of
// the items of both, within a SID those of `trie` first. Throws std::invalid_argument if a SID of one is a proper
// prefix of a SID of the other.
TrieBytes trie_merge(const std::uint8_t* trie, const std::uint8_t* added, int threads);

// The declarations below are compiled once per instruction set.

// Where a node of the added trie goes: it is node `node` of the other (`found`), or is inserted before that.
struct MergePlace {
  std::uint32_t node;
  std::uint32_t ones;  // where the other's children sequence takes ones for its children
  bool found;
};

struct MergeItems {
  const std::uint8_t* ids;
  int bytes;  // of an id
  std::int64_t count;
};

struct MergeArgs {
  TrieView trie, added;
  MergeItems trie_items, added_items;
  MergePlace* places;  // per node of the added trie
};

// What the added nodes of a share have that the other trie lacks.
struct FreshNodes {
  std::int64_t children = 0, sids = 0;
  std::int64_t bad = -1;  // a node that has children where the other's is a leaf, or the other way round
};

// Where a share of the merge begins: at a node of the other trie, and at the first added node that goes there or
// behind.
struct MergeShare {
  std::int64_t node, added;
  std::int64_t fresh, fresh_children;  // of the added nodes before: that the other lacks, and such children of them
};

// The bits of a share's first word of the result, where the share before it ends.
struct BitHead {
  std::int64_t word;
  std::uint64_t bits;
};

#define RADDPO_DECLARE(isa)                                                                                            \
  namespace isa {                                                                                                      \
  /* Fills the places of the children of the added nodes [begin, end), which are of one depth and have theirs. */      \
  FreshNodes find_places(const MergeArgs& m, std::int64_t begin, std::int64_t end);                                    \
  /* Write the result between two shares' beginnings. */                                                               \
  void splice_children(const MergeArgs& m, const MergeShare& begin, const MergeShare& end, std::uint64_t* out,         \
                       BitHead* head);                                                                                 \
  void splice_item_bits(const MergeArgs& m, const MergeShare& begin, const MergeShare& end, std::uint64_t* out,        \
                        BitHead* head);                                                                                \
  void splice_items(const MergeArgs& m, const MergeShare& begin, const MergeShare& end, std::uint8_t* out, int bytes); \
  void splice_symbols(const MergeArgs& m, const MergeShare& begin, const MergeShare& end, std::uint8_t* out,           \
                      int bytes);                                                                                      \
  }
RADDPO_DECLARE(scalar)
RADDPO_DECLARE(avx2)
RADDPO_DECLARE(avx512)
#undef RADDPO_DECLARE

}  // namespace raddpo
