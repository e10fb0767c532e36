#pragma once
// How a SID's symbols and its row's number become one unsigned integer. Host only.
#include <array>
#include <cstdint>
#include <vector>

#include "trie.h"

namespace raddpo {

__extension__ typedef unsigned __int128 Wide;

template <typename Integer>
int bit_width(Integer x) {  // x >= 0
  int width = 0;
  if constexpr (sizeof x > 8)
    if (const auto high = static_cast<std::uint64_t>(x >> 64)) return 64 + bit_width(high);
  if (const auto low = static_cast<std::uint64_t>(x)) width = 64 - __builtin_clzll(low);
  return width;
}

// Where each level is in the words, each of which has the row's number in its low bits. The first level has the highest
// bits of word 0.
struct Packing {
  int row_bits = 0, words = 0;
  std::array<int, kMaxLevels> word{}, shift{}, bits{}, used{};  // used: bits per word, without the row's number
  std::array<int, kMaxLevels + 1> first_level{};                // per word, and the end

  Packing(const std::vector<std::int64_t>& num_symbols, int levels, bool absent, std::int64_t rows)
      : row_bits(bit_width(rows - 1)) {
    for (int l = 0; l < levels; ++l) {
      bits[l] = bit_width(num_symbols[l] - 1 + absent);
      if (l == 0 || row_bits + used[words - 1] + bits[l] > 127) first_level[words++] = l;
      word[l] = words - 1;
      used[words - 1] += bits[l];
    }
    first_level[words] = levels;
    std::array<int, kMaxLevels> left = used;
    for (int l = 0; l < levels; ++l) shift[l] = row_bits + (left[word[l]] -= bits[l]);
  }

  // Whether all of it fits in 64 bits. Of 64, as of 128, one stays free, so that no shift is as large as that.
  bool narrow() const { return words == 1 && row_bits + used[0] < 64; }

  template <typename Row>
  std::int64_t row_of(Row row) const {
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(row) & ((std::uint64_t(1) << row_bits) - 1));
  }
  // What a row of word 0 has of a level.
  template <typename Row>
  std::uint64_t value_of(Row row, int level) const {
    return static_cast<std::uint64_t>(row >> shift[level]) & ((std::uint64_t(1) << bits[level]) - 1);
  }
};

}  // namespace raddpo
