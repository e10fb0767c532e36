#pragma once
// What beam_step and sample_step share of torch's side.
#include <functional>

#include "../trie/trie_tensor.h"
#include "beam_search.h"

namespace raddpo {

// The arguments of a step that its tensors give, checked. Errors begin with `op`.
BeamStepArgs step_inputs(const char* op, const Tensor& logits, const Tensor& scores, const Tensor& nodes,
                         const Tensor& trie, const Tensor& header, const OptionalTensor& live, std::int64_t level,
                         std::int64_t beam_width);

// Adds what the beams [begin, end) of a query offer.
using OfferCandidates = std::function<void(std::int64_t query, std::int64_t begin, std::int64_t end, Best& best)>;
using WriteBest = std::function<void(std::int64_t query, const Best& best)>;

// On the CPU: `offer`, on several threads, then `write` with each query's best, ranked.
void rank_candidates(const BeamStepArgs& a, const OfferCandidates& offer, const WriteBest& write);

}  // namespace raddpo
