#pragma once
// Kernel interface of beam_step, one step of the constrained beam search: raw pointers, no torch and no CUDA headers.
#include <cstdint>

#include "../common/logit_type.h"
#include "../trie_index/trie.h"

namespace raddpo {

// The support of the softmax over a row of logits.
enum class Normalize : int { vocab, level, trie };

struct BeamStepArgs {
  TrieView trie;
  const void* logits;  // [batch, width, vocab], the last dimension contiguous; a beam whose level needs more columns
                       // offers nothing
  LogitType logit_type;
  std::int64_t batch, width, vocab, stride_batch, stride_beam;  // strides in elements
  const float* scores;                                          // [batch, width], -inf: an empty slot
  const std::int64_t* nodes;                                    // [batch, width], -1: an empty slot
  const float* lse;    // [batch, width] log-sum-exp of each beam's support, or null: of the logits
  std::int64_t level;  // whose symbols the logits' columns are, and whose beams alone are extended; -1: columns are
                       // token ids
  std::int64_t beam_width;  // of the result
  Normalize normalize;
  float length_factor[kMaxLevels + 1];  // of each depth: candidates compete by score / length_factor
  float* out_scores;                    // [batch, beam_width] these four
  std::int64_t *out_tokens, *out_parents, *out_nodes;
};

// A child of a live beam, or a finished beam itself (token -1).
struct Candidate {
  float key, score;  // key = score / length_factor
  std::int32_t parent, token;
  std::int64_t node;
};

// The best candidates so far, at most `limit` of them once trimmed. A candidate enters if its key is above `threshold`:
// beams come in ascending order and so do a beam's tokens, so that one equal to the last of the best loses the tie.
struct Best {
  Candidate* list;  // [capacity]
  float* keys;      // [capacity], scratch
  std::int64_t count, limit, capacity;
  float threshold;
};
void trim(Best& best);  // keeps the best `limit`, raises the threshold
void sort(Best& best);  // best first

// Adds what the live beams [begin, end) of one query offer. One variant for each instruction set.
namespace scalar {
void beam_step(const BeamStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best);
}
namespace avx2 {
void beam_step(const BeamStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best);
}
namespace avx512 {
void beam_step(const BeamStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best);
}

namespace cuda {
// Bytes of device memory that beam_step needs beside its arguments.
std::int64_t beam_step_workspace(const BeamStepArgs& a);
int beam_step(const BeamStepArgs& a, void* workspace, CUstream_st* stream);  // returns cudaError_t
}  // namespace cuda

}  // namespace raddpo
