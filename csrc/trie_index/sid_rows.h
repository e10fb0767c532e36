#pragma once
// The SIDs that an index is built from, row by row. Host only.
#include <cstdint>
#include <sstream>
#include <string>

#include "packing.h"
#include "trie_build.h"

namespace raddpo {

template <typename T>
struct SidRows {
  const TrieBuildInput& in;
  const T* sids;

  explicit SidRows(const TrieBuildInput& input) : in(input), sids(static_cast<const T*>(input.sids)) {}

  T code(std::int64_t row, int level) const { return sids[row * in.columns + level]; }
  std::int64_t item_id(std::int64_t row) const { return in.item_ids ? in.item_ids[row] : row; }

  // Whether symbol 0 of a key means that the SID has ended, so that the others are one more.
  bool absent() const { return in.lengths != nullptr; }
  bool eos() const { return in.eos >= 0; }
  int length_of(std::int64_t row) const { return static_cast<int>(in.lengths ? in.lengths[row] : in.columns) + eos(); }

  // The symbol of `row` at `level`, -1 beyond its end.
  std::int64_t symbol(std::int64_t row, int level) const {
    const std::int64_t length = in.lengths ? in.lengths[row] : in.columns;
    if (level >= length) return level == length && eos() ? in.levels[level].eos_symbol : -1;
    const auto& table = in.levels[level].symbol_of_code;
    return table.empty() ? static_cast<std::int64_t>(code(row, level)) : table[code(row, level)];
  }

  // A row's symbols of a word, above its number.
  template <typename Row>
  Row packed(std::int64_t row, const Packing& p, int word) const {
    Row key = 0;
    for (int l = p.first_level[word]; l < p.first_level[word + 1]; ++l)
      key = key << p.bits[l] | static_cast<std::uint64_t>(symbol(row, l) + absent());
    return key << p.row_bits | static_cast<std::uint64_t>(row);
  }

  // Fetches what a row is asked for next: sorted rows jump in memory.
  void prefetch(std::int64_t row, bool codes) const {
    if (codes) __builtin_prefetch(sids + row * in.columns);
    if (in.item_ids) __builtin_prefetch(in.item_ids + row);
  }

  std::string show(std::int64_t row) const {
    std::ostringstream text;
    for (int l = 0; l < length_of(row) - eos(); ++l) text << (l ? ", " : "(") << +code(row, l);
    return text.str() + ")";
  }
};

}  // namespace raddpo
