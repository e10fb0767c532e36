#include "trie_block.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../common/buffer.h"
#include "../common/huge_pages.h"
#include "../common/isa.h"
#include "../common/radix_sort.h"
#include "trie_live.h"

namespace raddpo {
namespace {

void copy_words(const std::int64_t* header, int word, std::array<std::int64_t, kMaxLevels>& out) {
  std::copy(header + word, header + word + kMaxLevels, out.begin());
}

}  // namespace

std::string name_of_word(int word) {
  for (const auto& [name, first, count] : kHeaderNames)
    if (word >= first && word < first + count)
      return count > 1 ? name + ("[" + std::to_string(word - first) + "]") : name;
  return "header word " + std::to_string(word);
}

TrieShape TrieShape::of(const std::uint8_t* block) {
  const auto* h = reinterpret_cast<const std::int64_t*>(block);
  TrieShape s;
  s.items = h[kNumItems];
  s.sids = h[kNumSids];
  s.nodes = h[kNumNodes];
  std::copy(h + kFirstNode, h + kFirstNode + kMaxLevels + 2, s.first_node.begin());
  s.levels = h[kLevels];
  s.sid_levels = h[kSidLevels];
  s.eos = h[kEos];
  s.wide_items = h[kItemBytes] == 8;
  s.has_vocab = h[kHasVocab];
  copy_words(h, kNumSymbols, s.num_symbols);
  copy_words(h, kTable, s.table);
  copy_words(h, kFirstToken, s.first_token);
  copy_words(h, kSizes, s.sizes);
  copy_words(h, kMaxToken, s.max_token);
  for (int l = 0; l < kMaxLevels; ++l)
    if (s.table[l] >= 0 && s.num_symbols[l]) s.table_size = std::max(s.table_size, s.table[l] + s.num_symbols[l]);
  return s;
}

void TrieShape::set_largest_symbol(int level, std::int64_t symbol) {
  num_symbols[level] = sizes[level] = symbol + 1;
  max_token[level] = symbol;
}

bool TrieShape::wide() const { return *std::max_element(num_symbols.begin(), num_symbols.end()) > 65536; }

TrieLayout::TrieLayout(const TrieShape& s) {
  std::int64_t size = kHeaderWords * 8;
  const auto place = [&](int word, std::int64_t count) {
    begin[word - kSymbols] = size;
    bytes[word - kSymbols] = count;
    size += (count + 63) / 64 * 64;
  };
  const auto place_bits = [&](int bits, std::int64_t count) {
    const std::int64_t blocks = (count + kBlockBits - 1) / kBlockBits;
    place(bits, blocks * kBlockBits / 8);
    place(bits + 1, blocks * 4);
    place(bits + 2, ((s.nodes - 1) / kHintZeros + 2) * 4);
  };
  place(kSymbols, s.nodes * (s.wide() ? 4 : 2));
  place_bits(kChildBits, 2 * s.nodes - 1);
  place_bits(kItemBits, s.nodes + s.items);
  place(kItems, s.items * (s.wide_items ? 8 : 4));
  place(kTokens, s.table_size * 4);
  place(kCodes, s.table_size * 4);
  begin.back() = size;
}

void write_header(const TrieShape& s, const TrieLayout& layout, std::uint64_t* h) {
  std::memset(h, 0, kHeaderWords * 8);
  std::memcpy(h, "RADTRIE", 8);
  h[kVersion] = kFormatVersion;
  h[kBytes] = layout.size();
  h[kNumItems] = s.items;
  h[kNumSids] = s.sids;
  h[kNumNodes] = s.nodes;
  h[kLevels] = s.levels;
  h[kSidLevels] = s.sid_levels;
  h[kWide] = s.wide();
  h[kItemBytes] = s.wide_items ? 8 : 4;
  h[kEos] = s.eos;
  h[kHasVocab] = s.has_vocab;
  std::copy(layout.begin.begin(), layout.begin.end() - 1, h + kSymbols);
  std::copy(s.first_node.begin(), s.first_node.end(), h + kFirstNode);
  std::copy(s.num_symbols.begin(), s.num_symbols.end(), h + kNumSymbols);
  std::copy(s.table.begin(), s.table.end(), h + kTable);
  std::copy(s.first_token.begin(), s.first_token.end(), h + kFirstToken);
  std::copy(s.sizes.begin(), s.sizes.end(), h + kSizes);
  std::copy(s.max_token.begin(), s.max_token.end(), h + kMaxToken);
}

TrieBlock::TrieBlock(const TrieShape& s) {
  if (2 * s.nodes >= std::int64_t(UINT32_MAX))
    refuse("sids give a trie of ", s.nodes, " nodes, more than ", UINT32_MAX / 2);
  const TrieLayout layout(s);
  auto* memory = static_cast<std::uint8_t*>(std::aligned_alloc(64, layout.size()));
  if (!memory) throw OutOfMemory(layout.size());
  advise_huge_pages(memory, layout.size());
  bytes_ = {decltype(bytes_.data)(memory), layout.size()};
  for (int i = 0; i < TrieLayout::kSections; ++i) {  // the gaps behind sections
    const std::int64_t end = layout.begin[i] + layout.bytes[i];
    std::memset(memory + end, 0, layout.begin[i + 1] - end);
  }
  write_header(s, layout, header());
}

void TrieBlock::zero_bits() const {
  for (const HeaderWord bits : {kChildBits, kItemBits})
    std::memset(section<std::uint8_t>(bits), 0, header()[bits + 1] - header()[bits]);
}

TrieBytes TrieBlock::finish(int threads) {
  const auto nodes = static_cast<std::int64_t>(header()[kNumNodes]);
  const auto items = static_cast<std::int64_t>(header()[kNumItems]);
  parallel_tasks(threads, 2, [&](int, std::int64_t task) {
    task ? index_bits(kItemBits, nodes + items) : index_bits(kChildBits, 2 * nodes - 1);
  });
  header()[kChecksum] = trie_checksum(bytes_.data.get(), bytes_.size);
  return std::move(bytes_);
}

// Ranks and hints of a degree sequence of `count` bits, one zero per node.
void TrieBlock::index_bits(HeaderWord word, std::int64_t count) const {
  const auto* bits = section<std::uint64_t>(word);
  auto* ranks = section<std::uint32_t>(static_cast<HeaderWord>(word + 1));
  auto* hints = section<std::uint32_t>(static_cast<HeaderWord>(word + 2));
  const std::int64_t blocks = (count + kBlockBits - 1) / kBlockBits;
  const auto nodes = static_cast<std::int64_t>(header()[kNumNodes]);
  RADDPO_CALL_ISA(fill_ranks, bits, blocks, ranks);
  std::int64_t hint = 0;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t zeros = block + 1 < blocks ? ranks[block + 1] : nodes;  // those past the end left out
    for (; hint * kHintZeros < zeros; ++hint) hints[hint] = static_cast<std::uint32_t>(block);
  }
  hints[hint] = static_cast<std::uint32_t>(blocks - 1);
}

std::uint64_t trie_checksum(const std::uint8_t* data, std::int64_t size) {
  constexpr int kLanes = 8;  // independent chains keep the multipliers busy
  constexpr std::uint64_t kMultiplier = 0x9e3779b97f4a7c15;
  std::uint64_t lane[kLanes];
  for (int k = 0; k < kLanes; ++k) lane[k] = kMultiplier * (k + 1);
  for (std::int64_t at = 0; at < size; at += 8 * kLanes)
    for (int k = 0; k < kLanes; ++k) {
      std::uint64_t word = 0;
      const std::int64_t from = at + 8 * k;
      if (from + 8 <= size && from != 8 * kChecksum) std::memcpy(&word, data + from, 8);
      lane[k] = (lane[k] ^ word) * kMultiplier;
      lane[k] ^= lane[k] >> 29;
    }
  std::uint64_t sum = size;
  for (std::uint64_t value : lane) {
    sum = (sum ^ value) * kMultiplier;
    sum ^= sum >> 32;
  }
  return sum;
}

}  // namespace raddpo
