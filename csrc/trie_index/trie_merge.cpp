// Nodes are numbered breadth first in both tries, so the nodes of the added trie, in order, go into the sequences of
// the other trie from front to back. One pass finds their places, depth after depth, then each sequence is copied with
// what goes between, in shares. The added trie is the smaller one: each node of the other costs only its copy.
#include "trie_merge.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../common/buffer.h"
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
             items_of_block(added), places_.get()};
  }

  TrieBytes merge(int threads) {
    find_places(threads);
    const TrieShape shape = merged_shape();
    TrieBlock out(shape);
    splice(shape, out, threads);
    std::memcpy(out.section<std::int32_t>(kTokens), args_.trie.tokens, shape.table_size * 4);
    std::memcpy(out.section<std::int32_t>(kCodes), args_.trie.codes, shape.table_size * 4);
    return out.finish(threads);
  }

 private:
  static constexpr std::int64_t kGrain = 2048;  // added nodes that are worth a thread

  // Depth after depth: a node's place gives those of its children.
  void find_places(int threads) {
    places_[0] = {0, 0, true};
    for (int depth = 0; depth <= added_.levels; ++depth) {
      const std::int64_t first = added_.first_node[depth], count = added_.first_node[depth + 1] - first;
      std::vector<FreshNodes> shares(std::clamp<std::int64_t>(count / kGrain, 1, threads));
      parallel_shares(static_cast<int>(shares.size()), count, [&](int t, std::int64_t begin, std::int64_t end) {
        shares[t] = RADDPO_CALL_ISA(find_places, args_, first + begin, first + end);
      });
      for (const FreshNodes& share : shares) {
        if (share.bad >= 0) refuse_prefix(share.bad);
        fresh_[depth + 1] += share.children;
        fresh_sids_ += share.sids;
      }
    }
  }

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
    const std::vector<MergeShare> shares = shares_of(threads > 1 ? 4 * threads : 1);
    const auto count = static_cast<std::int64_t>(shares.size()) - 1;
    auto *child_bits = out.section<std::uint64_t>(kChildBits), *item_bits = out.section<std::uint64_t>(kItemBits);
    zero_from(2 * shape.nodes - 1, child_bits, out.section<std::uint64_t>(kChildRanks));
    zero_from(shape.nodes + shape.items, item_bits, out.section<std::uint64_t>(kItemRanks));
    std::vector<BitHead> child_heads(count), item_heads(count);
    parallel_tasks(threads, 4 * count, [&](int, std::int64_t task) {
      const std::int64_t i = task / 4;
      const MergeShare &begin = shares[i], &end = shares[i + 1];
      if (task % 4 == 0)
        RADDPO_CALL_ISA(splice_children, args_, begin, end, child_bits, &child_heads[i]);
      else if (task % 4 == 1)
        RADDPO_CALL_ISA(splice_item_bits, args_, begin, end, item_bits, &item_heads[i]);
      else if (task % 4 == 2)
        RADDPO_CALL_ISA(splice_items, args_, begin, end, out.section<std::uint8_t>(kItems), shape.wide_items ? 8 : 4);
      else
        RADDPO_CALL_ISA(splice_symbols, args_, begin, end, out.section<std::uint8_t>(kSymbols), shape.wide() ? 4 : 2);
    });
    for (const BitHead& head : child_heads) child_bits[head.word] |= head.bits;
    for (const BitHead& head : item_heads) item_bits[head.word] |= head.bits;
  }

  // What is behind the last bit of a sequence, up to the next section.
  static void zero_from(std::int64_t bit, std::uint64_t* words, std::uint64_t* end) {
    std::fill(words + bit / 64, end, 0);
  }

  // Equal shares of the other trie's nodes, and the end.
  std::vector<MergeShare> shares_of(int count) const {
    const auto places_end = places_.get() + added_.nodes;
    std::vector<MergeShare> shares;
    FreshBefore nodes{places_.get()}, children{places_.get()};
    for (int i = 0; i <= count; ++i) {
      const std::int64_t node = trie_.nodes * i / count;
      const auto behind =
          std::partition_point(places_.get(), places_end, [&](const MergePlace& place) { return place.node < node; });
      const std::int64_t added = i < count ? behind - places_.get() : added_.nodes;
      shares.push_back({node, added, 0, 0});
      if (!added || i == count) continue;  // nothing is before, nothing begins there
      shares.back().fresh = nodes.count_to(added);
      shares.back().fresh_children = children.count_to(select_zero(args_.added.children, added - 1) + 2 - added);
    }
    return shares;
  }

  // Counts added nodes that the other trie lacks, in ascending order.
  struct FreshBefore {
    const MergePlace* places;
    std::int64_t node = 0, count = 0;
    std::int64_t count_to(std::int64_t end) {
      for (; node < end; ++node) count += !places[node].found;
      return count;
    }
  };

  TrieShape trie_, added_;
  Buffer<MergePlace> places_;
  MergeArgs args_{};
  std::array<std::int64_t, kMaxLevels + 2> fresh_{};  // per depth, added nodes that the other lacks
  std::int64_t fresh_sids_ = 0;
};

}  // namespace

TrieBytes trie_merge(const std::uint8_t* trie, const std::uint8_t* added, int threads) {
  return Merger(trie, added).merge(threads);
}

}  // namespace raddpo
