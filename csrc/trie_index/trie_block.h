#pragma once
// Makes a trie's block of bytes: its layout, its header, and what follows from its bits. Host only, no torch.
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>

#include "trie.h"

namespace raddpo {

using Depths = std::array<std::int64_t, kMaxLevels + 2>;

// The header's words by name, and how many of them follow one another.
struct HeaderName {
  const char* name;
  int word, count;
};
inline constexpr HeaderName kHeaderNames[] = {
    {"magic", kMagic, 1},
    {"version", kVersion, 1},
    {"bytes", kBytes, 1},
    {"checksum", kChecksum, 1},
    {"num_items", kNumItems, 1},
    {"num_sids", kNumSids, 1},
    {"num_nodes", kNumNodes, 1},
    {"levels", kLevels, 1},
    {"sid_levels", kSidLevels, 1},
    {"wide", kWide, 1},
    {"item_bytes", kItemBytes, 1},
    {"eos", kEos, 1},
    {"has_vocab", kHasVocab, 1},
    {"symbols", kSymbols, 1},
    {"child_bits", kChildBits, 1},
    {"child_ranks", kChildRanks, 1},
    {"child_hints", kChildHints, 1},
    {"item_bits", kItemBits, 1},
    {"item_ranks", kItemRanks, 1},
    {"item_hints", kItemHints, 1},
    {"items", kItems, 1},
    {"tokens", kTokens, 1},
    {"codes", kCodes, 1},
    {"first_node", kFirstNode, kMaxLevels + 2},
    {"num_symbols", kNumSymbols, kMaxLevels},
    {"table", kTable, kMaxLevels},
    {"first_token", kFirstToken, kMaxLevels},
    {"sizes", kSizes, kMaxLevels},
    {"max_token", kMaxToken, kMaxLevels},
};
std::string name_of_word(int word);  // such as "levels" or "first_node[2]"

struct FreeBytes {
  void operator()(std::uint8_t* p) const { std::free(p); }
};
struct TrieBytes {
  std::unique_ptr<std::uint8_t[], FreeBytes> data;  // aligned to 64 bytes
  std::int64_t size;
};

// What determines the layout and the header.
struct TrieShape {
  std::int64_t items = 0, sids = 0, nodes = 0;
  Depths first_node{};  // of each depth; from depth levels + 1 on the number of nodes
  std::int64_t levels = 0, sid_levels = 0, eos = -1, table_size = 0;
  bool wide_items = false, has_vocab = false;
  std::array<std::int64_t, kMaxLevels> num_symbols{}, table{}, first_token{}, sizes{}, max_token{};

  // The shape of a finished block.
  static TrieShape of(const std::uint8_t* block);

  // Sets a level's sizes by its largest code, where there is no vocab.
  void set_largest_symbol(int level, std::int64_t symbol);
  bool wide() const;
};

// Where the sections begin; the last entry is where the block ends. A section's bytes may be followed by zeros.
struct TrieLayout {
  static constexpr int kSections = kCodes - kSymbols + 1;
  std::array<std::int64_t, kSections + 1> begin{};
  std::array<std::int64_t, kSections> bytes{};

  explicit TrieLayout(const TrieShape& shape);
  std::int64_t size() const { return begin.back(); }
};

// All kHeaderWords words but the checksum, which is 0.
void write_header(const TrieShape& shape, const TrieLayout& layout, std::uint64_t* header);

class TrieBlock {
 public:
  // Writes the header; the caller writes symbols, bits, items and tables. Throws for too many nodes.
  explicit TrieBlock(const TrieShape& shape);

  void zero_bits() const;  // for a caller that only sets bits

  std::uint64_t* header() const { return reinterpret_cast<std::uint64_t*>(bytes_.data.get()); }
  template <typename Element>
  Element* section(HeaderWord word) const {
    return reinterpret_cast<Element*>(bytes_.data.get() + header()[word]);
  }

  // Writes ranks, hints and the checksum, after everything else is written.
  TrieBytes finish(int threads);

 private:
  void index_bits(HeaderWord bits, std::int64_t count) const;
  TrieBytes bytes_{};
};

// The checksum of every byte but its own. Detects every change within one 64-bit word.
std::uint64_t trie_checksum(const std::uint8_t* data, std::int64_t size);

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace raddpo
