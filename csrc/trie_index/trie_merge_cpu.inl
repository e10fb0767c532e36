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

// The place of set bit number k.
RADDPO_HD int place_of_bit(std::uint64_t x, int k) {
#if defined(RADDPO_AVX512)  // where spreading is one fast instruction; it is not on all that have AVX2
  return count_trailing_zeros(spread(std::uint64_t(1) << k, x));
#else
  return select_bit(x, k);
#endif
}

RADDPO_HD std::int64_t begin_of(const DegreeSequence& s, std::int64_t node) {
  return node ? select_zero(s, node - 1) + 1 : 0;
}

// The first node that has items. Of `bits`, those before its first one are the zeros of the nodes before it.
RADDPO_HD std::int64_t first_with_items(const DegreeSequence& s, std::int64_t bits) {
  return select_one(s, 0, (bits - 1) / kBlockBits, 0);
}

// Where the bits of nodes are in a degree sequence. Nodes must be asked for in ascending order.
struct Degrees {
  const DegreeSequence& sequence;
  std::int64_t word = 0, before = 0;  // zeros before the word

  RADDPO_HD std::int64_t begin(std::int64_t node) { return node ? zero(node - 1) + 1 : 0; }
  RADDPO_HD std::int64_t zero(std::int64_t node) {  // the zero that ends the node
    if (node - before > 2 * kBlockBits) {
      const std::int64_t block = block_of_zero(sequence, node);
      word = block * (kBlockBits / 64);
      before = sequence.ranks[block];
    }
    const std::uint64_t* words = sequence.bits;
    for (int zeros; before + (zeros = popcount(~words[word])) <= node; ++word) before += zeros;
    return word * 64 + place_of_bit(~words[word], static_cast<int>(node - before));
  }
};

// The first of ascending symbols [at, end) that is not below `symbol`: in steps that double, halves, and one by one, so
// that the next of several symbols is looked for behind the one before it.
template <typename Symbol>
RADDPO_HD std::int64_t place_of_symbol(const Symbol* symbols, std::int64_t at, std::int64_t end, std::int64_t symbol) {
  constexpr std::int64_t kFew = 32;
  constexpr auto kMost = static_cast<Symbol>(-1);
  if (symbol > kMost) return end;  // of a trie with wider symbols
  std::int64_t step = kFew;
  for (; at + step < end && symbols[at + step - 1] < symbol; step *= 2) at += step;
  std::int64_t left = end - at < step ? end - at : step;
  for (; left > kFew; left -= left / 2) at += symbols[at + left / 2 - 1] < symbol ? left / 2 : 0;
  const auto limit = static_cast<Symbol>(symbol);
  int below = 0;
#pragma omp simd reduction(+ : below)
  for (int i = 0; i < static_cast<int>(left); ++i) below += symbols[at + i] < limit;
  return at + below;
}

RADDPO_HD void prefetch_symbol(const TrieView& t, std::int64_t node) {
  __builtin_prefetch(static_cast<const std::uint8_t*>(t.symbols) + node * (t.wide ? 4 : 2));
}

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

// The places of an added node's children among those of the other trie; returns how many that lacks.
RADDPO_HD std::int64_t place_children(const MergeArgs& m, Range added, Range old) {
  std::int64_t at = old.first, fresh = 0;
  const std::int64_t old_end = old.first + old.count;
  for (std::int64_t child = added.first; child < added.first + added.count; ++child) {
    const std::int64_t symbol = symbol_of(m.added, child);
    at = m.trie.wide ? place_of_symbol(static_cast<const std::uint32_t*>(m.trie.symbols), at, old_end, symbol)
                     : place_of_symbol(static_cast<const std::uint16_t*>(m.trie.symbols), at, old_end, symbol);
    const bool found = at < old_end && symbol_of(m.trie, at) == symbol;
    m.places[child].node = static_cast<std::uint32_t>(at);
    m.places[child].found = found;
    fresh += !found;
  }
  return fresh;
}

}  // namespace

FreshNodes find_places(const MergeArgs& m, std::int64_t node, std::int64_t nodes_end) {
  constexpr std::int64_t kStretch = 32;
  FreshNodes out;
  Degrees old{m.trie.children};
  std::int64_t begin = begin_of(m.added.children, node), old_begins[kStretch];
  while (node < nodes_end) {
    const std::int64_t stretch = node, stretch_end = nodes_end - node < kStretch ? nodes_end : node + kStretch;
    for (; node < stretch_end; ++node) {  // what is read next of the other trie is fetched meanwhile
      const MergePlace& place = m.places[node];
      old_begins[node - stretch] = old.begin(place.node);
      if (place.found) prefetch_symbol(m.trie, old_begins[node - stretch] - place.node + 1);
    }
    for (node = stretch; node < stretch_end; ++node) {
      MergePlace& place = m.places[node];
      const std::int64_t end = next_zero(m.added.children.bits, begin), old_begin = old_begins[node - stretch];
      place.ones = static_cast<std::uint32_t>(place.found ? next_zero(m.trie.children.bits, old_begin) : old_begin);
      if (place.found && (place.ones == old_begin) != (end == begin)) {
        out.bad = node;
        return out;
      }
      out.sids += !place.found && end == begin;
      out.children +=
          place_children(m, {begin - node + 1, end - begin}, {old_begin - place.node + 1, place.ones - old_begin});
      begin = end + 1;
    }
  }
  return out;
}

void splice_children(const MergeArgs& m, const MergeShare& begin, const MergeShare& end, std::uint64_t* out,
                     BitHead* head) {
  const std::int64_t from = begin_of(m.trie.children, begin.node), to = from + begin.fresh + begin.fresh_children;
  *head = {to / 64, 0};
  BitSplice bits{m.trie.children.bits, from, out, to, &head->bits};
  std::int64_t added = begin_of(m.added.children, begin.added);
  for (std::int64_t node = begin.added; node < end.added; ++node) {
    const std::int64_t added_end = next_zero(m.added.children.bits, added);
    const MergePlace& place = m.places[node];
    std::int64_t fresh = added_end - added;  // children that the other trie lacks
    for (std::int64_t child = added - node + 1; place.found && child < added_end - node + 1; ++child)
      fresh -= m.places[child].found;
    bits.copy_to(place.ones);
    bits.put_degree(fresh, !place.found);
    added = added_end + 1;
  }
  bits.copy_to(begin_of(m.trie.children, end.node));
  bits.finish();
}

void splice_item_bits(const MergeArgs& m, const MergeShare& begin, const MergeShare& end, std::uint64_t* out,
                      BitHead* head) {
  const std::int64_t from = begin_of(m.trie.items, begin.node);
  std::int64_t added = begin_of(m.added.items, begin.added);
  const std::int64_t to = from + added - begin.added + begin.fresh;
  *head = {to / 64, 0};
  BitSplice bits{m.trie.items.bits, from, out, to, &head->bits};
  // Nodes before the first with items, most of them where all SIDs are of one length, have a zero each: those of the
  // added trie can all be put in front.
  const std::int64_t old_inner = first_with_items(m.trie.items, num_nodes_of(m.trie) + m.trie_items.count),
                     added_inner = first_with_items(m.added.items, num_nodes_of(m.added) + m.added_items.count);
  std::int64_t node = begin.added, zeros = 0;
  for (; node < end.added && node < added_inner && m.places[node].node <= old_inner; ++node)
    zeros += !m.places[node].found;
  bits.put_zeros(zeros);
  added = begin_of(m.added.items, node);
  Degrees old{m.trie.items};
  for (; node < end.added; ++node) {
    const MergePlace& place = m.places[node];
    const std::int64_t added_end = next_zero(m.added.items.bits, added);
    if (added_end > added || !place.found) {
      bits.copy_to(place.found ? old.zero(place.node) : old.begin(place.node));
      bits.put_degree(added_end - added, !place.found);
    }
    added = added_end + 1;
  }
  bits.copy_to(begin_of(m.trie.items, end.node));
  bits.finish();
}

void splice_items(const MergeArgs& m, const MergeShare& begin, const MergeShare& end, std::uint8_t* out, int bytes) {
  const MergeItems& ids = m.added_items;
  const std::int64_t from = begin_of(m.trie.items, begin.node) - begin.node;
  std::int64_t added = begin_of(m.added.items, begin.added);
  ValueSplice items{m.trie_items.ids, m.trie_items.bytes, out + (from + added - begin.added) * bytes, bytes, from};
  Degrees old{m.trie.items};
  for (std::int64_t node = begin.added; node < end.added; ++node) {
    const MergePlace& place = m.places[node];
    const std::int64_t added_end = next_zero(m.added.items.bits, added);
    if (added_end > added) {
      items.copy_to((place.found ? old.zero(place.node) : old.begin(place.node)) - place.node);
      for (std::int64_t i = added - node; i < added_end - node; ++i)
        items.put(ValueSplice::value_at(ids.ids, ids.bytes, i));
    }
    added = added_end + 1;
  }
  items.copy_to(begin_of(m.trie.items, end.node) - end.node);
}

void splice_symbols(const MergeArgs& m, const MergeShare& begin, const MergeShare& end, std::uint8_t* out, int bytes) {
  ValueSplice symbols{static_cast<const std::uint8_t*>(m.trie.symbols), m.trie.wide ? 4 : 2,
                      out + (begin.node + begin.fresh) * bytes, bytes, begin.node};
  for (std::int64_t node = begin.added; node < end.added; ++node) {
    if (m.places[node].found) continue;
    symbols.copy_to(m.places[node].node);
    symbols.put(symbol_of(m.added, node));
  }
  symbols.copy_to(end.node);
}

}  // namespace raddpo::RADDPO_ISA
