// sample_step for torch: checks, allocation, threads and streams.
#include "sample_step.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../beam_search/beam_call.h"
#include "../common/buffer.h"
#include "../common/isa.h"

namespace raddpo {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Call {
  Result out;
  SampleStepArgs args;
};

Call prepare(const Tensor& logits, const Tensor& scores, const Tensor& perturbed, const Tensor& nodes,
             const Tensor& keys, const Tensor& seed, const Tensor& trie, const Tensor& header,
             const OptionalTensor& live, std::int64_t level, std::int64_t beam_width, double scale, bool replacement) {
  check_device("sample_step", {{"logits", logits}, {"perturbed", perturbed}, {"keys", keys}, {"seed", seed}});
  SampleStepArgs a{};
  static_cast<BeamStepArgs&>(a) =
      step_inputs("sample_step", logits, scores, nodes, trie, header, live, level, beam_width);
  STD_TORCH_CHECK(perturbed.scalar_type() == ScalarType::Float && perturbed.is_contiguous() &&
                      perturbed.numel() == a.batch * a.width,
                  "sample_step: perturbed must be contiguous float32, one element a row of logits");
  STD_TORCH_CHECK(keys.scalar_type() == ScalarType::Long && keys.is_contiguous() && keys.numel() == a.batch &&
                      seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                  "sample_step: keys must be contiguous int64, one element a query, and seed one int64");
  a.normalize = Normalize::trie;
  std::fill(std::begin(a.length_factor), std::end(a.length_factor), 1.f);
  a.perturbed = perturbed.const_data_ptr<float>();
  a.keys = keys.const_data_ptr<std::int64_t>();
  a.seed = seed.const_data_ptr<std::int64_t>();
  a.scale = static_cast<float>(scale);
  a.replacement = replacement;
  a.symbols = *std::max_element(a.trie.num_symbols, a.trie.num_symbols + a.trie.levels);
  Tensor floats[3], integers[3];
  for (Tensor& t : floats) t = new_empty(scores, {a.batch, beam_width}, ScalarType::Float);
  for (Tensor& t : integers) t = new_empty(nodes, {a.batch, beam_width}, ScalarType::Long);
  a.out_scores = floats[0].mutable_data_ptr<float>();
  a.out_perturbed = floats[1].mutable_data_ptr<float>();
  a.out_logps = floats[2].mutable_data_ptr<float>();
  a.out_tokens = integers[0].mutable_data_ptr<std::int64_t>();
  a.out_parents = integers[1].mutable_data_ptr<std::int64_t>();
  a.out_nodes = integers[2].mutable_data_ptr<std::int64_t>();
  return {{floats[0], integers[0], integers[1], integers[2], floats[1], floats[2]}, a};
}

void write(const SampleStepArgs& a, std::int64_t query, const Best& best) {
  for (std::int64_t slot = 0; slot < a.beam_width; ++slot) {
    const Candidate empty{-INFINITY, 0.f, 0, -1, -1};
    const bool found = slot < best.count;
    const Candidate& c = found ? best.list[slot] : empty;
    const std::int64_t at = query * a.beam_width + slot;
    a.out_scores[at] = found ? a.scores[query * a.width + c.parent] + c.score : -INFINITY;
    a.out_perturbed[at] = c.key;
    a.out_tokens[at] = c.token;
    a.out_parents[at] = c.parent;
    a.out_nodes[at] = c.node;
    a.out_logps[at] = c.score;
  }
}

Result sample_step_cpu(const Tensor& logits, const Tensor& scores, const Tensor& perturbed, const Tensor& nodes,
                       const Tensor& keys, const Tensor& seed, const Tensor& trie, const Tensor& header,
                       const OptionalTensor& live, std::int64_t level, std::int64_t beam_width, double scale,
                       bool replacement) {
  const Call c =
      prepare(logits, scores, perturbed, nodes, keys, seed, trie, header, live, level, beam_width, scale, replacement);
  const SampleStepArgs& a = c.args;
  rank_candidates(
      a,
      [&](std::int64_t query, std::int64_t begin, std::int64_t end, Best& best) {
        const Buffer<double> scratch(3 * a.symbols + 51);
        RADDPO_CALL_ISA(sample_step, a, query, begin, end, best, scratch.get());
      },
      [&](std::int64_t query, const Best& best) { write(a, query, best); });
  return c.out;
}

#ifdef RADDPO_WITH_CUDA
Result sample_step_cuda(const Tensor& logits, const Tensor& scores, const Tensor& perturbed, const Tensor& nodes,
                        const Tensor& keys, const Tensor& seed, const Tensor& trie, const Tensor& header,
                        const OptionalTensor& live, std::int64_t level, std::int64_t beam_width, double scale,
                        bool replacement) {
  const Call c =
      prepare(logits, scores, perturbed, nodes, keys, seed, trie, header, live, level, beam_width, scale, replacement);
  STD_TORCH_CHECK(!replacement, "sample_step: draws with replacement are made on the CPU only");
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  if (!c.args.batch) return c.out;
  Tensor workspace = new_empty(trie, {cuda::sample_step_workspace(c.args)}, ScalarType::Byte);
  check_launch(cuda::sample_step(c.args, workspace.mutable_data_ptr(), current_cuda_stream(logits.get_device_index())),
               "sample_step");
  return c.out;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) { m.impl("sample_step", TORCH_BOX(&sample_step_cpu)); }

#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) { m.impl("sample_step", TORCH_BOX(&sample_step_cuda)); }
#endif

}  // namespace raddpo
