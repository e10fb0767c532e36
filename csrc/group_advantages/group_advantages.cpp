// group_advantages for torch: checks, allocation, threads and streams.
#include "group_advantages.h"

#include <algorithm>
#include <atomic>
#include <tuple>

#include "../common/buffer.h"
#include "../common/isa.h"
#include "../common/tensor.h"
#include "group_advantages_cpu.h"

namespace raddpo {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor>;

// The operator's arguments in schema order.
struct Inputs {
  const Tensor &rewards, &tokens, &lengths, &offsets, &num_positives;
  const OptionalTensor &weights, &baselines, &target_tokens, &target_lengths, &target_offsets, &level_weights;
  double blend, eps;
  std::int64_t credit, scale, baseline;
  bool count_experts, contiguous;
};

template <typename T>
const T* data_of(const Tensor& t, const char* name, ScalarType type, std::int64_t size) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == size, "group_advantages: ", name,
                  " must be contiguous, of the documented type and of ", size, " elements");
  return t.const_data_ptr<T>();
}

template <typename T>
const T* data_of(const OptionalTensor& t, const char* name, ScalarType type, std::int64_t size) {
  return t ? data_of<T>(*t, name, type, size) : nullptr;
}

template <typename T>
GroupAdvantagesArgs<T> prepare(const Inputs& in, Result& out) {
  check_device("group_advantages", {{"rewards", in.rewards},
                                    {"tokens", in.tokens},
                                    {"lengths", in.lengths},
                                    {"offsets", in.offsets},
                                    {"num_positives", in.num_positives},
                                    {"weights", in.weights},
                                    {"baselines", in.baselines},
                                    {"target_tokens", in.target_tokens},
                                    {"target_lengths", in.target_lengths},
                                    {"target_offsets", in.target_offsets},
                                    {"level_weights", in.level_weights}});
  constexpr ScalarType kLong = ScalarType::Long;
  const ScalarType type = in.rewards.scalar_type();
  STD_TORCH_CHECK(in.rewards.dim() == 1 && in.tokens.dim() == 2,
                  "group_advantages: rewards must have shape (candidates), tokens (candidates, levels)");
  STD_TORCH_CHECK(!in.target_tokens || (in.target_tokens->dim() == 2 && in.target_lengths && in.target_offsets),
                  "group_advantages: target_tokens must have shape (targets, levels), with target_lengths and "
                  "target_offsets");
  const std::int64_t candidates = in.rewards.numel(), sessions = in.num_positives.numel();
  GroupAdvantagesArgs<T> a{};
  a.levels = in.tokens.size(1);
  a.batch = {data_of<std::int64_t>(in.lengths, "lengths", kLong, candidates),
             data_of<std::int64_t>(in.offsets, "offsets", kLong, sessions + 1),
             data_of<std::int64_t>(in.num_positives, "num_positives", kLong, sessions), sessions, candidates};
  a.tokens = data_of<std::int64_t>(in.tokens, "tokens", kLong, candidates * a.levels);
  a.rewards = data_of<T>(in.rewards, "rewards", type, candidates);
  a.weights = data_of<T>(in.weights, "weights", type, candidates);
  a.baselines = data_of<T>(in.baselines, "baselines", type, sessions);
  if (in.target_tokens) {
    a.targets = in.target_tokens->size(0);
    a.target_levels = in.target_tokens->size(1);
    a.target_tokens = data_of<std::int64_t>(*in.target_tokens, "target_tokens", kLong, a.targets * a.target_levels);
    a.target_lengths = data_of<std::int64_t>(*in.target_lengths, "target_lengths", kLong, a.targets);
    a.target_offsets = data_of<std::int64_t>(*in.target_offsets, "target_offsets", kLong, sessions + 1);
  }
  a.level_weights = data_of<T>(in.level_weights, "level_weights", type, a.levels);
  a.blend = in.blend;
  a.eps = in.eps;
  a.credit = static_cast<Credit>(in.credit);
  a.scale = static_cast<Scale>(in.scale);
  a.baseline = static_cast<Baseline>(in.baseline);
  a.count_experts = in.count_experts;
  a.contiguous = in.contiguous;
  const bool by_row = a.credit == Credit::sequence, gated = a.credit == Credit::marginal;
  out = {by_row ? new_empty(in.rewards, {candidates}, type) : new_empty(in.rewards, {candidates, a.levels}, type),
         new_empty(in.rewards, {sessions}, ScalarType::Bool),
         new_empty(in.rewards, {gated ? candidates : 0, a.levels}, type)};
  auto& [values, active, gates] = out;
  a.values = values.template mutable_data_ptr<T>();
  a.active = active.template mutable_data_ptr<bool>();
  a.gates = gates.template mutable_data_ptr<T>();
  return a;
}

template <typename T>
void run_cpu(const GroupAdvantagesArgs<T>& a) {
  const std::int64_t sessions = a.batch.sessions, candidates = a.batch.candidates;
  const double batch_std = a.scale == Scale::batch ? RADDPO_CALL_ISA(batch_std, a) : 0;
  std::atomic<bool> valid{true};
  // Groups per piece of work, so that a piece takes longer than waking a thread.
  const std::int64_t grain = 1 + (1 << 12) * sessions / (candidates * (a.levels + 1) + 1);
  parallel_for(sessions, grain, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t most = 0;
    for (std::int64_t s = begin; s < end; ++s) most = std::max(most, a.batch.offsets[s + 1] - a.batch.offsets[s]);
    most = std::min(most, candidates) + 1;
    const Buffer<GroupRow> rows(2 * most);
    const Buffer<std::int64_t> children(most);
    const Buffer<std::int32_t> shared(most);
    const Buffer<double> scores(most * std::max<std::int64_t>(a.levels, 1));
    const Buffer<GroupPlace> places(2 * most);
    const GroupScratch m{rows.get(), rows.get() + most, places.get(), children.get(), shared.get(), scores.get()};
    if (!RADDPO_CALL_ISA(group_advantages, a, m, batch_std, begin, end)) valid = false;
  });
  STD_TORCH_CHECK(valid, "group_advantages: rewards must be finite or NaN, weights finite and at least 0");
}

template <typename T>
void run(const GroupAdvantagesArgs<T>& a, const Tensor& rewards) {
#ifdef RADDPO_WITH_CUDA
  if (rewards.is_cuda()) {
    const std::int32_t device = rewards.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Tensor workspace = new_empty(rewards, {cuda::group_advantages_workspace(a)}, ScalarType::Byte);
    check_launch(cuda::group_advantages(a, workspace.mutable_data_ptr(), current_cuda_stream(device)),
                 "group_advantages");
    return;
  }
#endif
  run_cpu(a);
}

Result group_advantages(const Tensor& rewards, const Tensor& tokens, const Tensor& lengths, const Tensor& offsets,
                        const Tensor& num_positives, const OptionalTensor& weights, const OptionalTensor& baselines,
                        const OptionalTensor& target_tokens, const OptionalTensor& target_lengths,
                        const OptionalTensor& target_offsets, const OptionalTensor& level_weights, double blend,
                        double eps, std::int64_t credit, std::int64_t scale, std::int64_t baseline, bool count_experts,
                        bool contiguous) {
  const Inputs in{rewards,   tokens,        lengths,        offsets,        num_positives, weights,
                  baselines, target_tokens, target_lengths, target_offsets, level_weights, blend,
                  eps,       credit,        scale,          baseline,       count_experts, contiguous};
  const ScalarType type = rewards.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "group_advantages: rewards must be float32 or float64");
  Result out;
  if (type == ScalarType::Float)
    run(prepare<float>(in, out), rewards);
  else
    run(prepare<double>(in, out), rewards);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) { m.impl("group_advantages", TORCH_BOX(&group_advantages)); }
#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) { m.impl("group_advantages", TORCH_BOX(&group_advantages)); }
#endif

}  // namespace raddpo
