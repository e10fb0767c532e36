#pragma once
// Kernel interface of child_logits: the products of beams' hidden states with the head's rows of their children alone.
#include <cstdint>

#include "../common/logit_type.h"
#include "../trie_index/trie.h"

namespace raddpo {

struct ChildLogitsArgs {
  TrieView trie;
  const void* hidden;                                            // [rows, size]
  const void* weight;                                            // [vocab, size]
  const void* bias;                                              // [vocab], or null
  LogitType type;                                                // of all three
  std::int64_t rows, size, vocab, stride_hidden, stride_weight;  // the last dimension is contiguous
  const float* scores;                                           // [rows], -inf: an empty slot
  const std::int64_t* nodes;                                     // [rows], -1: an empty slot
  std::int64_t level;                                            // of the children; other beams have none here
  float scale, softcap;  // a product x counts as softcap * tanh(x / softcap) * scale; softcap 0: x * scale
  std::int64_t columns;  // symbols of the level
  float* out;  // [rows, columns]: column s gets the logit of the child along symbol s, the others are not written
};

namespace scalar {
void child_logits(const ChildLogitsArgs& a, std::int64_t begin, std::int64_t end);
}
namespace avx2 {
void child_logits(const ChildLogitsArgs& a, std::int64_t begin, std::int64_t end);
}
namespace avx512 {
void child_logits(const ChildLogitsArgs& a, std::int64_t begin, std::int64_t end);
}
namespace cuda {
int child_logits(const ChildLogitsArgs& a, CUstream_st* stream);  // returns cudaError_t
}

}  // namespace raddpo
