#pragma once
// The layout of a batch of sessions and of its SIDs (raddpo_ext/losses/session.py), for host and device.
#include <cstdint>

#include "math.h"

namespace raddpo {

// Candidates are ordered by session, positives first; pairs by session, positive-major.
struct Sessions {
  const std::int64_t* lengths;        // [candidates]
  const std::int64_t* offsets;        // [sessions + 1]
  const std::int64_t* num_positives;  // [sessions]
  std::int64_t sessions, candidates;
};

// Rows [first, first + positives) are positives, the next `negatives` rows negatives; pairs begin at first_pair.
struct Session {
  std::int64_t first, positives, negatives, first_pair;
};

// A session with invalid values counts as empty, so that no index computed from them is out of bounds.
RADDPO_HD Session session_of(const Sessions& b, std::int64_t s) {
  const std::int64_t first = b.offsets[s], size = b.offsets[s + 1] - first, positives = b.num_positives[s];
  const bool sound = first >= 0 && size >= 0 && size <= b.candidates - first && positives >= 0 && positives <= size;
  return sound ? Session{first, positives, size - positives, 0} : Session{0, 0, 0, 0};
}

// How the terms of sessions become a loss.
enum class Reduction : int { mean, sum, none };

RADDPO_HD std::int64_t clamp_length(std::int64_t length, std::int64_t most) {
  return length < 0 ? 0 : length > most ? most : length;
}

// A candidate's tokens.
struct Sid {
  const std::int64_t* tokens;
  std::int32_t length;
};

RADDPO_HD std::int32_t common_prefix(const Sid& x, const Sid& y) {
  const std::int32_t most = x.length < y.length ? x.length : y.length;
  std::int32_t k = 0;
  while (k < most && x.tokens[k] == y.tokens[k]) ++k;
  return k;
}

}  // namespace raddpo
