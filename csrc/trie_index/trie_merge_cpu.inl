// Degree sequences are walked from front to back: the nodes asked for ascend. Part of a per-instruction-set region.
#include "bit_stream.h"

namespace raddpo::RADDPO_ISA {
namespace {

// The first zero from a position on.
RADDPO_HD std::int64_t next_zero(const std::uint64_t* words, std::int64_t at) {
  std::int64_t word = at / 64;
  std::uint64_t zeros = ~words[word] & ~low_bits(static_cast<int>(at % 64));
  while (!zeros) zeros = ~words[++word];
  return word * 64 + count_trailing_zeros(zeros);
}

// Where the bits of nodes are in a degree sequence. Nodes must be asked for in ascending order.
struct Degrees {
  const std::uint64_t* words;
  std::int64_t word = 0, before = 0;  // zeros before the word

  RADDPO_HD std::int64_t begin(std::int64_t node) { return node ? zero(node - 1) + 1 : 0; }
  RADDPO_HD std::int64_t zero(std::int64_t node) {  // the zero that ends the node
    for (int zeros; before + (zeros = popcount(~words[word])) <= node; ++word) before += zeros;
    return word * 64 + select_bit(~words[word], static_cast<int>(node - before));
  }
};

// Copies bits, with insertions.
struct BitSplice {
  const std::uint64_t* from;
  BitAppender out;
  std::int64_t at = 0;

  RADDPO_HD void copy_to(std::int64_t end) {
    out.copy(from, at, end);
    at = end;
  }
};

// Copies symbols or item ids, with insertions. Values may become wider.
struct ValueSplice {
  const std::uint8_t* from;
  int from_bytes;
  std::uint8_t* to;
  int to_bytes;
  std::int64_t at;

  RADDPO_HD void copy_to(std::int64_t end) {
    if (from_bytes == to_bytes) {
      std::memcpy(to, from + at * from_bytes, (end - at) * to_bytes);
      to += (end - at) * to_bytes;
      at = end;
    }
    for (; at < end; ++at) put(value_at(from, from_bytes, at));
  }
  RADDPO_HD void put(std::int64_t value) {
    std::memcpy(to, &value, to_bytes);
    to += to_bytes;
  }
  RADDPO_HD static std::int64_t value_at(const std::uint8_t* from, int bytes, std::int64_t i) {
    std::int64_t value = 0;  // little endian, as all of the block
    std::memcpy(&value, from + i * bytes, bytes);
    return value;
  }
};

}  // namespace

std::int64_t find_places(const MergeArgs& m, std::int64_t* fresh, std::int64_t* fresh_sids) {
  Degrees old{m.trie.children.bits};
  m.places[0].node = 0;
  m.places[0].found = true;
  for (std::int64_t node = 0, depth = 0, begin = 0; node < num_nodes_of(m.added); ++node) {
    if (node == m.added.first_node[depth + 1]) ++depth;
    MergePlace& place = m.places[node];
    const std::int64_t end = next_zero(m.added.children.bits, begin), first = begin - node + 1, count = end - begin;
    const std::int64_t old_begin = old.begin(place.node);
    const std::int64_t old_end = place.found ? next_zero(m.trie.children.bits, old_begin) : old_begin;
    place.ones = static_cast<std::uint32_t>(old_end);
    if (place.found && (old_begin == old_end) != (count == 0)) return node;
    *fresh_sids += !place.found && count == 0;
    std::int64_t at = old_begin - place.node + 1;
    const std::int64_t children_end = old_end - place.node + 1;
    for (std::int64_t child = first; child < first + count; ++child) {
      const std::int64_t symbol = symbol_of(m.added, child);
      std::int64_t high = children_end;
      while (at < high) {
        const std::int64_t middle = (at + high) / 2;
        if (symbol_of(m.trie, middle) < symbol)
          at = middle + 1;
        else
          high = middle;
      }
      const bool found = at < children_end && symbol_of(m.trie, at) == symbol;
      m.places[child].node = static_cast<std::uint32_t>(at);
      m.places[child].found = found;
      fresh[depth + 1] += !found;
    }
    begin = end + 1;
  }
  return -1;
}

void splice_children(const MergeArgs& m, std::uint64_t* out) {
  BitSplice bits{m.trie.children.bits, {out, 0}};
  for (std::int64_t node = 0, begin = 0; node < num_nodes_of(m.added); ++node) {
    const std::int64_t end = next_zero(m.added.children.bits, begin);
    std::int64_t fresh = 0;
    for (std::int64_t child = begin - node + 1; child < end - node + 1; ++child) fresh += !m.places[child].found;
    bits.copy_to(m.places[node].ones);
    bits.out.put_ones(fresh);
    bits.out.at += !m.places[node].found;  // its zero
    begin = end + 1;
  }
  bits.copy_to(2 * num_nodes_of(m.trie) - 1);
}

void splice_item_bits(const MergeArgs& m, std::uint64_t* out) {
  BitSplice bits{m.trie.items.bits, {out, 0}};
  Degrees old{m.trie.items.bits};
  for (std::int64_t node = 0, begin = 0; node < num_nodes_of(m.added); ++node) {
    const MergePlace& place = m.places[node];
    const std::int64_t end = next_zero(m.added.items.bits, begin);
    if (end > begin || !place.found) {
      bits.copy_to(place.found ? old.zero(place.node) : old.begin(place.node));
      bits.out.put_ones(end - begin);
      bits.out.at += !place.found;  // its zero
    }
    begin = end + 1;
  }
  bits.copy_to(num_nodes_of(m.trie) + m.trie_items.count);
}

void splice_items(const MergeArgs& m, std::uint8_t* out, int bytes) {
  const MergeItems &from = m.trie_items, &added = m.added_items;
  ValueSplice items{from.ids, from.bytes, out, bytes, 0};
  Degrees old{m.trie.items.bits};
  for (std::int64_t node = 0, begin = 0; node < num_nodes_of(m.added); ++node) {
    const MergePlace& place = m.places[node];
    const std::int64_t end = next_zero(m.added.items.bits, begin);
    if (end > begin) {
      items.copy_to((place.found ? old.zero(place.node) : old.begin(place.node)) - place.node);
      for (std::int64_t i = begin - node; i < end - node; ++i)
        items.put(ValueSplice::value_at(added.ids, added.bytes, i));
    }
    begin = end + 1;
  }
  items.copy_to(from.count);
}

void splice_symbols(const MergeArgs& m, const MergeShare& begin, const MergeShare& end, std::uint8_t* out, int bytes) {
  ValueSplice symbols{static_cast<const std::uint8_t*>(m.trie.symbols), m.trie.wide ? 4 : 2, out + begin.out * bytes,
                      bytes, begin.at};
  for (std::int64_t node = begin.added; node < end.added; ++node) {
    if (m.places[node].found) continue;
    symbols.copy_to(m.places[node].node);
    symbols.put(symbol_of(m.added, node));
  }
  symbols.copy_to(end.at);
}

}  // namespace raddpo::RADDPO_ISA
