#pragma once
// A trie's block of bytes in the making: its layout, its header and what follows from its bits. Host only, no torch.
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "trie.h"

namespace raddpo {

using Depths = std::array<std::int64_t, kMaxLevels + 2>;

struct FreeBytes {
  void operator()(std::uint8_t* p) const { std::free(p); }
};
struct TrieBytes {
  std::unique_ptr<std::uint8_t[], FreeBytes> data;  // aligned to 64 bytes
  std::int64_t size;
};

// What the layout and the header follow from.
struct TrieShape {
  std::int64_t items = 0, sids = 0, nodes = 0;
  Depths first_node{};  // of each depth; from depth levels + 1 on the number of nodes
  std::int64_t levels = 0, sid_levels = 0, eos = -1, table_size = 0;
  bool wide_items = false, has_vocab = false;
  std::array<std::int64_t, kMaxLevels> num_symbols{}, table{}, first_token{}, sizes{}, max_token{};

  // Of a whole block.
  static TrieShape of(const std::uint8_t* block);

  // Without a vocab a level's codes are those up to the largest there is.
  void set_largest_symbol(int level, std::int64_t symbol);
  bool wide() const;
};

class TrieBlock {
 public:
  // Everything but symbols, bits, items and tables is in place; the bits are zero. Throws for too many nodes.
  explicit TrieBlock(const TrieShape& shape);

  std::uint64_t* header() const { return reinterpret_cast<std::uint64_t*>(bytes_.data.get()); }
  template <typename Element>
  Element* section(HeaderWord word) const {
    return reinterpret_cast<Element*>(bytes_.data.get() + header()[word]);
  }

  // Ranks, hints and the checksum, once the bits and all else are written.
  TrieBytes finish();

 private:
  void index_bits(HeaderWord bits, std::int64_t count) const;
  TrieBytes bytes_{};
};

// Of every byte of the block but the checksum's own; detects every change within one 64-bit word.
std::uint64_t trie_checksum(const std::uint8_t* data, std::int64_t size);

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace raddpo
