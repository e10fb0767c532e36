#pragma once
// Builds the block of bytes described in trie.h from unsorted SIDs. Host only, no torch.
#include <cstdint>
#include <functional>
#include <vector>

#include "trie_block.h"

namespace raddpo {

// The symbols and tokens of one level's codes. Empty vectors: symbol = code, token = first_token + code.
struct LevelSymbols {
  std::int64_t size = -1;  // codes are in [0, size); -1: up to the largest code of the SIDs
  std::int32_t first_token = 0;
  std::int32_t eos_symbol = -1;              // of the end-of-sequence token, if this level can hold it
  std::vector<std::int32_t> symbol_of_code;  // [size], -1: the code has no token
  std::vector<std::int32_t> tokens, codes;   // of each symbol
};

struct TrieBuildInput {
  const void* sids;  // [rows, columns], row-major
  int sid_bytes;     // 1, 2, 4 or 8
  bool sid_signed;
  std::int64_t rows, columns;
  const std::int64_t* lengths;       // [rows] in [1, columns], or null: all `columns`
  const std::int64_t* item_ids;      // [rows], distinct and >= 0, or null: row numbers
  std::vector<LevelSymbols> levels;  // one per column, and one more with an end-of-sequence token
  std::int64_t eos = -1;
  bool has_vocab = false;
  int threads = 1;
  std::function<void(double)> progress;  // called with the fraction done, in [0, 1]; may be empty
  std::function<void()> interrupt;       // called every 50 ms or so; an exception from it ends the build; may be empty
};

// Throws std::invalid_argument that names the argument and the value.
TrieBytes trie_build(const TrieBuildInput& input);

}  // namespace raddpo
