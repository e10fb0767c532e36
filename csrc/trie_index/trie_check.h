#pragma once
// Checks that a block of unknown origin is one that trie_build writes: then every lookup in it is safe. Host only.
#include <cstdint>

#include "trie_view.h"

namespace raddpo {

// Throws std::invalid_argument that says what is wrong; reads nothing outside `data` (aligned to 8 bytes), whatever it
// holds, and takes no more memory than a small multiple of it.
void trie_check(const std::uint8_t* data, std::int64_t size, int threads);

// The declarations below are compiled once per instruction set.

// Nodes [begin, end) of one level. `begin` is above 0: the root comes first.
struct SymbolCheck {
  const void* symbols;
  bool wide;
  std::int64_t begin, end;
  const std::uint64_t* first;  // one bit per node: it is the first child of its parent
  const std::uint64_t* inner;  // one bit per node: it has children
  std::int64_t eos;            // the end-of-sequence token's symbol; -1: the level has none; -2: no level has
};
struct SymbolsFound {
  std::int64_t largest;
  bool ascend, eos_ends;  // symbols ascend among siblings; eos is exactly at the leaves
};
struct IdsFound {
  std::int64_t least, largest;
};

#define RADDPO_DECLARE(isa)                                                                                       \
  namespace isa {                                                                                                 \
  bool ranks_follow(const std::uint64_t* bits, std::int64_t begin, std::int64_t end, const std::uint32_t* ranks); \
  void mark_zeros(const std::uint64_t* bits, std::int64_t begin, std::int64_t end, std::uint64_t* out);           \
  void mark_ones(const std::uint64_t* bits, std::int64_t begin, std::int64_t end, bool root, std::uint64_t* out); \
  SymbolsFound check_symbols(const SymbolCheck& c);                                                               \
  IdsFound check_ids(const void* ids, bool wide, std::int64_t begin, std::int64_t end);                           \
  }
RADDPO_DECLARE(scalar)
RADDPO_DECLARE(avx2)
RADDPO_DECLARE(avx512)
#undef RADDPO_DECLARE

}  // namespace raddpo
