// 64 nodes or items per step. All sequences are in node order, so every pass reads and writes from front to back.
#include "bit_stream.h"

namespace raddpo::RADDPO_ISA {
namespace {

RADDPO_HD bool has_id(const IdSet& set, std::int64_t id) {
  const std::uint64_t hash = slot_of(id);
  if (!(set.bits[(hash & set.mask) / 32] >> (hash & 31) & 1)) return false;  // the answer for nearly all ids
  for (std::uint64_t slot = hash >> 32;; ++slot) {
    const std::int64_t found = set.slots[slot & set.slot_mask];
    if (found == id) return true;
    if (found < 0) return false;
  }
}

template <typename Item>
RADDPO_HD Matched match(const Item* items, std::int64_t size, const std::uint64_t* live, const IdSet& set,
                        std::int64_t begin, std::int64_t end, std::uint64_t* out) {
  Matched matched{0, -1};
  const std::int64_t limit = set.limit;
  for (std::int64_t word = begin; word < end; ++word) {
    const std::int64_t first = word * 64;
    const int n = size - first < 64 ? static_cast<int>(size - first) : 64;
    const std::uint64_t valid = live ? live[word] : low_bits(n);
    std::uint64_t bits = 0;
    if (set.slots) {
      for (int i = 0; i < n; ++i) bits |= std::uint64_t(has_id(set, items[first + i])) << i;
    } else {
      std::uint8_t found[64];
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const Item id = items[first + i] < limit ? items[first + i] : static_cast<Item>(limit);
        found[i] = set.bits[id / 32] >> (id % 32) & 1;
      }
      bits = pack(found, n);
    }
    matched.count += popcount(bits & valid);
    out[word] = bits;
    if (set.slots) continue;  // a table has no limit
    Item largest = -1;
    for (int i = 0; i < n; ++i) largest = items[first + i] > largest ? items[first + i] : largest;
    for (int i = 0; largest >= limit && i < n; ++i)
      if (items[first + i] >= limit && valid >> i & 1) matched.beyond = items[first + i];
  }
  return matched;
}

// For bits [begin, end) of a degree sequence, the next bits of `in` say which of the ones are left. Appends one bit per
// zero: whether any one of its run is left. Adding the bits that are left to their run of ones carries into the zero
// after the run exactly if there are any, and no further.
RADDPO_HD std::int64_t fold(const std::uint64_t* bits, std::int64_t begin, std::int64_t end, BitReader in,
                            BitAppender out) {
  BitReader sequence{bits, begin};
  std::uint64_t carry = 0;
  std::int64_t ones = 0;
  while (sequence.at < end) {
    const int n = end - sequence.at < 64 ? static_cast<int>(end - sequence.at) : 64;
    const std::uint64_t run = sequence.next(n), zeros = ~run & low_bits(n);
    const std::uint64_t sum = run + spread(in.next(popcount(run)), run), total = sum + carry;
    const std::uint64_t found = gather(total, zeros);
    carry = n < 64 ? total >> n : sum < run || total < sum;
    out.put(found, popcount(zeros));
    ones += popcount(found);
  }
  return ones;
}

// Keeps the ones and zeros of a degree sequence that have a bit in `ones` and `zeros`.
RADDPO_HD void filter(const std::uint64_t* bits, std::int64_t size, BitReader ones, BitReader zeros,
                      std::uint64_t* to) {
  BitReader sequence{bits, 0};
  BitAppender out{to, 0};
  while (sequence.at < size) {
    const int n = size - sequence.at < 64 ? static_cast<int>(size - sequence.at) : 64;
    const std::uint64_t run = sequence.next(n), gaps = ~run & low_bits(n);
    const std::uint64_t kept = spread(ones.next(popcount(run)), run) | spread(zeros.next(popcount(gaps)), gaps);
    out.put(gather(run, kept), popcount(kept));
  }
}

template <typename From, typename To>
RADDPO_HD void compact(const LiveBits& live, std::int64_t begin, std::int64_t end, const From* from, To* to) {
  for (std::int64_t first = begin; first < end; first += 64) {
    std::uint64_t bits = live.bits[first / 64];
    if (bits == ~std::uint64_t(0)) {
      for (int i = 0; i < 64; ++i) *to++ = static_cast<To>(from[first + i]);
    } else {
      for (; bits; bits &= bits - 1) *to++ = static_cast<To>(from[first + count_trailing_zeros(bits)]);
    }
  }
}

template <typename Item>
RADDPO_HD bool any_of_range(const Item* items, std::int64_t begin, std::int64_t end, Item least, Item most) {
  constexpr std::int64_t kStretch = 4096;
  for (; begin < end; begin += kStretch) {
    const std::int64_t stretch_end = end - begin < kStretch ? end : begin + kStretch;
    int inside = 0;
#pragma omp simd reduction(| : inside)
    for (std::int64_t i = begin; i < stretch_end; ++i) inside |= (items[i] >= least) & (items[i] <= most);
    if (inside) return true;
  }
  return false;
}

}  // namespace

bool any_between(const void* items, bool wide, std::int64_t begin, std::int64_t end, std::int64_t least,
                 std::int64_t most) {
  if (wide) return any_of_range(static_cast<const std::int64_t*>(items), begin, end, least, most);
  if (least > INT32_MAX) return false;
  return any_of_range(static_cast<const std::int32_t*>(items), begin, end, static_cast<std::int32_t>(least),
                      static_cast<std::int32_t>(most < INT32_MAX ? most : INT32_MAX));
}

Matched match_items(const void* items, bool wide, std::int64_t size, const std::uint64_t* live, const IdSet& set,
                    std::int64_t begin, std::int64_t end, std::uint64_t* out) {
  return wide ? match(static_cast<const std::int64_t*>(items), size, live, set, begin, end, out)
              : match(static_cast<const std::int32_t*>(items), size, live, set, begin, end, out);
}

void pack_mask(const bool* mask, std::int64_t size, std::uint64_t* bits) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(mask);
  for (std::int64_t first = 0; first < size; first += 64)
    bits[first / 64] = pack(bytes + first, size - first < 64 ? static_cast<int>(size - first) : 64);
}

// Writes the number of zeros before each block.
void fill_ranks(const std::uint64_t* bits, std::int64_t blocks, std::uint32_t* ranks) {
  std::uint32_t zeros = 0;
  for (std::int64_t block = 0; block < blocks; ++block) {
    ranks[block] = zeros;
    for (int i = 0; i < kBlockBits / 64; ++i) zeros += 64 - popcount(bits[block * (kBlockBits / 64) + i]);
  }
}

// Sets the bits of the nodes (of zeros) with any item left under them, and the root's; returns the number of SIDs left.
std::int64_t mark_nodes(const TrieView& t, const std::uint64_t* items, std::int64_t num_items, std::uint64_t* nodes) {
  const std::int64_t sids = fold(t.items.bits, 0, num_nodes_of(t) + num_items, {items, 0}, {nodes, 0});
  for (int depth = t.levels - 1; depth >= 0; --depth) {
    const std::int64_t* first = t.first_node + depth;
    fold(t.children.bits, first[1] - 1 + first[0], first[2] - 1 + first[1], {nodes, first[1]}, {nodes, first[0]});
  }
  nodes[0] |= 1;
  return sids;
}

void compact_children(const TrieView& t, std::uint64_t* children) {
  filter(t.children.bits, 2 * num_nodes_of(t) - 1, {t.live_nodes.bits, 1}, {t.live_nodes.bits, 0}, children);
}

void compact_items(const TrieView& t, std::int64_t num_items, std::uint64_t* items) {
  filter(t.items.bits, num_nodes_of(t) + num_items, {t.live_items.bits, 0}, {t.live_nodes.bits, 0}, items);
}

// Those of [begin, end), whole words of `live` but for the last; `to`: where the first of them goes.
void compact_values(const LiveBits& live, std::int64_t begin, std::int64_t end, const void* from, int bytes, void* to,
                    int to_bytes) {
  if (bytes == 8 && to_bytes == 8)
    compact(live, begin, end, static_cast<const std::int64_t*>(from), static_cast<std::int64_t*>(to));
  else if (bytes == 8)
    compact(live, begin, end, static_cast<const std::int64_t*>(from), static_cast<std::int32_t*>(to));
  else if (bytes == 4 && to_bytes == 4)
    compact(live, begin, end, static_cast<const std::uint32_t*>(from), static_cast<std::uint32_t*>(to));
  else if (bytes == 4)
    compact(live, begin, end, static_cast<const std::uint32_t*>(from), static_cast<std::uint16_t*>(to));
  else
    compact(live, begin, end, static_cast<const std::uint16_t*>(from), static_cast<std::uint16_t*>(to));
}

}  // namespace raddpo::RADDPO_ISA
