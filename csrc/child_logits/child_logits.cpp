// child_logits for torch: checks, allocation, threads and streams.
#include "child_logits.h"

#include "../common/isa.h"
#include "../trie/trie_tensor.h"

namespace raddpo {
namespace {

struct Call {
  Tensor out;
  ChildLogitsArgs args;
};

Call prepare(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& scores,
             const Tensor& nodes, const Tensor& trie, const Tensor& header, const OptionalTensor& live, double scale,
             double softcap, std::int64_t level, std::int64_t columns) {
  check_device("child_logits", {{"hidden", hidden},
                                {"weight", weight},
                                {"bias", bias},
                                {"scores", scores},
                                {"nodes", nodes},
                                {"trie", trie},
                                {"live", live}});
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) &&
                      hidden.scalar_type() == weight.scalar_type(),
                  "child_logits: hidden must have shape (rows, size) and weight (vocab, size), of one dtype");
  STD_TORCH_CHECK((hidden.stride(1) == 1 && weight.stride(1) == 1) || hidden.size(1) <= 1,
                  "child_logits: the last dimensions must be contiguous");
  STD_TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == weight.size(0) &&
                            bias->scalar_type() == weight.scalar_type()),
                  "child_logits: bias must have one element a row of weight");
  STD_TORCH_CHECK(scores.scalar_type() == ScalarType::Float && nodes.scalar_type() == ScalarType::Long &&
                      scores.is_contiguous() && nodes.is_contiguous() && scores.numel() == hidden.size(0) &&
                      nodes.numel() == hidden.size(0),
                  "child_logits: scores must be float32 and nodes int64, one element a row of hidden");
  ChildLogitsArgs a{};
  a.trie = trie_view(trie, header, live, "child_logits");
  STD_TORCH_CHECK(level >= 0 && level < a.trie.levels, "child_logits: bad level");
  STD_TORCH_CHECK(columns == a.trie.num_symbols[level], "child_logits: columns must be the level's symbols, ",
                  a.trie.num_symbols[level]);
  const std::int64_t max_token = header.const_data_ptr<std::int64_t>()[kMaxToken + level];
  STD_TORCH_CHECK(max_token < weight.size(0), "child_logits: weight must have more than ", max_token, " rows");
  Tensor out = new_empty(scores, {hidden.size(0), columns}, ScalarType::Float);
  a.hidden = hidden.const_data_ptr();
  a.weight = weight.const_data_ptr();
  a.bias = bias ? bias->const_data_ptr() : nullptr;
  a.type = logit_type_of(hidden, "child_logits");
  a.rows = hidden.size(0);
  a.size = hidden.size(1);
  a.vocab = weight.size(0);
  a.stride_hidden = hidden.stride(0);
  a.stride_weight = weight.stride(0);
  a.scores = scores.const_data_ptr<float>();
  a.nodes = nodes.const_data_ptr<std::int64_t>();
  a.scale = static_cast<float>(scale);
  a.softcap = static_cast<float>(softcap);
  a.level = level;
  a.columns = columns;
  a.out = out.mutable_data_ptr<float>();
  return {out, a};
}

Tensor child_logits_cpu(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& scores,
                        const Tensor& nodes, const Tensor& trie, const Tensor& header, const OptionalTensor& live,
                        double scale, double softcap, std::int64_t level, std::int64_t columns) {
  const Call c = prepare(hidden, weight, bias, scores, nodes, trie, header, live, scale, softcap, level, columns);
  const std::int64_t grain = 1 + (1 << 15) / (1 + c.args.size);  // as if each beam had one child
  parallel_for(c.args.rows, grain,
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(child_logits, c.args, begin, end); });
  return c.out;
}

#ifdef RADDPO_WITH_CUDA
Tensor child_logits_cuda(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& scores,
                         const Tensor& nodes, const Tensor& trie, const Tensor& header, const OptionalTensor& live,
                         double scale, double softcap, std::int64_t level, std::int64_t columns) {
  const Call c = prepare(hidden, weight, bias, scores, nodes, trie, header, live, scale, softcap, level, columns);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  check_launch(cuda::child_logits(c.args, current_cuda_stream(hidden.get_device_index())), "child_logits");
  return c.out;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) { m.impl("child_logits", TORCH_BOX(&child_logits_cpu)); }
#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) { m.impl("child_logits", TORCH_BOX(&child_logits_cuda)); }
#endif

}  // namespace raddpo
