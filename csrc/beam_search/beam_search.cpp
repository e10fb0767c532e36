// beam_step for torch: checks, allocation, threads and streams. On the CPU a query's beams are one piece of work, or
// several where there are more threads than queries; the pieces' best candidates are then ranked together.
#include "beam_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../common/buffer.h"
#include "../common/isa.h"
#include "beam_call.h"

namespace raddpo {

BeamStepArgs step_inputs(const char* op, const Tensor& logits, const Tensor& scores, const Tensor& nodes,
                         const Tensor& trie, const Tensor& header, const OptionalTensor& live, std::int64_t level,
                         std::int64_t beam_width) {
  check_device(op, {{"logits", logits}, {"scores", scores}, {"nodes", nodes}, {"trie", trie}, {"live", live}});
  STD_TORCH_CHECK(logits.dim() == 3, op, ": logits must have shape (batch, width, vocab)");
  const std::int64_t batch = logits.size(0), width = logits.size(1), vocab = logits.size(2);
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && nodes.scalar_type() == ScalarType::Long, op,
                  ": scores must be float32 and nodes int64");
  STD_TORCH_CHECK(scores.is_contiguous() && nodes.is_contiguous() && scores.numel() == batch * width &&
                      nodes.numel() == batch * width,
                  op, ": scores and nodes must be contiguous, one element a row of logits");
  STD_TORCH_CHECK(logits.stride(2) == 1 || vocab <= 1, op, ": the last dimension of logits must be contiguous");
  STD_TORCH_CHECK(beam_width >= 1 && width <= std::numeric_limits<std::int32_t>::max(), op, ": bad beam width");
  BeamStepArgs a{};
  a.trie = trie_view(trie, header, live, op);
  a.logits = logits.const_data_ptr();
  a.logit_type = logit_type_of(logits, op);
  a.batch = batch;
  a.width = width;
  a.vocab = vocab;
  a.stride_batch = logits.stride(0);
  a.stride_beam = logits.stride(1);
  a.scores = scores.const_data_ptr<float>();
  a.nodes = nodes.const_data_ptr<std::int64_t>();
  STD_TORCH_CHECK(level >= -1 && level < a.trie.levels, op, ": bad level");
  a.level = level;
  a.beam_width = beam_width;
  return a;
}

void rank_candidates(const BeamStepArgs& a, const OfferCandidates& offer, const WriteBest& write) {
  if (!a.batch) return;
  const std::int64_t threads = torch::stable::get_num_threads();
  const std::int64_t pieces = std::max<std::int64_t>(1, std::min(a.width, threads / a.batch));
  const std::int64_t capacity = a.beam_width + std::max<std::int64_t>(a.beam_width, 256);
  const Buffer<Candidate> lists(a.batch * pieces * capacity);
  const Buffer<float> keys(a.batch * pieces * capacity);
  std::vector<Best> best(a.batch * pieces);
  const std::int64_t small = 1 << 15;  // logits that are read sooner than a thread wakes
  const std::int64_t grain = 1 + small / (1 + a.width * a.vocab / pieces);
  parallel_for(a.batch * pieces, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t query = i / pieces, piece = i % pieces;
      best[i] = {lists.get() + i * capacity, keys.get() + i * capacity, 0, a.beam_width, capacity, -INFINITY};
      offer(query, a.width * piece / pieces, a.width * (piece + 1) / pieces, best[i]);
      trim(best[i]);
    }
  });
  for (std::int64_t query = 0; query < a.batch; ++query) {
    Best& all = best[query * pieces];  // the pieces' lists lie one after another: move them together
    for (std::int64_t piece = 1; piece < pieces; ++piece) {
      const Best& next = best[query * pieces + piece];
      std::copy(next.list, next.list + next.count, all.list + all.count);
      all.count += next.count;
    }
    trim(all);
    sort(all);
    write(query, all);
  }
}

namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Call {
  Result out;
  BeamStepArgs args;
};

Call prepare(const Tensor& logits, const Tensor& scores, const Tensor& nodes, const Tensor& trie, const Tensor& header,
             const OptionalTensor& live, const OptionalTensor& lse, std::int64_t level, std::int64_t beam_width,
             std::int64_t normalize, double length_penalty) {
  check_device("beam_step", {{"logits", logits}, {"lse", lse}});
  BeamStepArgs a = step_inputs("beam_step", logits, scores, nodes, trie, header, live, level, beam_width);
  STD_TORCH_CHECK(
      !lse || (lse->scalar_type() == ScalarType::Float && lse->is_contiguous() && lse->numel() == a.batch * a.width),
      "beam_step: lse must be contiguous float32, one element a row of logits");
  a.lse = lse ? lse->const_data_ptr<float>() : nullptr;
  a.normalize = static_cast<Normalize>(normalize);
  for (int d = 0; d <= a.trie.levels; ++d)
    a.length_factor[d] = static_cast<float>(std::pow(std::max(d, 1), length_penalty));
  Tensor out_scores = new_empty(scores, {a.batch, beam_width}, ScalarType::Float);
  Tensor tokens = new_empty(nodes, {a.batch, beam_width}, ScalarType::Long);
  Tensor parents = new_empty(nodes, {a.batch, beam_width}, ScalarType::Long);
  Tensor out_nodes = new_empty(nodes, {a.batch, beam_width}, ScalarType::Long);
  a.out_scores = out_scores.mutable_data_ptr<float>();
  a.out_tokens = tokens.mutable_data_ptr<std::int64_t>();
  a.out_parents = parents.mutable_data_ptr<std::int64_t>();
  a.out_nodes = out_nodes.mutable_data_ptr<std::int64_t>();
  return {{out_scores, tokens, parents, out_nodes}, a};
}

void write(const BeamStepArgs& a, std::int64_t query, const Best& best) {
  for (std::int64_t slot = 0; slot < a.beam_width; ++slot) {
    const Candidate empty{0.f, -INFINITY, 0, -1, -1};
    const Candidate& c = slot < best.count ? best.list[slot] : empty;
    const std::int64_t at = query * a.beam_width + slot;
    a.out_scores[at] = c.score;
    a.out_tokens[at] = c.token;
    a.out_parents[at] = c.parent;
    a.out_nodes[at] = c.node;
  }
}

Result beam_step_cpu(const Tensor& logits, const Tensor& scores, const Tensor& nodes, const Tensor& trie,
                     const Tensor& header, const OptionalTensor& live, const OptionalTensor& lse, std::int64_t level,
                     std::int64_t beam_width, std::int64_t normalize, double length_penalty) {
  const Call c = prepare(logits, scores, nodes, trie, header, live, lse, level, beam_width, normalize, length_penalty);
  const BeamStepArgs& a = c.args;
  rank_candidates(
      a,
      [&](std::int64_t query, std::int64_t begin, std::int64_t end, Best& best) {
        RADDPO_CALL_ISA(beam_step, a, query, begin, end, best);
      },
      [&](std::int64_t query, const Best& best) { write(a, query, best); });
  return c.out;
}

#ifdef RADDPO_WITH_CUDA
Result beam_step_cuda(const Tensor& logits, const Tensor& scores, const Tensor& nodes, const Tensor& trie,
                      const Tensor& header, const OptionalTensor& live, const OptionalTensor& lse, std::int64_t level,
                      std::int64_t beam_width, std::int64_t normalize, double length_penalty) {
  const Call c = prepare(logits, scores, nodes, trie, header, live, lse, level, beam_width, normalize, length_penalty);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  if (!c.args.batch) return c.out;
  Tensor workspace = new_empty(trie, {cuda::beam_step_workspace(c.args)}, ScalarType::Byte);
  check_launch(cuda::beam_step(c.args, workspace.mutable_data_ptr(), current_cuda_stream(logits.get_device_index())),
               "beam_step");
  return c.out;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) { m.impl("beam_step", TORCH_BOX(&beam_step_cpu)); }
#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) { m.impl("beam_step", TORCH_BOX(&beam_step_cuda)); }
#endif

}  // namespace raddpo
