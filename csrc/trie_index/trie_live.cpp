// One pass over the item ids finds the items that are left. One pass over the degree sequences finds the nodes.
#include "trie_live.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "../common/buffer.h"
#include "../common/isa.h"
#include "../common/radix_sort.h"

namespace raddpo {
namespace {

constexpr std::int64_t kBitsPerItem = 16;      // up to this many bits per item, a set of ids is bits
constexpr std::int64_t kMostHashes = 1 << 22;  // whose bits stay in cache

struct Items {
  const void* ids;
  std::int64_t size;
  bool wide;

  explicit Items(const std::uint8_t* trie) {
    const auto* h = reinterpret_cast<const std::int64_t*>(trie);
    ids = trie + h[kItems];
    size = h[kNumItems];
    wide = h[kItemBytes] == 8;
  }
  std::int64_t words() const { return (size + 63) / 64; }
  std::int64_t operator[](std::int64_t i) const {
    return wide ? static_cast<const std::int64_t*>(ids)[i] : static_cast<const std::int32_t*>(ids)[i];
  }

  // Writes one bit per item, whether the set has it. Counts only live items.
  Matched match(const IdSet& set, const std::uint64_t* live, int threads, std::uint64_t* out) const {
    std::vector<Matched> parts(threads);
    parallel_shares(threads, words(), [&](int t, std::int64_t begin, std::int64_t end) {
      parts[t] = RADDPO_CALL_ISA(match_items, ids, wide, size, live, set, begin, end, out);
    });
    Matched all{0, -1};
    for (const Matched& part : parts) all = {all.count + part.count, std::max(all.beyond, part.beyond)};
    return all;
  }

  bool any_between(std::int64_t least, std::int64_t most, int threads) const {
    std::atomic<bool> any{false};
    parallel_shares(threads, size, [&](int, std::int64_t begin, std::int64_t end) {
      if (RADDPO_CALL_ISA(any_between, ids, wide, begin, end, least, most)) any = true;
    });
    return any;
  }
};

// Owns what an IdSet points to.
struct IdSetMemory {
  Buffer<std::uint64_t> bits;
  Buffer<std::int64_t> slots;
  IdSet set{};
  std::int64_t count = 0;  // distinct ids

  explicit IdSetMemory(const bool* mask, std::int64_t size) {
    use_bits(size);
    RADDPO_CALL_ISA(pack_mask, mask, size, bits.get());
  }

  IdSetMemory(const std::int64_t* ids, std::int64_t size, std::int64_t items) {
    const std::int64_t largest = size ? *std::max_element(ids, ids + size) : 0;  // up to 2**63 - 1
    if (largest < kBitsPerItem * std::max<std::int64_t>(items, 4096)) {
      use_bits(largest + 1);
      for (std::int64_t i = 0; i < size; ++i) count += set_bit(ids[i]);
    } else {
      use_table(size);
      for (std::int64_t i = 0; i < size; ++i) count += insert(ids[i]);
    }
  }

 private:
  void use_bits(std::int64_t limit) {
    clear(limit + 1);
    set = {reinterpret_cast<const std::uint32_t*>(bits.get()), limit, nullptr, 0, 0};
  }

  void use_table(std::int64_t size) {
    std::int64_t capacity = 64;
    while (capacity < 2 * size) capacity *= 2;
    slots = Buffer<std::int64_t>(capacity);
    std::fill_n(slots.get(), capacity, -1);
    const std::int64_t hashes = std::min<std::int64_t>(16 * capacity, kMostHashes);
    clear(hashes);
    set = {reinterpret_cast<const std::uint32_t*>(bits.get()), 0, slots.get(), static_cast<std::uint64_t>(hashes - 1),
           static_cast<std::uint64_t>(capacity - 1)};
  }

  void clear(std::int64_t size) {
    bits = Buffer<std::uint64_t>((size + 63) / 64);
    std::fill_n(bits.get(), (size + 63) / 64, 0);
  }

  // Returns whether the bit was not set before.
  bool set_bit(std::int64_t i) {
    std::uint64_t& word = bits[i / 64];
    const std::uint64_t bit = std::uint64_t(1) << (i % 64);
    return !(std::exchange(word, word | bit) & bit);
  }

  bool insert(std::int64_t id) {
    const std::uint64_t hash = slot_of(id);
    set_bit(static_cast<std::int64_t>(hash & set.mask));
    std::uint64_t slot = hash >> 32;
    while (slots[slot & set.slot_mask] >= 0 && slots[slot & set.slot_mask] != id) ++slot;
    return std::exchange(slots[slot & set.slot_mask], id) != id;
  }
};

// The first of `ids` that is (`known`) or is not among the items with a bit in `matched`; -1 if there is none.
std::int64_t first_of(const Items& items, const std::uint64_t* matched, const std::int64_t* ids, std::int64_t count,
                      bool known) {
  std::vector<std::int64_t> found;
  for (std::int64_t i = 0; i < items.size; ++i)
    if (matched[i / 64] >> (i % 64) & 1) found.push_back(items[i]);
  std::sort(found.begin(), found.end());
  for (std::int64_t i = 0; i < count; ++i)
    if (std::binary_search(found.begin(), found.end(), ids[i]) == known) return ids[i];
  return -1;
}

// Keeps the values that are left of one of `shares` equal shares.
void compact_share(const LiveBits& live, std::int64_t size, std::int64_t share, std::int64_t shares, const void* from,
                   int bytes, std::uint8_t* to, int to_bytes) {
  const std::int64_t words = (size + 63) / 64;
  const std::int64_t begin = words * share / shares * 64, end = std::min(words * (share + 1) / shares * 64, size);
  RADDPO_CALL_ISA(compact_values, live, begin, end, from, bytes, to + live_before(live, begin) * to_bytes, to_bytes);
}

}  // namespace

TrieLive trie_live(const TrieLiveInput& in) {
  const auto* header = reinterpret_cast<const std::int64_t*>(in.trie);
  const TrieView old = view_of(in.trie, header, in.live);
  const Items items(in.trie);
  const std::int64_t nodes = num_nodes_of(old), words = items.words();
  const LiveLayout at(nodes, items.size);
  auto* memory = static_cast<std::uint8_t*>(std::aligned_alloc(64, (at.bytes + 63) / 64 * 64));
  if (!memory) throw OutOfMemory(at.bytes);
  TrieLive out{{decltype(TrieBytes::data)(memory), at.bytes}, 0, 0, 0, 0};
  std::memset(memory, 0, at.bytes);
  auto* node_bits = reinterpret_cast<std::uint64_t*>(memory);
  auto* item_bits = reinterpret_cast<std::uint64_t*>(memory + at.item_bits);

  const IdSetMemory ids = in.mask ? IdSetMemory(in.mask, in.mask_size) : IdSetMemory(in.ids, in.count, items.size);
  const Matched matched = items.match(ids.set, old.live_items.bits, in.threads, item_bits);
  if (in.mask && matched.beyond >= 0)
    refuse("item_mask has ", in.mask_size, " entries, but the index holds item ", matched.beyond);
  const bool keep = in.mask || in.keep;
  if (!keep && matched.count != ids.count) {
    for (std::int64_t w = 0; w < words; ++w) item_bits[w] &= old.live_items.bits ? old.live_items.bits[w] : ~0ull;
    refuse("item_ids hold ", first_of(items, item_bits, in.ids, in.count, false), ", which is no item of the index");
  }
  for (std::int64_t w = 0; w < words; ++w) {
    const std::uint64_t valid = items.size - w * 64 < 64 ? (std::uint64_t(1) << (items.size - w * 64)) - 1 : ~0ull;
    item_bits[w] = (keep ? item_bits[w] : ~item_bits[w]) & (old.live_items.bits ? old.live_items.bits[w] : valid);
  }
  out.sids = RADDPO_CALL_ISA(mark_nodes, old, item_bits, items.size, node_bits);
  RADDPO_CALL_ISA(fill_ranks, node_bits, LiveLayout::blocks_of(nodes),
                  reinterpret_cast<std::uint32_t*>(memory + at.node_ranks));
  RADDPO_CALL_ISA(fill_ranks, item_bits, LiveLayout::blocks_of(items.size),
                  reinterpret_cast<std::uint32_t*>(memory + at.item_ranks));
  const TrieView left = view_of(in.trie, header, memory);
  out.items = live_before(left.live_items, items.size);
  out.nodes = live_before(left.live_nodes, nodes);
  out.deepest = out.nodes - live_before(left.live_nodes, left.first_node[left.levels]);
  return out;
}

std::int64_t first_known(const std::uint8_t* trie, const std::int64_t* ids, std::int64_t count, int threads) {
  const Items items(trie);
  if (!count) return -1;
  const auto [least, most] = std::minmax_element(ids, ids + count);
  if (!items.any_between(*least, *most, threads)) return -1;  // as where new ids follow on the old ones
  const IdSetMemory set(ids, count, items.size);
  const Buffer<std::uint64_t> matched(items.words());
  if (!items.match(set.set, nullptr, threads, matched.get()).count) return -1;
  return first_of(items, matched.get(), ids, count, true);
}

TrieBytes trie_compact(const std::uint8_t* trie, const std::uint8_t* live, std::int64_t sids, int threads) {
  const TrieView t = view_of(trie, reinterpret_cast<const std::int64_t*>(trie), live);
  const Items items(trie);
  TrieShape shape = TrieShape::of(trie);
  const std::int64_t nodes = shape.nodes;
  shape.items = live_before(t.live_items, items.size);
  shape.nodes = live_before(t.live_nodes, nodes);
  shape.levels = 0;
  for (int d = 0; d < kMaxLevels + 2; ++d) {
    shape.first_node[d] = live_before(t.live_nodes, t.first_node[d]);
    if (d && shape.first_node[d] > shape.first_node[d - 1]) shape.levels = d - 1;
  }
  for (int l = 0; !shape.has_vocab && l < shape.sid_levels; ++l) {
    std::int64_t largest = 0;
    for (std::int64_t node = t.first_node[l + 1]; node < t.first_node[l + 2] && largest + 1 < shape.sizes[l]; ++node)
      if (is_live(t.live_nodes, node)) largest = std::max(largest, symbol_of(t, node));
    shape.set_largest_symbol(l, largest);
  }
  if (shape.wide_items) {
    std::int64_t largest = 0;
    for (std::int64_t i = 0; i < items.size; ++i)
      if (is_live(t.live_items, i)) largest = std::max(largest, items[i]);
    shape.wide_items = largest > INT32_MAX;
  }
  shape.sids = sids;
  TrieBlock out(shape);
  out.zero_bits();
  const int shares = threads > 1 ? 4 * threads : 1;
  parallel_tasks(threads, 2 + 2 * shares, [&](int, std::int64_t task) {
    if (task == 0)
      RADDPO_CALL_ISA(compact_children, t, out.section<std::uint64_t>(kChildBits));
    else if (task == 1)
      RADDPO_CALL_ISA(compact_items, t, items.size, out.section<std::uint64_t>(kItemBits));
    else if (task < 2 + shares)
      compact_share(t.live_nodes, nodes, task - 2, shares, t.symbols, t.wide ? 4 : 2,
                    out.section<std::uint8_t>(kSymbols), shape.wide() ? 4 : 2);
    else
      compact_share(t.live_items, items.size, task - 2 - shares, shares, items.ids, items.wide ? 8 : 4,
                    out.section<std::uint8_t>(kItems), shape.wide_items ? 8 : 4);
  });
  std::memcpy(out.section<std::int32_t>(kTokens), t.tokens, shape.table_size * 4);
  std::memcpy(out.section<std::int32_t>(kCodes), t.codes, shape.table_size * 4);
  return out.finish(threads);
}

}  // namespace raddpo
