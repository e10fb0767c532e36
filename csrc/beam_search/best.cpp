#include <algorithm>
#include <functional>

#include "beam_search.h"

namespace raddpo {

// Candidates arrive in the order that decides ties, and stay in it.
void trim(Best& best) {
  if (best.count <= best.limit) return;
  for (std::int64_t i = 0; i < best.count; ++i) best.keys[i] = best.list[i].key;
  std::nth_element(best.keys, best.keys + best.limit - 1, best.keys + best.count, std::greater<float>());
  const float least = best.keys[best.limit - 1];
  std::int64_t equal =
      best.limit - std::count_if(best.keys, best.keys + best.limit, [=](float k) { return k > least; });
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < best.count; ++i) {
    const Candidate& c = best.list[i];
    if (c.key > least || (c.key == least && equal-- > 0)) best.list[kept++] = c;
  }
  best.count = kept;
  best.threshold = least;
}

void sort(Best& best) {
  std::stable_sort(best.list, best.list + best.count,
                   [](const Candidate& a, const Candidate& b) { return a.key > b.key; });
}

}  // namespace raddpo
