// Nodes are numbered breadth first in both tries, so the nodes of the added trie, in order, go into the sequences of
// the other trie from front to back. One pass finds their places, then each sequence is copied with what is between
// them, several at once. The added trie is the smaller one: each node of the other costs only its copy.
#include "trie_merge.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../common/isa.h"
#include "../common/radix_sort.h"
#include "trie_view.h"

namespace raddpo {
namespace {

const std::int64_t* header_of(const std::uint8_t* block) { return reinterpret_cast<const std::int64_t*>(block); }

MergeItems items_of_block(const std::uint8_t* block) {
  const std::int64_t* h = header_of(block);
  return {block + h[kItems], static_cast<int>(h[kItemBytes]), h[kNumItems]};
}

// The first SID below a node, as "the SID of item 7, (1, 2),".
std::string first_sid(const TrieView& view, const MergeItems& items, std::int64_t node) {
  for (Range children; (children = children_of(view, node)).count;) node = children.first;
  std::string codes;
  std::int64_t item_id = 0;  // little endian, as all of the block
  std::memcpy(&item_id, items.ids + items_of(view, node).first * items.bytes, items.bytes);
  for (int depth = depth_of(view, node); depth > 0; node = parent_of(view, node, depth--)) {
    const int level = depth - 1;
    codes = (level ? ", " : "") + std::to_string(code_of(view, level, symbol_of(view, node))) + codes;
  }
  return "the SID of item " + std::to_string(item_id) + ", (" + codes + "),";
}

class Merger {
 public:
  Merger(const std::uint8_t* trie, const std::uint8_t* added)
      : trie_(TrieShape::of(trie)), added_(TrieShape::of(added)), places_(added_.nodes) {
    args_ = {view_of(trie, header_of(trie), nullptr), view_of(added, header_of(added), nullptr), items_of_block(trie),
             items_of_block(added), places_.data()};
  }

  TrieBytes merge(int threads) {
    const std::int64_t bad = RADDPO_CALL_ISA(find_places, args_, fresh_.data(), &fresh_sids_);
    if (bad >= 0) refuse_prefix(bad);
    const TrieShape shape = merged_shape();
    TrieBlock out(shape);
    splice(shape, out, threads);
    std::memcpy(out.section<std::int32_t>(kTokens), args_.trie.tokens, shape.table_size * 4);
    std::memcpy(out.section<std::int32_t>(kCodes), args_.trie.codes, shape.table_size * 4);
    return out.finish(threads);
  }

 private:
  [[noreturn]] void refuse_prefix(std::int64_t added) const {
    const std::int64_t old = places_[added].node;
    const bool old_ends = children_of(args_.trie, old).count == 0;
    const std::string one = first_sid(args_.trie, args_.trie_items, old),
                      other = first_sid(args_.added, args_.added_items, added);
    refuse(old_ends ? one : other, " is a proper prefix of ", old_ends ? other : one,
           " so they need a vocab with eos to tell them apart");
  }

  TrieShape merged_shape() const {
    TrieShape shape = trie_;
    const TrieShape& added = added_;
    shape.items += added.items;
    shape.sids += fresh_sids_;
    std::int64_t fresh = 0;
    for (int d = 0; d <= kMaxLevels; ++d) shape.first_node[d + 1] += fresh += fresh_[d];
    shape.nodes += fresh;
    shape.levels = std::max(shape.levels, added.levels);
    shape.wide_items |= added.wide_items;
    for (int l = 0; !shape.has_vocab && l < shape.sid_levels; ++l)
      shape.set_largest_symbol(l, std::max(shape.sizes[l], added.sizes[l]) - 1);
    return shape;
  }

  void splice(const TrieShape& shape, const TrieBlock& out, int threads) const {
    const std::vector<MergeShare> shares = symbol_shares(threads > 1 ? 4 * threads : 1);
    parallel_tasks(threads, 2 + static_cast<std::int64_t>(shares.size()), [&](int, std::int64_t task) {
      if (task == 0)
        RADDPO_CALL_ISA(splice_children, args_, out.section<std::uint64_t>(kChildBits));
      else if (task == 1)
        RADDPO_CALL_ISA(splice_item_bits, args_, out.section<std::uint64_t>(kItemBits));
      else if (task == 2)
        RADDPO_CALL_ISA(splice_items, args_, out.section<std::uint8_t>(kItems), shape.wide_items ? 8 : 4);
      else
        RADDPO_CALL_ISA(splice_symbols, args_, shares[task - 3], shares[task - 2], out.section<std::uint8_t>(kSymbols),
                        shape.wide() ? 4 : 2);
    });
  }

  // Equal shares of the other trie's nodes, and the end.
  std::vector<MergeShare> symbol_shares(int count) const {
    std::vector<MergeShare> shares;
    std::int64_t added = 0, fresh = 0;
    for (int i = 0; i <= count; ++i) {
      const std::int64_t at = trie_.nodes * i / count;
      for (; added < added_.nodes && (i == count || places_[added].node < at); ++added) fresh += !places_[added].found;
      shares.push_back({at, added, at + fresh});
    }
    return shares;
  }

  TrieShape trie_, added_;
  std::vector<MergePlace> places_;
  MergeArgs args_{};
  std::array<std::int64_t, kMaxLevels + 2> fresh_{};  // per depth, added nodes that the other lacks
  std::int64_t fresh_sids_ = 0;
};

}  // namespace

TrieBytes trie_merge(const std::uint8_t* trie, const std::uint8_t* added, int threads) {
  return Merger(trie, added).merge(threads);
}

}  // namespace raddpo
