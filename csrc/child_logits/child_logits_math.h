#pragma once
// Which children a beam has at the level, on host and device.
#include "../trie_index/trie_math.h"
#include "child_logits.h"

namespace raddpo {

RADDPO_HD bool is_extended(const ChildLogitsArgs& a, std::int64_t row) {
  const std::int64_t node = a.nodes[row], *first = a.trie.first_node + a.level;
  return a.scores[row] > -INFINITY && node >= first[0] && node < first[1] && is_live(a.trie.live_nodes, node);
}

RADDPO_HD float logit_of(const ChildLogitsArgs& a, float product) {
  return a.scale * (a.softcap != 0.f ? a.softcap * fast_tanh(product / a.softcap) : product);
}

}  // namespace raddpo
