// Nodes are numbered breadth first in both tries, so the nodes of the added trie, in order, go into the sequences of
// the other trie from front to back. One pass finds their places, a second one copies what is between them. The added
// trie is the smaller one: each node of the other costs only its copy.
#include "trie_merge.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "trie_math.h"
#include "trie_view.h"

#define RADDPO_ISA scalar
#include "bit_stream.h"
#undef RADDPO_ISA

namespace raddpo {
namespace {

// Where the bits of nodes are in a degree sequence. Nodes must be asked for in ascending order.
class Degrees {
 public:
  Degrees(const DegreeSequence& sequence, std::int64_t nodes, std::int64_t bits)
      : words_(sequence.bits), nodes_(nodes), bits_(bits) {}

  std::int64_t begin(std::int64_t node) { return node == nodes_ ? bits_ : node ? zero(node - 1) + 1 : 0; }
  std::int64_t zero(std::int64_t node) {  // the zero that ends the node
    for (int zeros; zeros_ + (zeros = popcount(~words_[word_])) <= node; ++word_) zeros_ += zeros;
    return word_ * 64 + select_bit(~words_[word_], static_cast<int>(node - zeros_));
  }

 private:
  const std::uint64_t* words_;
  std::int64_t nodes_, bits_, word_ = 0, zeros_ = 0;
};

// A finished block, read from front to back.
struct Reader {
  TrieShape shape;
  TrieView view;
  Degrees children, items;
  const void* item_ids;

  explicit Reader(const std::uint8_t* block)
      : shape(TrieShape::of(block)),
        view(view_of(block, reinterpret_cast<const std::int64_t*>(block), nullptr)),
        children(view.children, shape.nodes, 2 * shape.nodes - 1),
        items(view.items, shape.nodes, shape.nodes + shape.items),
        item_ids(block + reinterpret_cast<const std::int64_t*>(block)[kItems]) {}

  std::int64_t item(std::int64_t i) const {
    return shape.wide_items ? static_cast<const std::int64_t*>(item_ids)[i]
                            : static_cast<const std::int32_t*>(item_ids)[i];
  }

  // The first SID below a node, as "the SID of item 7, (1, 2),".
  std::string first_sid(std::int64_t node) const {
    for (Range children; (children = children_of(view, node)).count;) node = children.first;
    std::string codes;
    const std::int64_t item_id = item(items_of(view, node).first);
    for (int depth = depth_of(view, node); depth > 0; node = parent_of(view, node, depth--)) {
      const int level = depth - 1;
      codes = (level ? ", " : "") + std::to_string(code_of(view, level, symbol_of(view, node))) + codes;
    }
    return "the SID of item " + std::to_string(item_id) + ", (" + codes + "),";
  }
};

// Copies bits, with insertions.
class BitSplice {
 public:
  BitSplice(const DegreeSequence& from, std::uint64_t* to) : from_(from.bits), out_{to, 0} {}
  void copy_to(std::int64_t end) {
    out_.copy(from_, at_, end);
    at_ = end;
  }
  void put_ones(std::int64_t n) { out_.put_ones(n); }
  void put_zero() { ++out_.at; }

 private:
  const std::uint64_t* from_;
  std::int64_t at_ = 0;
  scalar::BitAppender out_;
};

// Copies symbols or item ids, with insertions. Values may become wider.
class ValueSplice {
 public:
  ValueSplice(const void* from, int from_bytes, void* to, int to_bytes)
      : from_(static_cast<const std::uint8_t*>(from)),
        from_bytes_(from_bytes),
        to_(static_cast<std::uint8_t*>(to)),
        to_bytes_(to_bytes) {}
  void copy_to(std::int64_t end) {
    if (from_bytes_ == to_bytes_) {
      std::memcpy(to_, from_ + at_ * from_bytes_, (end - at_) * to_bytes_);
      to_ += (end - at_) * to_bytes_;
      at_ = end;
    }
    for (; at_ < end; ++at_) {
      std::int64_t value = 0;  // little endian, as all of the block
      std::memcpy(&value, from_ + at_ * from_bytes_, from_bytes_);
      put(value);
    }
  }
  void put(std::int64_t value) {
    std::memcpy(to_, &value, to_bytes_);
    to_ += to_bytes_;
  }

 private:
  const std::uint8_t* from_;
  int from_bytes_;
  std::uint8_t* to_;
  int to_bytes_;
  std::int64_t at_ = 0;
};

// Where a node of the added trie goes: it is node `node` of the other (`found`), or is inserted before that.
struct Place {
  std::uint32_t node;
  bool found;
};

class Merger {
 public:
  Merger(const std::uint8_t* trie, const std::uint8_t* added) : trie_(trie), added_(added) {}

  TrieBytes merge() {
    find_places(Reader(trie_), Reader(added_));
    const TrieShape shape = merged_shape();
    TrieBlock out(shape);
    splice(Reader(trie_), Reader(added_), shape, out);
    return out.finish();
  }

 private:
  void find_places(Reader a, Reader b) {
    places_.resize(b.shape.nodes);
    places_[0] = {0, true};
    for (std::int64_t node = 0, depth = 0; node < b.shape.nodes; ++node) {
      if (node == b.view.first_node[depth + 1]) ++depth;
      const Place place = places_[node];
      const std::int64_t begin = b.children.begin(node), first = begin - node + 1;
      const std::int64_t count = b.children.zero(node) - begin;
      const std::int64_t a_begin = a.children.begin(place.node);
      std::int64_t at = a_begin - place.node + 1;
      const std::int64_t end = at + (place.found ? a.children.zero(place.node) - a_begin : 0);
      if (place.found && (at == end) != (count == 0)) refuse_prefix(a, place.node, b, node);
      fresh_sids_ += !place.found && count == 0;
      for (std::int64_t child = first; child < first + count; ++child) {
        const std::int64_t symbol = symbol_of(b.view, child);
        std::int64_t high = end;
        while (at < high) {
          const std::int64_t middle = (at + high) / 2;
          if (symbol_of(a.view, middle) < symbol)
            at = middle + 1;
          else
            high = middle;
        }
        const bool found = at < end && symbol_of(a.view, at) == symbol;
        places_[child] = {static_cast<std::uint32_t>(at), found};
        fresh_[depth + 1] += !found;
      }
    }
  }

  [[noreturn]] static void refuse_prefix(const Reader& a, std::int64_t old, const Reader& b, std::int64_t added) {
    const bool old_ends = children_of(a.view, old).count == 0;
    const std::string one = a.first_sid(old), other = b.first_sid(added);
    refuse(old_ends ? one : other, " is a proper prefix of ", old_ends ? other : one,
           " so they need a vocab with eos to tell them apart");
  }

  TrieShape merged_shape() const {
    TrieShape shape = TrieShape::of(trie_);
    const TrieShape added = TrieShape::of(added_);
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

  void splice(Reader a, Reader b, const TrieShape& shape, const TrieBlock& out) const {
    BitSplice children(a.view.children, out.section<std::uint64_t>(kChildBits));
    BitSplice item_bits(a.view.items, out.section<std::uint64_t>(kItemBits));
    ValueSplice symbols(a.view.symbols, a.view.wide ? 4 : 2, out.section<std::uint8_t>(kSymbols), shape.wide() ? 4 : 2);
    ValueSplice items(a.item_ids, a.shape.wide_items ? 8 : 4, out.section<std::uint8_t>(kItems),
                      shape.wide_items ? 8 : 4);
    for (std::int64_t node = 0; node < b.shape.nodes; ++node) {
      const Place place = places_[node];
      const std::int64_t begin = b.children.begin(node), end = b.children.zero(node);
      const std::int64_t first_item = b.items.begin(node) - node, end_item = b.items.zero(node) - node;
      std::int64_t fresh = 0;
      for (std::int64_t child = begin - node + 1; child < end - node + 1; ++child) fresh += !places_[child].found;
      const std::int64_t in_children = place.found ? a.children.zero(place.node) : a.children.begin(place.node);
      const std::int64_t in_items = place.found ? a.items.zero(place.node) : a.items.begin(place.node);
      children.copy_to(in_children);
      children.put_ones(fresh);
      item_bits.copy_to(in_items);
      item_bits.put_ones(end_item - first_item);
      items.copy_to(in_items - place.node);
      for (std::int64_t i = first_item; i < end_item; ++i) items.put(b.item(i));
      if (place.found) continue;
      children.put_zero();
      item_bits.put_zero();
      symbols.copy_to(place.node);
      symbols.put(symbol_of(b.view, node));
    }
    children.copy_to(2 * a.shape.nodes - 1);
    item_bits.copy_to(a.shape.nodes + a.shape.items);
    items.copy_to(a.shape.items);
    symbols.copy_to(a.shape.nodes);
    std::memcpy(out.section<std::int32_t>(kTokens), a.view.tokens, shape.table_size * 4);
    std::memcpy(out.section<std::int32_t>(kCodes), a.view.codes, shape.table_size * 4);
  }

  const std::uint8_t *trie_, *added_;
  std::vector<Place> places_;                         // per added node
  std::array<std::int64_t, kMaxLevels + 2> fresh_{};  // per depth, added nodes that the other lacks
  std::int64_t fresh_sids_ = 0;
};

}  // namespace

TrieBytes trie_merge(const std::uint8_t* trie, const std::uint8_t* added) { return Merger(trie, added).merge(); }

}  // namespace raddpo
