#pragma once
// Which columns of the logits a level needs, on host and device.
#include "../trie_index/trie_math.h"
#include "beam_search.h"

namespace raddpo {

// Whether the logits have them all; where they are one level's, whether they are this one's.
RADDPO_HD bool has_columns(const BeamStepArgs& a, int level) {
  if (a.level < 0) return last_token_of(a.trie, level) < a.vocab;
  return level == a.level && a.trie.num_symbols[level] <= a.vocab;
}

// The first of them, where they follow one another.
RADDPO_HD std::int32_t first_column(const BeamStepArgs& a, int level) {
  return a.level < 0 ? a.trie.first_token[level] : 0;
}

// Whether they do.
RADDPO_HD bool in_sequence(const BeamStepArgs& a, int level) { return a.level >= 0 || a.trie.table[level] < 0; }

// The column of a symbol.
RADDPO_HD std::int32_t column_of(const BeamStepArgs& a, int level, std::int64_t symbol) {
  return a.level < 0 ? token_of(a.trie, level, symbol) : static_cast<std::int32_t>(symbol);
}

}  // namespace raddpo
