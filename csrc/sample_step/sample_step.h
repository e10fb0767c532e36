#pragma once
// Kernel interface of sample_step, one step of sampling from the trie: a beam_step whose candidates compete by
// perturbed scores (without replacement) or by how many draws they got (with replacement). Raw pointers, no torch.
#include "../beam_search/beam_search.h"

namespace raddpo {

// Of BeamStepArgs, `lse` is null, `normalize` is trie and there is no length penalty.
struct SampleStepArgs : BeamStepArgs {
  const float* perturbed;    // [batch, width] perturbed scores, inf at the root, which has none yet: its children keep
                             // their own; with replacement the draws in each beam
  const std::int64_t* keys;  // [batch] of the noise of each query
  const std::int64_t* seed;  // one number
  float scale;               // of the logits: 1 / temperature
  bool replacement;
  std::int64_t symbols;              // of the largest level: no node has more children
  float *out_perturbed, *out_logps;  // [batch, beam_width]; log-prob of the token, 0 of a finished beam
};

// Adds what the live beams [begin, end) of one query offer, as beam_step does: `key` is the perturbed score (or the
// number of draws), `score` the log-prob of the token. `scratch`: [3 * symbols + 51].
namespace scalar {
void sample_step(const SampleStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best,
                 double* scratch);
}
namespace avx2 {
void sample_step(const SampleStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best,
                 double* scratch);
}
namespace avx512 {
void sample_step(const SampleStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best,
                 double* scratch);
}

namespace cuda {  // without replacement only
std::int64_t sample_step_workspace(const SampleStepArgs& a);
int sample_step(const SampleStepArgs& a, void* workspace, CUstream_st* stream);  // returns cudaError_t
}  // namespace cuda

}  // namespace raddpo
