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

// Where a share of the symbols begins: in the other trie, in the added one, and in the result.
struct MergeShare {
  std::int64_t at, added, out;
};

#define RADDPO_DECLARE(isa)                                                                                            \
  namespace isa {                                                                                                      \
  /* Fills the places; counts, per depth, the added nodes that the other lacks, and the SIDs. Returns an added node */ \
  /* that has children where the other's is a leaf, or the other way round; -1 if there is none. */                    \
  std::int64_t find_places(const MergeArgs& m, std::int64_t* fresh, std::int64_t* fresh_sids);                         \
  void splice_children(const MergeArgs& m, std::uint64_t* out);                                                        \
  void splice_item_bits(const MergeArgs& m, std::uint64_t* out);                                                       \
  void splice_items(const MergeArgs& m, std::uint8_t* out, int bytes);                                                 \
  void splice_symbols(const MergeArgs& m, const MergeShare& begin, const MergeShare& end, std::uint8_t* out,           \
                      int bytes);                                                                                      \
  }
RADDPO_DECLARE(scalar)
RADDPO_DECLARE(avx2)
RADDPO_DECLARE(avx512)
#undef RADDPO_DECLARE

}  // namespace raddpo
