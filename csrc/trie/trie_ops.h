#pragma once
// Kernel interface of the trie lookups: each row or node is independent. Raw pointers only.
#include "../trie_index/trie_math.h"

namespace raddpo {

// From tokens [rows, columns] to the nodes [rows, columns + 1] after 0, 1, .. tokens; -1 for a prefix off the trie.
struct TrieWalkArgs {
  TrieView trie;
  const std::int64_t* tokens;
  std::int64_t rows, columns;
  std::int64_t* nodes;
};

RADDPO_HD void trie_walk_row(const TrieWalkArgs& a, std::int64_t row) {
  std::int64_t node = 0;
  std::int64_t* out = a.nodes + row * (a.columns + 1);
  out[0] = 0;
  for (std::int64_t i = 0; i < a.columns; ++i) {
    if (node >= 0)
      node = i < a.trie.levels ? find_child(a.trie, node, static_cast<int>(i), a.tokens[row * a.columns + i]) : -1;
    out[i + 1] = node;
  }
}

// From nodes [count] to the codes [count, sid_levels] on their paths, padded with -1, and their depths, -1 for no node.
struct TriePathsArgs {
  TrieView trie;
  const std::int64_t* nodes;
  std::int64_t count;
  std::int64_t *codes, *depths;
};

RADDPO_HD void trie_path(const TriePathsArgs& a, std::int64_t i) {
  const TrieView& t = a.trie;
  std::int64_t node = a.nodes[i];
  std::int64_t* codes = a.codes + i * t.sid_levels;
  const int depth = is_node(t, node) ? depth_of(t, node) : -1;
  a.depths[i] = depth;
  for (int level = depth < 0 ? 0 : depth; level < t.sid_levels; ++level) codes[level] = -1;
  for (int level = depth - 1; level >= 0; --level) {
    if (level < t.sid_levels) codes[level] = code_of(t, level, symbol_of(t, node));
    node = parent_of(t, node, level + 1);
  }
}

// From nodes [count] to their children or items: the place of the first among all nodes or items that are left, and
// their number; 0, 0 for no node.
struct TrieRangesArgs {
  TrieView trie;
  const std::int64_t* nodes;
  std::int64_t count;
  bool items;
  std::int64_t *first, *number;
};

RADDPO_HD Range live_range(const TrieView& t, std::int64_t node, bool items) {
  if (!is_node(t, node)) return {0, 0};
  return items ? live_of(t.live_items, items_of(t, node)) : live_of(t.live_nodes, children_of(t, node));
}

RADDPO_HD void trie_range(const TrieRangesArgs& a, std::int64_t i) {
  const Range range = live_range(a.trie, a.nodes[i], a.items);
  a.first[i] = range.first;
  a.number[i] = range.count;
}

// The first top_k items of each row of nodes [rows, columns], node after node: their ids, and the columns of the nodes
// that have them; both -1 where a row has no more.
struct TrieTopItemsArgs {
  TrieView trie;
  const std::int64_t* nodes;
  std::int64_t rows, columns, top_k;
  const void* ids;  // int32 [num_items], or int64 where wide_ids
  bool wide_ids;
  std::int64_t num_items;  // left or not
  std::int64_t *items, *owners;
};

// Puts the items of row number `row` that are in `range` at `place` and after it, as far as there is room.
RADDPO_HD void put_items(const TrieTopItemsArgs& a, std::int64_t row, std::int64_t column, Range range,
                         std::int64_t place) {
  const std::int64_t end = place + range.count < a.top_k ? place + range.count : a.top_k;
  for (std::int64_t at = place; at < end; ++at) {
    const std::int64_t number = nth_live(a.trie.live_items, a.num_items, range.first + at - place);
    a.items[row * a.top_k + at] =
        a.wide_ids ? static_cast<const std::int64_t*>(a.ids)[number] : static_cast<const std::int32_t*>(a.ids)[number];
    a.owners[row * a.top_k + at] = column;
  }
}

RADDPO_HD void put_nothing(const TrieTopItemsArgs& a, std::int64_t row, std::int64_t place) {
  a.items[row * a.top_k + place] = a.owners[row * a.top_k + place] = -1;
}

// From places [count] among the nodes or items that are left to their numbers; -1 for no such place.
struct TrieSelectArgs {
  LiveBits live;
  std::int64_t size;  // nodes or items in all
  const std::int64_t* places;
  std::int64_t count;
  std::int64_t* numbers;
};

RADDPO_HD void trie_select(const TrieSelectArgs& a, std::int64_t i) {
  const std::int64_t place = a.places[i];
  const bool found = place >= 0 && place < live_before(a.live, a.size);
  a.numbers[i] = found ? nth_live(a.live, a.size, place) : -1;
}

#define RADDPO_DECLARE                                                                             \
  void trie_walk(const TrieWalkArgs& a, std::int64_t begin, std::int64_t end); /* rows */          \
  void trie_paths(const TriePathsArgs& a, std::int64_t begin, std::int64_t end);                   \
  void trie_ranges(const TrieRangesArgs& a, std::int64_t begin, std::int64_t end);                 \
  void trie_top_items(const TrieTopItemsArgs& a, std::int64_t begin, std::int64_t end); /* rows */ \
  void trie_select(const TrieSelectArgs& a, std::int64_t begin, std::int64_t end);
namespace scalar {
RADDPO_DECLARE
}
namespace avx2 {
RADDPO_DECLARE
}
namespace avx512 {
RADDPO_DECLARE
}
#undef RADDPO_DECLARE

namespace cuda {  // each returns cudaError_t
int trie_walk(const TrieWalkArgs& a, CUstream_st* stream);
int trie_paths(const TriePathsArgs& a, CUstream_st* stream);
int trie_ranges(const TrieRangesArgs& a, CUstream_st* stream);
int trie_top_items(const TrieTopItemsArgs& a, CUstream_st* stream);
int trie_select(const TrieSelectArgs& a, CUstream_st* stream);
}  // namespace cuda

}  // namespace raddpo
